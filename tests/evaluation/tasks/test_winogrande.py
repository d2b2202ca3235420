"""Winogrande: the text after the gap, with each name before it, as in lm-evaluation-harness."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import winogrande
from tests.evaluation.fake import choice

ROW = {
  "sentence": "Sarah met Maria so _ won.",
  "option1": "Sarah",
  "option2": "Maria",
  "answer": "2",
}


def test_rows_prompts_and_scores():
  item = winogrande.parse(Row("a:1", ROW))
  other = {"context_options": list(item.starts), "continuation": "won.", "gold": 1}
  assert winogrande.parse(Row("a:1", other)) == item
  assert winogrande.ask(item, []).pairs == (
    ("Sarah met Maria so Sarah", " won."),
    ("Sarah met Maria so Maria", " won."),
  )
  assert winogrande.score(item, [choice(-2), choice(-1)])["acc"] == 1
  tfds = {key: value for key, value in ROW.items() if key != "answer"} | {"label": 1}
  assert winogrande.parse(Row("a:1", tfds)) == item


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sentence": "no gap"}, "must have a _ and text after it"),
    ({"sentence": "at the end _"}, "must have a _ and text after it"),
    ({"answer": "3"}, "'answer' must be"),
    ({"answer": "0"}, "'answer' must be 1 or 2"),
  ],
)
def test_bad_rows(changes, message):
  with pytest.raises(BadRecord, match=message):
    winogrande.parse(Row("a:1", ROW | changes))
