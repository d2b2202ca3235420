"""A run's records and token lists: read once, and collected comparisons in place of the demo's."""

import hashlib
import json
import types

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.core.provenance import Source
from instructjax.data import records, sources
from instructjax.stages import collect
from instructjax.stages.contents import Contents
from instructjax.stages.run_data import RunData
from tests import micro
from tests.stages import test_contents

# A character is a token.
TOKENIZER = types.SimpleNamespace(
  bos_id=7,
  eos_id=1,
  vocab_size=200,
  fingerprint="letters",
  encode=lambda text: [ord(c) for c in text],
  control_pattern=None,
  chats=types.SimpleNamespace(render_all=None, clock=None),
)


@pytest.fixture
def loaded(monkeypatch):
  """(spec, kind, split) of each call of `sources.load`, which finds two records of each kind."""
  calls = []

  def load(spec, kind, split, **_):
    calls.append((spec, kind, split))
    texts = ("ab", "c" * 99)
    return [
      types.SimpleNamespace(text=text, prompt=text, response="d", where=f"{kind}:{line}")
      for line, text in enumerate(texts, start=1)
    ]

  monkeypatch.setattr(sources, "load", load)
  monkeypatch.setattr(sources, "render", lambda found, *_, **__: found)
  return calls


def run_data(tmp_path, comparisons="", **changes) -> RunData:
  """Of files that hold nothing."""
  for kind in records.KINDS:
    (tmp_path / kind).touch()
  specs = {kind: f"jsonl:{tmp_path / kind}" for kind in records.KINDS}
  specs["comparisons"] = comparisons or specs["comparisons"]
  return of_config(micro.config("ppo_ptx", specs, **changes), tmp_path, TOKENIZER)


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
  documents = data.tokens("documents", "train").sequences()
  assert documents[0].ids == [7, 97, 98, 1]  # BOS first, EOS last
  assert data.prompt_tokens("train") == [[7, 97, 98]]  # the other has 99 tokens, 36 fit
  assert data.demonstration_tokens("train") == [([7, 97, 98], [100, 1])]


def test_a_second_run_reads_no_documents(loaded, tmp_path, caplog):
  for _ in range(2):
    data = run_data(tmp_path)
    rows = data.document_rows("train", 60)
    assert rows is data.document_rows("train", 60)
    # 101 tokens in 60 and 41, and 4 beside the latter.
    assert (rows.gather(np.arange(2)).segment_BL.max(1) == [1, 2]).all()
    data.demonstration_rows("validation", 60)
  assert loaded == [
    (f"jsonl:{tmp_path}/documents", "documents", "train"),
    (f"jsonl:{tmp_path}/demonstrations", "demonstrations", "validation"),
  ]
  told = "demonstrations: left out because too long: 1 prompt (demonstrations:2); 1 are kept"
  assert caplog.messages == [told] * 2  # in the second run too


def test_the_first_record_that_is_too_long_is_named_by_file_and_line(tmp_path, caplog):
  """Through the readers, where a record's place is known."""
  data = run_data(tmp_path)
  path = tmp_path / "demonstrations"
  lines = [{"prompt": p, "response": "d"} for p in ("ab", "c" * 99, "e" * 99)] * 20
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  data = of_config(data._config, tmp_path, TOKENIZER)
  data.tokens("demonstrations", "train")
  (told,) = caplog.messages  # all three prompts are in this split
  what = f"40 prompts (first at {path}:2)"
  assert told == f"demonstrations: left out because too long: {what}; 20 are kept"


def test_runs_may_share_a_cache(loaded, tmp_path):
  (tmp_path / "cache").mkdir()
  for name in ("one", "other"):
    data = run_data(tmp_path, data__token_cache=str(tmp_path / "cache"))
    RunData(data._config, tmp_path / name, TOKENIZER, data._contents).tokens("documents", "train")
  assert len(loaded) == 1


