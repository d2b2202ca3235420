"""COPA: prompts as in lm-evaluation-harness."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import copa
from tests.evaluation.fake import choice

ROW = {
  "premise": "The man broke his toe.",
  "question": "cause",
  "choice1": "He dropped a hammer.",
  "choice2": "He slept.",
  "label": 0,
}


def test_rows_prompts_and_scores():
  item = copa.parse(Row("a:1", ROW))
  assert copa.ask(item, []).pairs == (
    ("The man broke his toe because", "  he dropped a hammer."),
    ("The man broke his toe because", "  he slept."),
  )
  other = {"query": "x, therefore", "choices": ["a", "b"], "gold": 1}
  assert copa.parse(Row("a:1", other)) == copa.Item("x, therefore", ("a", "b"), 1)
  assert copa.score(item, [choice(-1), choice(-2)])["acc"] == 1
  with pytest.raises(BadRecord, match="'question' must be cause or effect"):
    copa.parse(Row("a:1", ROW | {"question": "why"}))
