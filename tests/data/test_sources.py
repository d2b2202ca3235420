import gzip
import json
import logging
import sys

import numpy as np
import pytest

from instructjax.data import sources
from instructjax.data.records import BadRecord, Demonstration, Document, Prompt, Ranking


def load(spec, kind, split="train", *, fraction=1e-9, on_bad_record="raise", seed=0):
  """The whole of a source by default: the held-out fraction is next to nothing."""
  return sources.load(
    str(spec), kind, split, seed=seed, validation_fraction=fraction, on_bad_record=on_bad_record
  )


def write(path, *lines):
  """Writes lines, dicts as JSON and bytes as they are; returns the path."""
  raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
  path.write_bytes(b"".join(line + b"\n" for line in raw))
  return path


# jsonl:


def test_jsonl_loads_every_kind_in_order(tmp_path):
  rows = [
    {"prompt": f"p{i}", "response": "r", "text": f"t{i}", "responses": ["a", "b"], "ranks": [1, 2]}
    for i in range(3)
  ]
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', *rows)}"
  assert load(spec, "documents") == [Document(f"t{i}") for i in range(3)]
  assert load(spec, "prompts") == [Prompt(f"p{i}") for i in range(3)]
  assert load(spec, "demonstrations") == [Demonstration(f"p{i}", "r") for i in range(3)]
  assert load(spec, "comparisons") == [Ranking(f"p{i}", ("a", "b"), (1, 2)) for i in range(3)]


def test_gzip_byte_order_mark_blank_lines_and_a_last_line_without_newline(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  content = '\ufeff{"text": "é"}\r\n\n  \n{"text": "b"}'
  path.write_bytes(gzip.compress(content.encode()))
  assert load(f"jsonl:{path}", "documents") == [Document("é"), Document("b")]


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
  text = "one\u2028two\u2029three\x85four\x0b"
  line = json.dumps({"text": text}, ensure_ascii=False).encode()
  assert load(f"jsonl:{write(tmp_path / 'a.jsonl', line)}", "documents") == [Document(text)]


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b'{"text": "SLUR"', r"not JSON \(Expecting ',' delimiter, column 16\)"),
    (b'{"text": "SLUR"} {}', r"not JSON \(Extra data, column 18\)"),
    (b'{"text": "SLUR\xff"}', r"not UTF-8 \(byte 15\)"),
    (b'{"text": "SLUR", "text": "b"}', "a key occurs twice"),
    (b"[" * 100_000, "nested too deeply"),
    (b'["SLUR"]', "must be a JSON object, got list"),
    (b'{"text": "SLUR\\ud800"}', "'text' is not valid Unicode"),
  ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, reason):
  path = write(tmp_path / "a.jsonl", {"text": "a"}, b"", line)
  with pytest.raises(BadRecord, match=f"^{path}:3: {reason}") as error:
    load(f"jsonl:{path}", "documents")
  assert "SLUR" not in str(error.value)


def test_bad_lines_can_be_skipped_and_are_counted_and_listed(tmp_path, caplog):
  rows = [{"text": "a"}] + [{"text": ""}, {"txet": "SLUR"}] * 4 + [{"text": "b"}]
  path = write(tmp_path / "a.jsonl", *rows)
  with caplog.at_level(logging.WARNING):
    records = load(f"jsonl:{path}", "documents", on_bad_record="skip")
  assert records == [Document("a"), Document("b")]
  assert "skipped 8 of 10 records" in caplog.text
  assert f"{path}:2: 'text' is empty; {path}:3: 'text' is missing" in caplog.text
  assert f"{path}:6" in caplog.text and f"{path}:7" not in caplog.text
  assert "SLUR" not in caplog.text


