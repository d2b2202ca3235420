"""A run's records and token lists: read once, and collected comparisons in place of the demo's."""

import hashlib
import types

import pytest

from instructjax.core.errors import UserError
from instructjax.core.provenance import Source
from instructjax.data import records, sources
from instructjax.stages.contents import Contents
from instructjax.stages.run_data import RunData
from tests import micro
from tests.stages import test_contents

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
  """Of files that hold nothing."""
  for kind in records.KINDS:
    (tmp_path / kind).touch()
  specs = {kind: f"jsonl:{tmp_path / kind}" for kind in records.KINDS} | changes
  return of_config(micro.config("ppo_ptx", specs), tmp_path, TOKENIZER)


def of_config(config, workdir, tokenizer) -> RunData:
  return RunData(config, workdir, tokenizer, Contents(config, workdir))


def test_what_is_read_is_kept(loaded, tmp_path):
  data = run_data(tmp_path)
  assert data.records("prompts", "train") is data.records("prompts", "train")
  assert data.prompt_tokens("train") is data.prompt_tokens("train")
  assert loaded == [(f"jsonl:{tmp_path}/prompts", "prompts", "train")]
  data.prompt_tokens("test")
  run_data(tmp_path).records("prompts", "train")  # another run reads anew
  assert [split for *_, split in loaded] == ["train", "test", "train"]


def test_tokens_of_documents_and_prompts(loaded, tmp_path):
  data = run_data(tmp_path)
  assert data.document_tokens("train")[0] == [7, 97, 98]  # BOS first
  assert data.prompt_tokens("train") == [[97, 98]]  # the other has 99 tokens, 36 fit


def test_comparisons_are_those_that_were_collected(loaded, tmp_path):
  run_data(tmp_path).records("comparisons", "heldout")
  test_contents.collected(tmp_path)
  run_data(tmp_path, comparisons="demo:").records("comparisons", "heldout")
  assert loaded == [
    (f"jsonl:{tmp_path}/comparisons", "comparisons", "heldout"),
    (f"jsonl:{tmp_path}/collect/heldout.jsonl", "comparisons", "all"),
  ]


def prompts(path, *texts):
  micro.write_lines(path, [{"prompt": text} for text in texts])


def test_the_checksum_is_of_what_was_read(tmp_path):
  """The file changes after it was read, while a stage trains; another split would be of another file."""
  path = tmp_path / "prompts.jsonl"
  prompts(path, *"abcdefgh")
  config = micro.config("ppo", {"prompts": f"jsonl:{path}"})
  data = of_config(config, tmp_path, types.SimpleNamespace(render_chat=None))
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  data.records("prompts", "train")
  prompts(path, *"hgfedcba")
  assert data.source("prompts") == Source(f"jsonl:{path}", f"sha256:{digest}")
  told = rf"^{path} \(data.prompts\) was changed while the run was reading it; run the same"
  with pytest.raises(UserError, match=told):
    data.records("prompts", "validation")
