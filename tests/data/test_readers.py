import gzip
import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.data.records import (
  BadRecord,
  Chat,
  Demonstration,
  Document,
  Prompt,
  Ranking,
)


def load(spec, kind, split="train", *, fraction=1e-9, on_bad_record="raise"):
  """The whole of a source by default: the held-out fraction is next to nothing."""
  return sources.load(
    str(spec), kind, split, seed=0, validation_fraction=fraction, on_bad_record=on_bad_record
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
    (b'{"text": ' + b"9" * 5000 + b"}", r"not JSON \(a number of too many digits\)"),
    (b'["SLUR"]', "must be a JSON object, got list"),
    (b'{"text": "SLUR\\ud800"}', "'text' is not valid Unicode"),
  ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, reason):
  path = write(tmp_path / "a.jsonl", {"text": "a"}, b"", line)
  with pytest.raises(BadRecord, match=f"^{path}:3: {reason}") as error:
    load(f"jsonl:{path}", "documents")
  assert "SLUR" not in str(error.value)


def test_globs_home_and_folders(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in "ba":
    write(tmp_path / f"{name}.jsonl", {"text": name})
  assert load(f"jsonl:{tmp_path}/*.jsonl", "documents") == [Document("a"), Document("b")]
  assert load(f"jsonl:{tmp_path}/b.jsonl", "documents") == [Document("b")]
  pq.write_table(pa.table({"text": ["c"]}), tmp_path / "c.parquet")
  assert (
    load(f"parquet:{tmp_path}/c.parquet", "documents")
    == load(f"parquet:{tmp_path}", "documents")
    == [Document("c")]
  )
  assert sources.files(f"jsonl:{tmp_path}/*.jsonl") == [
    f"{tmp_path}/a.jsonl",
    f"{tmp_path}/b.jsonl",
  ]
  assert sources.files(f"jsonl:{tmp_path}/a.jsonl?text=text") == [f"{tmp_path}/a.jsonl"]
  with pytest.raises(UserError, match=f"Is a directory; name its files, as in {tmp_path}/.*jsonl$"):
    load(f"jsonl:{tmp_path}/", "documents")
  with pytest.raises(UserError, match=f"data.documents='jsonl:{tmp_path}/no[*]' finds no file"):
    load(f"jsonl:{tmp_path}/no*", "documents")
  with pytest.raises(
    UserError, match="data.documents='jsonl:' must name what to read after jsonl:"
  ):
    load("jsonl:", "documents")


def test_which_files_a_source_reads_and_how(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("b.jsonl", "a.jsonl", "p/2.parquet", "p/1.parquet", "d/train/x.arrow"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  for spec, files, how in (
    ("jsonl:a.jsonl", ["a.jsonl"], "jsonl:"),
    ("jsonl:?.jsonl?format=own", ["a.jsonl", "b.jsonl"], "jsonl:?format=own"),
    ("hh:b.jsonl", ["b.jsonl"], "hh:"),
    ("parquet:p?text=t", ["p/1.parquet", "p/2.parquet"], "parquet:?text=t"),
    ("datasets:d:train", ["d/train/x.arrow"], "datasets::train"),
  ):
    assert (sources.files(spec), sources.how(spec)) == (files, how)
  assert sources.how("tfds:x:train?data_dir=d&text=t") == "tfds:x:train?&text=t"
  assert sources.files("demo:") == [] and sources.how("demo:")


def test_unreadable_files_are_one_clear_line(tmp_path):
  with pytest.raises(ValueError, match="no.jsonl cannot be read: No such file or directory"):
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
    ([], "must be a JSON object, got list"),
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


# parquet: and datasets:

CHATS = [
  {
    "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}],
    "image": b"\xff",  # a column that no record is made of is not decoded
  }
  for i in range(5)
]
DEMONSTRATIONS = [Demonstration(Chat((("user", f"q{i}"),)), f"a{i}") for i in range(5)]


def write_parquet(path, rows, schema=None):
  pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)
  return path


def test_parquet_reads_a_file_a_folder_and_a_glob_in_order_of_name(tmp_path):
  second = write_parquet(tmp_path / "b.parquet", CHATS[3:])
  write_parquet(tmp_path / "a.parquet", CHATS[:3])
  (tmp_path / "README.md").write_text("not data")
  assert load(f"parquet:{second}", "demonstrations") == DEMONSTRATIONS[3:]
  assert load(f"parquet:{tmp_path}", "demonstrations") == DEMONSTRATIONS
  assert load(f"parquet:{tmp_path}/[ab]*", "demonstrations") == DEMONSTRATIONS


def test_a_null_cell_is_an_absent_key_and_inner_nulls_stay(tmp_path):
  pairs = [{"a": 0, "b": 1, "winner": None}]
  rows = [
    {
      "prompt": "p",
      "responses": ["a", "b"],
      "comparisons": pairs,
      "chosen": None,
      "rejected": None,
    },
    {"prompt": "p", "responses": None, "comparisons": None, "chosen": "c", "rejected": "r"},
  ]
  rankings = load(f"parquet:{write_parquet(tmp_path / 'a.parquet', rows)}", "comparisons")
  assert rankings == [Ranking("p", ("a", "b"), (1, 1)), Ranking("p", ("c", "r"), (1, 2))]


def test_parquet_with_nested_columns(tmp_path):
  rows = [{"turns": [{"by": {"name": "a"}, "said": "p"}, {"by": None, "said": "r"}], "n": 1}]
  options = "?prompt=turns.0.said&response=turns.1.said"
  path = write_parquet(tmp_path / "a.parquet", rows)
  assert load(f"parquet:{path}{options}", "demonstrations") == [Demonstration("p", "r")]
  messages = pa.large_list(
    pa.struct({"role": pa.dictionary(pa.int8(), pa.string()), "content": pa.large_string()})
  )
  table = pa.table({"messages": pa.array([row["messages"] for row in CHATS], messages)})
  pq.write_table(table, path)
  assert load(f"parquet:{path}", "demonstrations") == DEMONSTRATIONS


def test_parquet_text_may_be_large_binary_or_categorical(tmp_path):
  texts = ["é", "b", "é"]
  for number, kind in enumerate(
    (pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string()))
  ):
    table = pa.table({"text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / f"{number}.parquet")
  assert load(f"parquet:{tmp_path}", "documents") == [Document(text) for text in texts] * 3


@pytest.mark.parametrize(
  ("column", "reason"),
  [
    (pa.array(["a", None]), r"'text' is missing \(keys found: none\)"),
    (pa.array([1, 2]), "'text' must be a string, got int"),
    (pa.array([b"a", b"SLUR\xff"]), r"not UTF-8 \(byte 5\)"),
    (pa.array([b"a", b"SLUR\xff"]).view(pa.string()), r"not UTF-8 \(byte 5\)"),
    (pa.array([2**60]).cast(pa.timestamp("ms")), r"a value that Python cannot \(\w+Error\)"),
  ],
)
def test_a_bad_cell_is_named_by_file_and_row_from_0_and_can_be_skipped(tmp_path, column, reason):
  path = tmp_path / "a.parquet"
  pq.write_table(pa.table({"text": column}), path)
  write_parquet(tmp_path / "b.parquet", [{"text": "good"}])
  bad = f"{path}:[01]: .*{reason}"
  with pytest.raises(BadRecord, match=bad) as error:
    load(f"parquet:{path}", "documents")
  assert "SLUR" not in str(error.value)
  assert load(f"parquet:{tmp_path}", "documents", on_bad_record="skip")[-1] == Document("good")


def test_unreadable_parquet_is_one_clear_line(tmp_path):
  path = tmp_path / "a.parquet"
  with pytest.raises(ValueError, match=f"{path} cannot be read: No such file") as error:
    load(f"parquet:{path}", "prompts")
  assert "\n" not in str(error.value)
  path.write_text('{"prompt": "not parquet"}')
  with pytest.raises(ValueError, match=f"cannot read {path}: .*not a parquet file"):
    load(f"parquet:{path}", "prompts")
  whole = write_parquet(path, CHATS).read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match=f"cannot read {path}: .*not a parquet file"):
    load(f"parquet:{path}", "prompts")
  path.write_bytes(whole[:4] + b"\xff" * 100 + whole[104:])  # a page of the first row group
  with pytest.raises(ValueError, match=f"cannot read {path}: "):
    load(f"parquet:{path}", "prompts")
  with pytest.raises(ValueError, match="data.prompts='parquet:.*[*]' finds no file that ends in"):
    load(f"parquet:{tmp_path}/no*", "prompts")
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="finds no file that ends in .parquet"):
    load(f"parquet:{tmp_path}/empty", "prompts")
  path.write_bytes(whole)
  with pytest.raises(ValueError, match=r"no column of documents \(text\), only messages, image"):
    load(f"parquet:{path}", "documents", on_bad_record="skip")


@pytest.fixture(scope="module")
def datasets_dir(tmp_path_factory):
  """`one` and `a:b` (a Dataset with a format of its own), `all` (every split) and `tested` (train, test)."""
  reason = "the optional package datasets is absent: pip install 'instructjax[datasets]'"
  datasets = pytest.importorskip("datasets", reason=reason)
  datasets.disable_progress_bars()
  folder, make = tmp_path_factory.mktemp("datasets"), datasets.Dataset.from_list
  one = make(CHATS[::-1]).select(range(4, -1, -1))
  one.set_format("numpy")
  one.save_to_disk(folder / "one")
  one.save_to_disk(folder / "a:b")
  splits = {"train": make(CHATS[:2]), "test": make(CHATS[2:3])}
  datasets.DatasetDict(splits).save_to_disk(folder / "tested")
  datasets.DatasetDict(splits | {"validation": make(CHATS[3:])}).save_to_disk(folder / "all")
  return folder


@pytest.mark.parametrize(
  ("path", "split", "rows"),
  [
    ("one", "train", range(5)),
    ("all", "train", range(2)),
    ("all", "validation", range(3, 5)),
    ("all", "test", range(3, 5)),
    ("all", "all", range(5)),
    ("all:test", "train", range(2, 3)),
    ("a:b", "train", range(5)),
    ("tested", "validation", range(2, 3)),
  ],
)
def test_datasets_and_their_splits(datasets_dir, path, split, rows):
  records = load(f"datasets:{datasets_dir}/{path}", "demonstrations", split)
  assert records == [DEMONSTRATIONS[row] for row in rows]


def test_datasets_without_a_split_of_their_own_hold_out_by_hash(datasets_dir):
  for path in ("one", "all:train"):
    spec = f"datasets:{datasets_dir}/{path}"
    parts = [load(spec, "prompts", split, fraction=0.5) for split in ("train", "validation")]
    assert all(parts) and sum(map(len, parts)) == len(load(spec, "prompts", "all"))


@pytest.mark.parametrize(
  ("path", "kind", "message"),
  [
    ("no", "prompts", "data.prompts='datasets:.*no' cannot be read: Directory .*no not found"),
    (".", "prompts", "cannot be read: Directory .* is neither"),
    ("one:train", "prompts", "must be datasets:.*one: it has no splits"),
    ("all:dev", "prompts", r"no split 'dev': name one .*all:train \(it has train, test, valid"),
    ("one", "documents", r"one: has no column of documents \(text\), only messages, image"),
    ("all", "comparisons", "all/train: has no column of comparisons"),
  ],
)
def test_datasets_errors_name_the_folder(datasets_dir, path, kind, message):
  with pytest.raises(ValueError, match=message) as error:
    load(f"datasets:{datasets_dir}/{path}", kind)
  assert "\n" not in str(error.value)


def test_without_the_datasets_package_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
  with pytest.raises(ValueError, match=r"^data.prompts='datasets:a' .*'instructjax\[datasets\]'$"):
    load("datasets:a", "prompts")


class FakeDataset:
  """What the reader uses of `datasets.Dataset`."""

  def __init__(self, rows, cache_files=()):
    self._table = pa.Table.from_pylist(rows)
    self.column_names, self.cache_files = self._table.column_names, list(cache_files)

  def select_columns(self, names):
    return FakeDataset(self._table.select(names).to_pylist())

  def with_format(self, name):
    assert name == "arrow"
    return self

  def iter(self, batch_size):
    return iter([self._table.slice(start, batch_size) for start in range(0, 5, batch_size)])


@pytest.fixture
def hub(monkeypatch, tmp_path):
  """Stands for `datasets` with one data set on its hub, `org/chats`; returns what was asked of it."""
  asked = []

  def load_dataset(name, config):
    asked.append((name, config))
    if name != "org/chats":
      raise ConnectionError(f"Couldn't reach {name!r} on the Hub\n(OfflineModeIsEnabled)")
    files = [{"filename": str(write(tmp_path / "cached.arrow", b"content"))}]
    return {"train": FakeDataset(CHATS[:4], files), "test": FakeDataset(CHATS[4:], files)}

  def load_from_disk(path):
    asked.append(path)
    return FakeDataset(CHATS[:1])

  fake = types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk)
  monkeypatch.setitem(sys.modules, "datasets", fake)
  monkeypatch.chdir(tmp_path)
  return asked


