"""What a row must have: each mistake names the file, the line and the key."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row, each


def row(value):
  return Row("a.jsonl:7", value)


def test_values_are_found_under_any_of_their_names():
  found = row({"query": "q", "label": "2", "endings": ["a", "b"], "answer": True})
  assert found.text("question", "query") == "q"
  assert found.label(3, "label") == 2  # HellaSwag's test split of the hub writes it as text
  assert found.label(2, "answer") == 1  # BoolQ's is a truth value
  assert found.texts("endings") == ["a", "b"] and found.choices("endings") == ("a", "b")
  assert list(each(lambda r: r.text("query"))([found])) == ["q"]


@pytest.mark.parametrize(
  ("value", "read", "message"),
  [
    ([], lambda r: r.text("a"), "must be an object, got"),
    ({}, lambda r: r.text("a", "b"), "lacks 'a' or 'b'"),
    ({"a": 1}, lambda r: r.text("a"), "'a' must be a text"),
    ({"a": " "}, lambda r: r.text("a"), "'a' is empty"),
    ({"a": -1}, lambda r: r.label(2, "a"), "'a' must be a whole number from 0 to 1"),
    ({"a": "x"}, lambda r: r.label(2, "a"), "'a' must be a whole number from 0 to 1"),
    ({"a": "²"}, lambda r: r.label(2, "a"), "'a' must be a whole number from 0 to 1"),
    ({"a": 2}, lambda r: r.label(2, "a"), "'a' must be a whole number from 0 to 1, got 2"),
    ({"a": 0.5}, lambda r: r.label(2, "a"), "'a' must be a whole number from 0 to 1"),
    ({"a": "x"}, lambda r: r.texts("a"), "'a' must be a list of texts"),
    ({"a": ["x", 1]}, lambda r: r.texts("a"), "'a' must be a list of texts"),
    ({"a": ["x"]}, lambda r: r.choices("a"), "'a' must hold at least 2 texts"),
    ({"a": ["x", " "]}, lambda r: r.choices("a"), "'a' holds an empty text"),
    ({"a": 1}, lambda r: r.inners("a"), "'a' must be a list"),
    ({"a": {"b": 1}}, lambda r: r.column("a", "b"), "a: 'b' must be a list"),
    ({"a": [{"c": 1}]}, lambda r: r.column("a", "b"), "a[0]: lacks 'b'"),
  ],
)
def test_a_mistake_names_the_line_and_the_key(value, read, message):
  with pytest.raises(BadRecord) as error:
    read(row(value))
  assert str(error.value).startswith("a.jsonl:7: ") and message in str(error.value)


def test_a_part_of_a_row_says_where_it_is():
  with pytest.raises(BadRecord, match=r"a\.jsonl:7: data\[3\]: lacks 'b'"):
    row({}).inner({}, "data[3]").any("b")