MARCH = types.SimpleNamespace(render_all=None, clock="2026-03-01T12:00:00")
OTHER_DAY = types.SimpleNamespace(**vars(TOKENIZER) | {"chats": MARCH})
OTHER_TOKENIZER = types.SimpleNamespace(**vars(TOKENIZER) | {"fingerprint": "other"})


@pytest.mark.parametrize(
  ("kind", "tokenizer", "changes"),
  [
    ("documents", OTHER_TOKENIZER, {}),
    ("documents", TOKENIZER, {"data__validation_fraction": 0.5}),
    ("documents", TOKENIZER, {"data__documents": "another content"}),
    ("demonstrations", OTHER_DAY, {}),
    ("demonstrations", TOKENIZER, {"data__max_response_length": 23}),
    ("demonstrations", TOKENIZER, {"data__max_prompt_length": 35}),
  ],
)
def test_what_tokens_depend_on_has_a_place_of_its_own(loaded, tmp_path, kind, tokenizer, changes):
  run_data(tmp_path).tokens(kind, "train")
  for name in records.KINDS:
    (tmp_path / name).touch()
  specs = {name: f"jsonl:{tmp_path / name}" for name in records.KINDS}
  if changes.pop("data__documents", None):
    (tmp_path / "documents").write_text("more")
  other = of_config(micro.config("ppo_ptx", specs, **changes), tmp_path, tokenizer)
  other.tokens(kind, "train")
  other.tokens(kind, "validation")
  assert len(loaded) == 3


def test_comparisons_are_those_that_were_collected(loaded, tmp_path):
  run_data(tmp_path).rankings("rm", "heldout")
  test_contents.collected(tmp_path)
  run_data(tmp_path, comparisons="demo:").rankings("rm", "heldout")
  assert loaded == [
    (f"jsonl:{tmp_path}/comparisons", "comparisons", "heldout"),
    (f"jsonl:{tmp_path}/collect/heldout.jsonl", "comparisons", "all"),
  ]


def test_a_later_round_reads_all_rounds_so_far(loaded, tmp_path):
  test_contents.collected(tmp_path)
  test_contents.collected(tmp_path, "collect_2")
  data = run_data(tmp_path, comparisons="demo:", collect__rounds=2)
  data.rankings("rm_2", "train")
  assert [spec for spec, *_ in loaded] == [
    f"jsonl:{tmp_path}/{stage}/train.jsonl" for stage in ("collect", "collect_2")
  ]


def test_collected_rankings_are_read_as_they_were_written(tmp_path):
  found = [records.Ranking("p\n", ("p\na", "p\nb"), (1, 3), "ann", "elsewhere:7")]
  collect._write(tmp_path / "train.jsonl", found)
  line = '{"prompt": "p\\n", "responses": ["p\\na", "p\\nb"], "ranks": [1, 3], "labeler": "ann"}\n'
  assert (tmp_path / "train.jsonl").read_text() == line
  spec = f"jsonl:{tmp_path}/train.jsonl"
  options = dict(seed=0, validation_fraction=0.5, on_bad_record="raise")
  assert sources.load(spec, "comparisons", "all", **options) == found


def prompts(path, *texts):
  micro.write_lines(path, [{"prompt": text} for text in texts])


def test_the_checksum_is_of_what_was_read(tmp_path):
  """The file changes after it was read, while a stage trains; another split would be of another file."""
  path = tmp_path / "prompts.jsonl"
  prompts(path, *"abcdefgh")
  config = micro.config("ppo", {"prompts": f"jsonl:{path}"})
  data = of_config(config, tmp_path, types.SimpleNamespace(chats=TOKENIZER.chats))
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  data.records("prompts", "train")
  prompts(path, *"hgfedcba")
  assert data.source("prompts") == Source(f"jsonl:{path}", f"sha256:{digest}")
  told = rf"^{path} \(data.prompts\) was changed while the run was reading it; run the same"
  with pytest.raises(UserError, match=told):
    data.records("prompts", "validation")