def test_a_data_set_of_the_hub_is_read_where_there_is_no_such_folder(hub, tmp_path):
  assert load("datasets:org/chats", "demonstrations") == DEMONSTRATIONS[:4]
  assert load("datasets:org/chats", "demonstrations", "validation") == DEMONSTRATIONS[4:]
  assert load("datasets:org/chats/small:test", "demonstrations") == DEMONSTRATIONS[4:]
  assert hub == [("org/chats", None)] * 2 + [("org/chats", "small")]
  assert len(sources.files("datasets:org/chats")) > 0
  (tmp_path / "org" / "chats").mkdir(parents=True)
  assert load("datasets:org/chats", "demonstrations") == DEMONSTRATIONS[:1]
  assert hub[-1] == "org/chats"


@pytest.mark.parametrize(
  ("name", "message"),
  [
    (
      "org/nothing",
      "is no folder, and cannot be read from Hugging Face's hub: Couldn't reach 'org/",
    ),
    (
      "nothing",
      "is no folder, and cannot be read from Hugging Face's hub: Couldn't reach 'nothing'",
    ),
    ("org/chats:dev", r"has no split 'dev': name one .*org/chats:train \(it has train, test\)"),
  ],
)
def test_without_a_network_one_line_says_so(hub, name, message):
  with pytest.raises(UserError, match=f"^data.prompts='datasets:{name}' {message}") as error:
    load(f"datasets:{name}", "prompts")
  assert "\n" not in str(error.value)


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
      features["messages"] = tfds.features.Sequence({"role": text, "content": text})
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def examples(split, count):
      for i in range(count):
        messages = [{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant")]
        row = {"prompt": f"{split} é {i}", "responses": ["a", "b"], "ranks": [2, 1]}
        yield i, {**row, "messages": messages}

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


def test_tfds_messages_are_put_together_from_its_columns(tfds_dir):
  demonstrations = load(f"tfds:rankings?data_dir={tfds_dir}", "demonstrations")
  numbered = {Demonstration(Chat((("user", f"user {i}"),)), f"assistant {i}") for i in range(6)}
  assert set(demonstrations) == numbered


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
  with pytest.raises(ValueError, match="must name what to read after tfds:"):
    load("tfds:", "prompts")
  with pytest.raises(BadRecord, match="^tfds:unsplit:train:0: 'text' is missing"):
    load(f"tfds:unsplit?data_dir={tfds_dir}", "documents")
