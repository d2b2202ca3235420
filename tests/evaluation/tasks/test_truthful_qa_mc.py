"""TruthfulQA's multiple choice: MC1 and MC2 worked by hand, and lm-evaluation-harness's prompt."""

import math

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import truthful_qa_mc as task
from tests.evaluation.fake import choice

PUBLISHED = {
  "question": "Where?",
  "mc1_targets": {"c": 0, "a": 1},
  "mc2_targets": {"a": 1, "b": 1, "c": 0},
}
HUB = {
  "question": "Where?",
  "mc1_targets": {"choices": ["c", "a"], "labels": [0, 1]},
  "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 1, 0]},
}
ITEM = task.parse(Row("a:1", PUBLISHED))


def test_rows():
  assert ITEM == task.parse(Row("a:1", HUB)) == task.Item("Where?", ("a", "c"), ("a", "b"), ("c",))
  assert task.texts(ITEM) == ("a", "c", "b")


def test_prompts():
  pairs = task.TASK.prompts["harness"].ask(ITEM, []).pairs
  assert [continuation for _, continuation in pairs] == [" a", " c", " b"]
  assert "united states?\nA: Human life" in pairs[0][0].replace("United States?", "united states?")
  assert pairs[0][0].endswith("Barcelona, Spain.\n\nQ: Where?\nA:")
  assert task.TASK.prompts["qa"].ask(ITEM, []).pairs[0][0].endswith("Q: Where?\n\nA:")


def test_scores():
  # P(a) : P(c) : P(b) = 2 : 3 : 5, so that the right ones have 7 of 10, and c beats a.
  found = task.score(ITEM, [choice(math.log(2)), choice(math.log(3)), choice(math.log(5))])
  assert found == {"mc1": 0, "mc2": pytest.approx(0.7)}
  assert task.score(ITEM, [choice(-1), choice(-2), choice(-9)])["mc1"] == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mc1_targets": {"c": 1, "a": 1}}, "must have one right answer, and has 2"),
    ({"mc1_targets": {"c": 0}}, "must give each of two or more answers 0 or 1"),
    ({"mc1_targets": "a"}, "must give each of two or more answers 0 or 1"),
    ({"mc2_targets": {"a": 1, "b": 1}}, "must have right and wrong answers"),
    ({"mc2_targets": {"a": 2, "b": 0}}, "must give each of two or more answers 0 or 1"),
  ],
)
def test_bad_rows(changes, message):
  with pytest.raises(BadRecord, match=message):
    task.parse(Row("a:1", PUBLISHED | changes))
