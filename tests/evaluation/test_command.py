"""The command from its settings to its files, on a model that is a table; and what asks a real one."""

import json
import types

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import command, rows, runner
from instructjax.evaluation.task import Choices, Question
from tests.evaluation import small_models
from tests.evaluation.fake import Fake


@pytest.fixture
def data(tmp_path):
  folder = tmp_path / "data" / "hellaswag"
  folder.mkdir(parents=True)
  lines = [{"ctx": f"row {i}", "endings": ["long one", "b"], "label": i % 2} for i in range(12)]
  (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return rows.Data((str(tmp_path / "data"),), {}, False)


def test_it_writes_samples_a_summary_and_a_page(data, tmp_path, monkeypatch, capsys):
  fakes = {"sft": Fake(), "ppo": Fake(log_prob_of=lambda text: (1.0 * len(text),))}
  monkeypatch.setattr(command, "_model", lambda name, *_: fakes[name].model(name))
  settings = runner.Settings(
    {"hellaswag": ("zero_shot",), "piqa": ("harness",)}, None, 0, False, "float32"
  )
  out, of_run = tmp_path / "out", tmp_path / "report" / "index.html"
  of_run.parent.mkdir()
  of_run.write_text(2 * "<!-- public sets: link --><!-- public sets: section --><!-- end -->\n")
  command.run({"sft": "runs/sft", "ppo": "runs/ppo"}, data, settings, out, {}, {"ppo"})
  assert "HellaSwag" in of_run.read_text()
  printed = capsys.readouterr().out
  assert "HellaSwag, 0-shot:" in printed and "piqa (skipped: no" in printed
  assert "cannot be told" in printed
  summary = json.loads((out / "summary.json").read_text())
  (row,) = (row for row in summary["parts"][0]["metrics"] if row["is_shown"])
  assert {name: found["value"] for name, found in row["models"].items()} == {"sft": 0.5, "ppo": 0.5}
  # Python with JAX takes some 200 MB; CPU devices have no memory of their own.
  assert (
    1e8 < summary["memory"]["machine_bytes"] < 1e11 and summary["memory"]["device_bytes"] is None
  )
  assert "peak memory: " in printed and " GB of the machine\n" in printed
  assert summary["models"] == {
    "sft": "runs/sft",
    "ppo": "runs/ppo, asked through its chat template",
  }
  page = (out / "index.html").read_text()
  assert "HellaSwag" in page and ".781" in page and "piqa" in page
  assert len((out / "samples" / "ppo" / "hellaswag.zero_shot.jsonl").read_text().splitlines()) == 12


def test_without_any_data_nothing_is_written(tmp_path):
  settings = runner.Settings({"piqa": ("harness",)}, None, 0, False, "float32")
  with pytest.raises(UserError, match="none of the tasks that were asked has data"):
    command.run({"sft": "runs/sft"}, rows.Data((), {}, False), settings, tmp_path / "out", {})
  assert not (tmp_path / "out" / "summary.json").exists()


def test_a_scorer_that_is_not_there_is_told_before_a_model_is_asked(data, tmp_path, monkeypatch):
  monkeypatch.setattr(command, "_model", lambda *_: pytest.fail("a model was opened"))
  settings = runner.Settings({"hellaswag": ("zero_shot",)}, None, 0, False, "float32")
  for spec in ("nothing", "python:tests.missing:f", "judge:runs/judge"):
    with pytest.raises(UserError, match=f"^scorer {spec} "):
      command.run({"sft": "runs/sft"}, data, settings, tmp_path / "out", {"toxicity": spec})
  with pytest.raises(UserError, match="runs/judge must be a Hugging Face folder"):
    command.run(
      *({"sft": "runs/sft"}, data, settings, tmp_path / "out"),
      {"toxicity": "judge:runs/judge?ask=a"},
    )


def test_chats_see_one_date(tmp_path, monkeypatch):
  monkeypatch.setattr(command.chat, "now", lambda: "2026-03-01T12:00:00")
  assert command._clock(tmp_path) == "2026-03-01T12:00:00"
  monkeypatch.setattr(command.chat, "now", lambda: "2026-03-02T12:00:00")
  assert command._clock(tmp_path) == "2026-03-01T12:00:00"


def test_another_tokenizer_is_another_model(tmp_path, monkeypatch):
  def checksum(fingerprint, stop_ids, is_chat=False, has_template=True, has_clock=False):
    chats = types.SimpleNamespace(has_template=has_template, has_clock=False)
    tokenizer = types.SimpleNamespace(fingerprint=fingerprint, stop_ids=stop_ids, chats=chats)
    found = types.SimpleNamespace(tokenizer=tokenizer, done=None, checksum=lambda memory: "weights")
    monkeypatch.setattr(command.weights, "locate", lambda path: found)
    return command._model("sft", "folder", tmp_path, "float32", is_chat).checksum

  assert checksum("a", (1,)) == checksum("a", (1,))
  assert len({checksum("a", (1,)), checksum("b", (1,)), checksum("a", (1, 2))}) == 3
  # Asked as a chat, it gives other answers too.
  assert checksum("a", (1,), is_chat=True) != checksum("a", (1,))
  with pytest.raises(UserError, match="--chat=sft: folder has no chat template; leave sft out"):
    checksum("a", (1,), is_chat=True, has_template=False)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
  device = lambda peak: types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak})
  monkeypatch.setattr(command.jax, "local_devices", lambda: [device(3), device(7)])
  assert command.peak_memory()["device_bytes"] == 7


def test_numbers_that_the_devices_choose():
  assert command.dtype("auto") == "float32" and command.dtype("bfloat16") == "bfloat16"
  assert set(command.DTYPES) == {"float32", "bfloat16"}


def test_what_fits_a_model(tmp_path):
  model = small_models.language_model(tmp_path)  # reads 48 tokens at once
  long = "xyz jkq bvw " * 20
  assert command.fit(model, Choices((("the cat", " sat"),))) == "whole"
  assert command.fit(model, Choices(((long, " sat"),))) == "whole"  # a choice says so itself
  assert command.fit(model, Choices((("the cat", " sat"), ("the cat", long)))) == "too long"
  assert command.fit(model, Question("the cat", 8)) == "whole"
  assert command.fit(model, Question(long, 8)) == "cut"
  # No answer may take all the room that the prompt needs.
  assert command.fit(model, Question("the cat", 10**6)) == "whole"


def test_progress_has_a_line_for_each_prompt_one_in_a_while_and_the_last(monkeypatch, capsys):
  clock = iter([0.0, 1.0, 2.0, 30.0, 31.0, 40.0, 40.0])
  monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
  told = command.progress()
  for done in (1, 2, 30, 31):
    told("sft", "piqa/harness", done, 40)
  told("sft", "piqa/harness", 40, 40)
  told("sft", "piqa/harness", 40, 40)
  assert capsys.readouterr().err.splitlines() == [
    "sft: piqa/harness: 1 of 40 requests",
    "sft: piqa/harness: 30 of 40 requests, about 10 s left",
    "sft: piqa/harness: 40 of 40 requests",
  ]