def test_unreadable_files_are_one_clear_line(tmp_path):
  with pytest.raises(ValueError, match="cannot read .*no.jsonl: No such file or directory"):
    load(f"jsonl:{tmp_path / 'no.jsonl'}", "documents")
  with pytest.raises(ValueError, match="cannot read .*: Is a directory"):
    load(f"jsonl:{tmp_path}", "documents")
  (tmp_path / "plain.jsonl.gz").write_text("{}")
  with pytest.raises(ValueError, match="cannot read .*plain.jsonl.gz: Not a gzipped file"):
    load(f"jsonl:{tmp_path / 'plain.jsonl.gz'}", "documents")
  whole = gzip.compress(b'{"text": "a"}\n' * 1000)
  (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="cannot read .*cut.jsonl.gz: Compressed file ended before"):
    load(f"jsonl:{tmp_path / 'cut.jsonl.gz'}", "documents")
  (tmp_path / "bad.jsonl.gz").write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
  with pytest.raises(ValueError, match="cannot read .*bad.jsonl.gz: Error .* while decompressing"):
    load(f"jsonl:{tmp_path / 'bad.jsonl.gz'}", "documents")


def test_a_file_without_records_is_refused(tmp_path):
  with pytest.raises(ValueError, match="data.documents='jsonl:.*' holds no records$"):
    load(f"jsonl:{write(tmp_path / 'a.jsonl', b'')}", "documents")
  path = write(tmp_path / "b.jsonl", {"text": ""})
  with pytest.raises(ValueError, match=f"holds no records but 1 bad ones: {path}:1: 'text' is emp"):
    load(f"jsonl:{path}", "documents", on_bad_record="skip")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(spec="csv:a"), "data.prompts='csv:a' must start with one of demo:, jsonl:, hh:, tfds:"),
    (dict(spec="a.jsonl"), "data.prompts='a.jsonl' must start with one of demo:"),
    (dict(kind="ranks"), "kind='ranks' must be one of documents, prompts"),
    (dict(split="dev"), "split='dev' must be train, validation, test or all"),
    (dict(on_bad_record="ignore"), "data.on_bad_record='ignore' must be raise or skip"),
  ],
)
def test_bad_arguments_name_the_good_ones(arguments, message):
  with pytest.raises(ValueError, match=message):
    load(**{"spec": "jsonl:a", "kind": "prompts", **arguments})


# The held-out split.


def test_splits_are_disjoint_complete_and_the_size_asked_for(tmp_path):
  rows = [{"prompt": f"p{i}", "response": "r"} for i in range(2000)]
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', *rows)}"
  train, validation, everything = (
    load(spec, "demonstrations", split, fraction=0.1) for split in ("train", "validation", "all")
  )
  assert set(train) | set(validation) == set(everything) and len(everything) == 2000
  assert not set(train) & set(validation)
  assert 160 < len(validation) < 240


def test_all_records_of_a_prompt_fall_on_one_side_whatever_the_order_kind_and_seed(tmp_path):
  rows = [
    {"prompt": f"p{i % 40}", "response": f"r{i}", "responses": [f"r{i}", "b"], "ranks": [1, 1]}
    for i in range(200)
  ]
  forward = f"jsonl:{write(tmp_path / 'a.jsonl', *rows)}"
  backward = f"jsonl:{write(tmp_path / 'b.jsonl', *rows[::-1])}"
  held_out = [
    {record.prompt for record in load(spec, kind, "validation", fraction=0.3, seed=seed)}
    for seed, spec in enumerate((forward, backward))
    for kind in ("prompts", "demonstrations", "comparisons")
  ]
  assert all(prompts == held_out[0] for prompts in held_out)
  assert 0 < len(held_out[0]) < 40
  train = {record.prompt for record in load(forward, "demonstrations", fraction=0.3)}
  assert not train & held_out[0]
  # A larger fraction holds out more, not others.
  assert held_out[0] < {r.prompt for r in load(forward, "prompts", "validation", fraction=0.6)}


def test_an_empty_split_is_refused(tmp_path):
  spec = f"jsonl:{write(tmp_path / 'a.jsonl', {'text': 'a'})}"
  with pytest.raises(ValueError, match="none of its 1 records fall in the validation split with"):
    load(spec, "documents", "validation")


# hh:

