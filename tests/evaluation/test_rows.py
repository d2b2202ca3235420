"""Where the rows of a task are found, and how files are read."""

import dataclasses
import gzip
import json

import pytest

from instructjax.core.errors import UserError
from instructjax.data import readers
from instructjax.data.messages import BadRecord
from instructjax.evaluation import rows, tasks
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import hellaswag
from tests.evaluation.tasks import (
  test_arc_easy,
  test_drop,
  test_quac,
  test_squad_v2,
  test_truthful_qa_mc,
)

TASK = dataclasses.replace(hellaswag.TASK, files=("toy*/val*.jsonl", "toy.csv"), tfds=("", ""))


def data(*values):
  return rows.parse_data([str(value) for value in values], ["toy", "other"])


def write(path, text="{}\n"):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def found(given, *, train=False):
  return rows.find(given, "toy", TASK, train=train)


def test_a_file_is_found_by_the_end_of_its_path(tmp_path):
  path = tmp_path / "sets" / "Toy_v1" / "val.dev.jsonl.gz"
  path.parent.mkdir(parents=True)
  path.write_bytes(gzip.compress(b'{"a": 1}\n'))
  assert found(data(tmp_path)) == found(data(path.parent)) == str(path)
  assert [row.value for row in rows.read(str(path))] == [{"a": 1}]


def test_the_first_pattern_that_fits_wins_and_two_files_are_one_too_many(tmp_path):
  write(tmp_path / "toy.csv")
  first = write(tmp_path / "toy" / "val.jsonl")
  assert found(data(tmp_path)) == str(first)
  write(tmp_path / "toy2" / "val.jsonl")
  with pytest.raises(UserError, match="toy: 2 files below .* may be its data .* --data=toy=FILE"):
    found(data(tmp_path))
  assert found(data(tmp_path, f"toy={first}")) == str(first)


def test_no_file_is_none_and_the_training_split_has_a_name_of_its_own(tmp_path):
  assert found(data(tmp_path)) is None
  assert found(data(tmp_path, "toy.train=tfds:a:train"), train=True) == "tfds:a:train"


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("nowhere", "--data=nowhere must be a folder, tfds:, or TASK=FILE with one of the tasks toy"),
    ("toy=", "--data=toy= must name a file, or a spec such as tfds:NAME:SPLIT"),
    ("thing=a.jsonl", "must be a folder, tfds:, or TASK=FILE"),
  ],
)
def test_what_data_cannot_be(value, message):
  with pytest.raises(UserError, match=message):
    data(value)
  with pytest.raises(UserError, match="--data names toy twice"):
    data("toy=a", "toy=b")


def test_a_table_is_never_cut(tmp_path, monkeypatch):
  path = tmp_path / "a.csv"
  path.write_text("text,label\n" + "x,1\n" * 9)
  monkeypatch.setattr(rows, "_TABLE_BYTES", len(path.read_bytes()))
  assert len(list(rows.read(str(path)))) == 9
  monkeypatch.setattr(rows, "_TABLE_BYTES", len(path.read_bytes()) - 1)
  with pytest.raises(UserError, match="a.csv holds more than the"):
    list(rows.read(str(path)))


def test_tables_have_columns_by_name(tmp_path):
  path = write(tmp_path / "a.csv", 'q,a\n"one, two","line\nbreak"\nthree,four\n')
  read = list(rows.read(str(path)))
  assert [row.value for row in read] == [
    {"q": "one, two", "a": "line\nbreak"},
    {"q": "three", "a": "four"},
  ]
  assert read[1].where == f"{path}:4"
  # In a TSV file a quote is a letter.
  path = write(tmp_path / "a.tsv", 'text\tlabel\n"quoted\t1\n')
  assert next(rows.read(str(path))).value == {"text": '"quoted', "label": "1"}


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.tsv", "x\ty\n1\n", r"a\.tsv:2: 1 columns, and the first line names 2"),
    ("a.csv", 'x,y\n"1"2,3\n', r"a\.csv:2: not CSV"),
    ("a.jsonl", '{"a": 1}\n{"a"\n', r"a\.jsonl:2: not JSON"),
  ],
)
def test_a_damaged_row_is_named(tmp_path, name, text, message):
  path = write(tmp_path / name, text)
  with pytest.raises(BadRecord, match=message):
    list(rows.read(str(path)))


def test_parquet_has_all_its_columns(tmp_path):
  import pyarrow
  import pyarrow.parquet

  path = tmp_path / "val.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"odd": ["a"], "n": [3]}), path)
  assert [row.value for row in rows.read(str(path))] == [{"odd": "a", "n": 3}]
  assert rows.files(str(path)) == [str(path)]


def test_json_over_several_lines_is_one_row(tmp_path):
  path = write(tmp_path / "a.json", json.dumps({"data": [1, 2]}, indent=1))
  assert [row.value for row in rows.read(str(path))] == [{"data": [1, 2]}]


def tables(value):
  """What a parquet file makes of a value: lists in an object become objects in a list."""
  return readers._objects(value)


@pytest.mark.parametrize(
  ("task", "row", "column"),
  [
    ("squad_v2", test_squad_v2.HUB[0], "answers"),
    ("squad_v2", test_squad_v2.HUB[1], "answers"),  # both lists are empty
    ("quac", test_quac.HUB, "answers"),
    ("arc_easy", test_arc_easy.HUB, "choices"),
    ("truthful_qa_mc", test_truthful_qa_mc.HUB, "mc1_targets"),
    ("drop", test_drop.HUB, "answers_spans"),
  ],
)
def test_tables_and_json_lines_of_the_hub_are_the_same_items(task, row, column):
  read = tasks.found()[task].read
  turned = row | {column: tables(row[column])}
  assert turned != row
  assert list(read([Row("a:1", turned)])) == list(read([Row("a:1", row)]))
