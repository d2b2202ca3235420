"""Models are asked what they were not asked yet, and an interrupted evaluation ends like another."""

import dataclasses
import json

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data.messages import BadRecord
from instructjax.evaluation import rows, runner, tasks
from instructjax.evaluation.task import Choices
from tests.evaluation.fake import Fake

SETTINGS = runner.Settings({"hellaswag": ("zero_shot", "harness")}, None, 0, False, "float32")


@pytest.fixture
def data(tmp_path):
  folder = tmp_path / "data" / "hellaswag"
  folder.mkdir(parents=True)
  lines = [{"ctx": f"row {i}", "endings": ["long one", "b"], "label": i % 2} for i in range(6)]
  (folder / "val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return rows.Data((str(tmp_path / "data"),), {}, False)


def ask(data, out, fake, settings=SETTINGS, checksum="1", told=lambda *args: None):
  planned, skipped = runner.plan(tasks.found(), data, settings, out)
  runner.answer_all([fake.model(checksum=checksum)], planned, settings, out, told)
  return planned, skipped


def samples(out):
  return {path.name: path.read_text() for path in sorted(out.rglob("samples/**/*"))[1:]}


def test_samples_hold_what_decided_them(data, tmp_path):
  planned, _ = ask(data, tmp_path / "out", Fake())
  lines = samples(tmp_path / "out")["hellaswag.zero_shot.jsonl"].splitlines()
  sample = json.loads(lines[1])
  assert sample["number"] == 1 and sample["fit"] == "whole" and sample["item"]["gold"] == 1
  assert sample["prompt"].endswith("reasoning.\n\nrow 1")
  assert sample["choices"][1] == {
    "continuation": " b",
    "log_prob": -2.0,
    "log_probs": [-2.0],
    "tokens": ["t0"],
    "is_greedy": False,
    "is_cut": False,
  }
  assert sample["scores"] == {"accuracy": 1.0, "acc": 1.0, "acc_norm": 0.0}
  found = runner.scores(["fake"], planned[0], tmp_path / "out")
  np.testing.assert_array_equal(found["fake"]["accuracy"], [0, 1, 0, 1, 0, 1])


def test_a_model_may_be_asked_in_other_words(data, tmp_path):
  """`put` gets all questions of a prompt; what is kept is what the model has read."""
  fake = Fake()
  model = fake.model()
  put = lambda asks: [Choices(tuple((f"<{a}>", b.strip()) for a, b in ask.pairs)) for ask in asks]
  fitted = []
  engine = dataclasses.replace(model.open(), put=put, fit=lambda ask: fitted.append(ask) or "whole")
  planned, _ = runner.plan(tasks.found(), data, SETTINGS, tmp_path)
  model = dataclasses.replace(model, open=lambda: engine)
  runner.answer_all([model], planned, SETTINGS, tmp_path, lambda *args: None)
  assert all(context[0] == "<" for ask in fitted for context, _ in ask.pairs) and len(fitted) == 12
  sample = json.loads(samples(tmp_path)["hellaswag.zero_shot.jsonl"].splitlines()[1])
  assert sample["prompt"].endswith("row 1>") and sample["choices"][1]["continuation"] == "b"
  assert sample["choices"][1]["log_prob"] == -1.0  # of "b", without its space


def test_a_stopped_evaluation_goes_on_and_ends_the_same(data, tmp_path):
  ask(data, tmp_path / "whole", Fake())
  # 24 results: stopped in the first prompt, then in the second.
  for stop_after, asked in ((5, 5), (13, 13), (10**9, 6)):
    fake = Fake(stop_after=stop_after)
    if stop_after < 100:
      with pytest.raises(KeyboardInterrupt):
        ask(data, tmp_path / "stopped", fake)
    else:
      ask(data, tmp_path / "stopped", fake)
    assert fake.asked == asked
  assert samples(tmp_path / "stopped") == samples(tmp_path / "whole")
  again = Fake()
  ask(data, tmp_path / "stopped", again)
  assert (again.asked, again.opened) == (0, 0)  # not even loaded


def test_progress_counts_to_the_end(data, tmp_path):
  seen = []
  fake = Fake(stop_after=7)
  with pytest.raises(KeyboardInterrupt):
    ask(data, tmp_path / "out", fake, told=lambda *args: seen.append(args))
  assert seen[-1] == ("fake", "hellaswag/zero_shot", 7, 24)
  ask(data, tmp_path / "out", Fake(), told=lambda *args: seen.append(args))
  assert seen[7] == ("fake", "hellaswag/zero_shot", 8, 24)
  assert seen[-1] == ("fake", "hellaswag/harness", 24, 24)


def test_another_model_or_other_data_is_noticed(data, tmp_path):
  ask(data, tmp_path / "out", Fake())
  with pytest.raises(UserError, match="fake on hellaswag/zero_shot: .* made with another model;"):
    ask(data, tmp_path / "out", Fake(), checksum="2")
  limited = runner.Settings(SETTINGS.tasks, 3, 0, False, "float32")
  with pytest.raises(UserError, match="another limit and another prompt and another set"):
    ask(data, tmp_path / "out", Fake(), limited)
  path = tmp_path / "data" / "hellaswag" / "val.jsonl"
  path.write_text(path.read_text().replace('"label": 0', '"label": 1', 1))
  with pytest.raises(UserError, match="another data and another set of answers"):
    ask(data, tmp_path / "out", Fake())
  fake = Fake()
  ask(data, tmp_path / "out", fake, runner.Settings(SETTINGS.tasks, None, 0, True, "float32"))
  assert fake.asked == 24


def test_what_a_model_cannot_read_is_left_out_and_said(data, tmp_path):
  fit = lambda ask: "too long" if "row 2" in ask.pairs[0][0] else "cut"
  planned, _ = ask(data, tmp_path / "out", Fake(fit=fit))
  assert runner.fits(["fake"], planned[0], tmp_path / "out") == {"fake": {"cut": 5, "too long": 1}}
  found = runner.scores(["fake"], planned[0], tmp_path / "out")["fake"]["accuracy"]
  np.testing.assert_array_equal(np.isnan(found), [False, False, True, False, False, False])


def test_missing_data_is_named_and_a_bad_row_stops_before_any_model(data, tmp_path):
  settings = runner.Settings({"piqa": ("harness",)}, None, 0, False, "float32")
  planned, skipped = ask(data, tmp_path / "out", Fake(), settings)
  assert planned == [] and skipped[0].name == "piqa" and "below --data" in skipped[0].mend
  path = tmp_path / "data" / "hellaswag" / "val.jsonl"
  path.write_text(path.read_text() + '{"ctx": "x", "endings": ["a", "b"], "label": 7}\n')
  fake = Fake()
  with pytest.raises(BadRecord, match=r"val\.jsonl:7: 'label' must be a whole number from 0 to 1"):
    ask(data, tmp_path / "out", fake)
  assert fake.opened == 0