PROMPT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(
  "row",
  [
    {"prompt": PROMPT, "chosen": " yes", "rejected": " no"},
    {"chosen": PROMPT + " yes", "rejected": PROMPT + " no"},
  ],
)
def test_hh_gives_comparisons_demonstrations_and_prompts(tmp_path, row):
  spec = f"hh:{write(tmp_path / 'a.jsonl', {**row, 'id': 1})}"
  assert load(spec, "comparisons") == [Ranking(PROMPT, (" yes", " no"), (1, 2))]
  assert load(spec, "demonstrations") == [Demonstration(PROMPT, " yes")]
  assert load(spec, "prompts") == [Prompt(PROMPT)]
  with pytest.raises(ValueError, match="hh: holds dialogues only"):
    load(spec, "documents")


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"chosen": "a"}, "needs chosen and rejected"),
    ([], "needs chosen and rejected"),
    ({"chosen": "SLUR", "rejected": PROMPT}, "'chosen' must be a dialogue with an 'Assistant:' tu"),
    ({"chosen": PROMPT, "rejected": [PROMPT]}, "'rejected' must be a dialogue"),
    ({"chosen": PROMPT + " a", "rejected": "x" + PROMPT + " b"}, "differ before their last answer"),
    ({"prompt": " ", "chosen": " a", "rejected": " b"}, "'prompt' is empty"),
  ],
)
def test_bad_dialogues_are_refused(tmp_path, row, reason):
  path = write(tmp_path / "a.jsonl", row)
  with pytest.raises(BadRecord, match=f"^{path}:1: .*{reason}") as error:
    load(f"hh:{path}", "comparisons")
  assert "SLUR" not in str(error.value)


# tfds:


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  """Two builders written as array_record files: `rankings` has its own validation split."""
  import tensorflow_datasets as tfds

  folder = tmp_path_factory.mktemp("tfds")

  def define(splits):
    def info(self):
      text, numbers = tfds.features.Text(), tfds.features.Sequence(np.int32)
      features = {"prompt": text, "responses": tfds.features.Sequence(text), "ranks": numbers}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def examples(split, count):
      for i in range(count):
        yield i, {"prompt": f"{split} é {i}", "responses": ["a", "b"], "ranks": [2, 1]}

    return {
      "VERSION": tfds.core.Version("1.2.0"),
      "_info": info,
      "_split_generators": lambda self, _: {k: examples(k, n) for k, n in splits.items()},
      "_generate_examples": None,
    }

  with tfds.core.registered.skip_registration():  # the files alone must do
    for name, splits in (("rankings", {"train": 6, "validation": 2}), ("unsplit", {"train": 40})):
      builder = type(name.title(), (tfds.core.GeneratorBasedBuilder,), define(splits))
      builder.name = name
      builder(data_dir=folder, file_format="array_record").download_and_prepare()
  return folder


def test_tfds_reads_a_builder_without_tensorflow(tfds_dir):
  spec = f"tfds:rankings?data_dir={tfds_dir}"
  train, validation = load(spec, "comparisons"), load(spec, "comparisons", "validation")
  assert {record.prompt for record in train} == {f"train é {i}" for i in range(6)}
  assert {record.prompt for record in validation} == {f"validation é {i}" for i in range(2)}
  assert train[0] == Ranking(train[0].prompt, ("a", "b"), (2, 1))
  assert "tensorflow" not in sys.modules


def test_tfds_holds_out_by_hash_where_there_is_no_validation_split(tfds_dir):
  spec = f"tfds:unsplit:1.2.0?data_dir={tfds_dir}"
  train = load(spec, "prompts", fraction=0.3)
  validation = load(spec, "prompts", "validation", fraction=0.3)
  assert len(set(train) | set(validation)) == len(train) + len(validation) == 40
  assert len(load(f"tfds:unsplit:train[:25%]?data_dir={tfds_dir}", "prompts")) == 10


def test_tfds_errors_name_the_source(tfds_dir):
  with pytest.raises(ValueError, match="data.prompts='tfds:nothing.*cannot be read: .*not found"):
    load(f"tfds:nothing?data_dir={tfds_dir}", "prompts")
  with pytest.raises(ValueError, match="cannot be read: Unknown split 'test'"):
    load(f"tfds:unsplit:test?data_dir={tfds_dir}", "prompts")
  with pytest.raises(ValueError, match="must be tfds:NAME"):
    load("tfds:", "prompts")
  with pytest.raises(BadRecord, match="^tfds:unsplit:train:0: 'text' is missing"):
    load(f"tfds:unsplit?data_dir={tfds_dir}", "documents")
