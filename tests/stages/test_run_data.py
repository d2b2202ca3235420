"""A run's records and token lists: read once, and collected comparisons in place of the demo's."""

import types

import pytest

from instructjax.core.provenance import Source
from instructjax.data import records, sources
from instructjax.stages import collect
from instructjax.stages import run_data as run_data_module
from instructjax.stages.run_data import RunData
from tests import micro

SPECS = {kind: f"jsonl:{kind}" for kind in records.KINDS}
# A character is a token.
TOKENIZER = types.SimpleNamespace(
  bos_id=7,
  eos_id=1,
  encode=lambda text: [ord(c) for c in text],
  encode_prompt=lambda text: [ord(c) for c in text],
  render_chat=None,
)


@pytest.fixture
def loaded(monkeypatch):
  """(spec, kind, split) of each call of `sources.load`, which finds two records of each kind."""
  calls = []

  def load(spec, kind, split, **_):
    calls.append((spec, kind, split))
    return [types.SimpleNamespace(text=text, prompt=text) for text in ("ab", "c" * 99)]

  monkeypatch.setattr(sources, "load", load)
  monkeypatch.setattr(sources, "render", lambda found, *_, **__: found)
  return calls


def run_data(tmp_path, **changes) -> RunData:
  return RunData(micro.config("ppo_ptx", SPECS | changes), tmp_path, TOKENIZER)


def test_what_is_read_is_kept(loaded, tmp_path):
  data = run_data(tmp_path)
  assert data.records("prompts", "train") is data.records("prompts", "train")
  assert data.prompt_tokens("train") is data.prompt_tokens("train")
  assert loaded == [("jsonl:prompts", "prompts", "train")]
  data.prompt_tokens("test")
  run_data(tmp_path).records("prompts", "train")  # another run reads anew
  assert [split for *_, split in loaded] == ["train", "test", "train"]


def test_tokens_of_documents_and_prompts(loaded, tmp_path):
  data = run_data(tmp_path)
  assert data.document_tokens("train")[0] == [7, 97, 98]  # BOS first
  assert data.prompt_tokens("train") == [[97, 98]]  # the other has 99 tokens, 36 fit


def test_comparisons_are_those_that_were_collected(loaded, tmp_path):
  run_data(tmp_path).records("comparisons", "heldout")
  run_data(tmp_path, comparisons="demo:").records("comparisons", "heldout")
  collected = f"jsonl:{tmp_path}/collect/heldout.jsonl"
  assert loaded == [
    ("jsonl:comparisons", "comparisons", "heldout"),
    (collected, "comparisons", "all"),
  ]


def test_collected_rankings_are_read_as_they_were_written(tmp_path):
  found = [records.Ranking("p\n", ("p\na", "p\nb"), (1, 3), "ann", "elsewhere:7")]
  collect._write(tmp_path / "train.jsonl", found)
  line = '{"prompt": "p\\n", "responses": ["p\\na", "p\\nb"], "ranks": [1, 3], "labeler": "ann"}\n'
  assert (tmp_path / "train.jsonl").read_text() == line
  spec = f"jsonl:{tmp_path}/train.jsonl"
  options = dict(seed=0, validation_fraction=0.5, on_bad_record="raise")
  assert sources.load(spec, "comparisons", "all", **options) == found


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("no such version"), KeyError("a")])
def test_no_checksum_costs_a_stage_its_result(error, monkeypatch):
  def fail(spec):
    raise error

  monkeypatch.setattr(sources, "checksum", fail)
  assert run_data_module._checksum("jsonl:a").startswith("(no checksum: ")


def test_the_checksum_is_of_what_was_read(tmp_path):
  """The file changes after it was read, while a stage trains."""
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
  config = micro.config("ppo", {"prompts": f"jsonl:{path}"})
  data = RunData(config, tmp_path, types.SimpleNamespace(render_chat=None))
  before = sources.checksum(f"jsonl:{path}")
  data.records("prompts", "train")
  path.write_text('{"prompt": "c"}\n')
  assert data.source("prompts") == Source(f"jsonl:{path}", before)
  assert sources.checksum(f"jsonl:{path}") != before
