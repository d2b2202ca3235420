"""Labelled texts: how they are read and divided, and the rankings made of them."""

import json
import re

import pytest

from instructjax.core.errors import UserError
from instructjax.data import records
from instructjax.evaluation import labelled
from instructjax.evaluation.labelled import Labelled
from tests.micro import write_lines


@pytest.fixture
def write(tmp_path):
  def one(*rows):
    write_lines(tmp_path / "rows.jsonl", list(rows))
    return str(tmp_path / "rows.jsonl")

  return one


def test_several_texts_of_a_row_are_read_by_their_keys(write):
  spec = write(
    {"prompt": {"text": "a ", "toxicity": 0.25}, "next": "b", "bad": True},
    {"prompt": {"text": "c", "toxicity": None}, "next": "d", "bad": " no"},
  )
  found = labelled.read(spec, [("prompt.text", "prompt.toxicity"), ("next", "bad")], "")
  assert [(one.text, one.value) for one in found] == [("a", 0.25), ("b", 1.0), ("d", 0.0)]


def test_labels_of_a_table_are_numbers_too(tmp_path):
  (tmp_path / "rows.csv").write_text("text,label\na,1\nb,0.25\nc,\n")
  found = labelled.read(str(tmp_path / "rows.csv"), [("text", "label")], "")
  assert [(one.text, one.value) for one in found] == [("a", 1.0), ("b", 0.25)]


@pytest.mark.parametrize(
  ("row", "says"),
  [
    ({"text": "a"}, "rows.jsonl:1: there is no 'label'"),
    ({"text": " ", "label": 1}, "rows.jsonl:1: text must be text"),
    ({"text": "a", "label": "maybe"}, "rows.jsonl:1: label must be a number"),
    ({"text": "a", "label": "nan"}, "rows.jsonl:1: label must be a number"),
    ({"text": "a", "label": 10**400}, "rows.jsonl:1: label must be a number"),
    ({"text": "a", "label": [1]}, "rows.jsonl:1: label must be a number"),
  ],
)
def test_a_bad_row_is_named(write, row, says):
  with pytest.raises(UserError, match=re.escape(says)):
    labelled.read(write(row), [("text", "label")], "")


def test_a_group_is_never_divided(write):
  rows = [{"text": f"Q: {n}?\nA: {a}", "label": a} for n in range(60) for a in (0, 1)]
  found = labelled.read(write(*rows), [("text", "label")], "^Q: .*")
  parts = [{one.part for one in found if one.group == f"Q: {n}?"} for n in range(60)]
  assert all(len(part) == 1 for part in parts)
  assert {next(iter(part)) for part in parts} == {"train", "calibration", "test"}
  with pytest.raises(UserError, match="no regular expression"):
    labelled.read(write(*rows), [("text", "label")], "(")


def test_shares_of_the_parts():
  parts = [Labelled("", 0, str(n)).part for n in range(3000)]
  shares = [parts.count(part) / 3000 for part in ("train", "calibration", "test")]
  assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_rankings_are_records_in_which_more_of_it_is_better(tmp_path):
  texts = [Labelled(f"text {n}", n % 3, "") for n in range(20)]
  labelled.write(texts, tmp_path, passes=2, seed=0)
  lines = (tmp_path / "comparisons.jsonl").read_text().splitlines()
  seen = []
  for line in lines:
    ranking = records.parse_record("comparisons", json.loads(line), "here")
    seen += ranking.responses
    values = [int(one.split()[1]) % 3 for one in ranking.responses]
    best = [value for value, rank in zip(values, ranking.ranks) if rank == 1]
    assert {*best} == {max(values)}
  assert max(map(seen.count, {*seen})) == 2 and len({*seen}) == 20
  first = (tmp_path / "documents.jsonl").read_text().splitlines()[0]
  assert json.loads(first) == {"text": "Text 0: text 0"}
  labelled.write(texts, tmp_path, passes=2, seed=0)
  assert (tmp_path / "comparisons.jsonl").read_text().splitlines() == lines
