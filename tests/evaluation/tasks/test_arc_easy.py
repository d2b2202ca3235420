"""ARC: three forms of the same item, prompts as in lm-evaluation-harness."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import arc_challenge, arc_easy
from tests.evaluation.fake import choice

PUBLISHED = {
  "question": {
    "stem": "Which is ice?",
    "choices": [{"text": "fire", "label": "A"}, {"text": "snow", "label": "B"}],
  },
  "answerKey": "B",
}
HUB = {
  "question": "Which is ice?",
  "choices": {"text": ["fire", "snow"], "label": ["1", "2"]},
  "answerKey": "2",
}
OTHER = {"query": "Question: Which is ice?\n", "choices": ["fire", "snow"], "gold": 1}


def test_rows_prompts_and_scores():
  item = arc_easy.parse(Row("a:1", PUBLISHED))
  assert item == arc_easy.parse(Row("a:1", HUB)) == arc_easy.parse(Row("a:1", OTHER))
  prompt = "Question: Which is ice?\nAnswer:"
  assert arc_easy.ask(item, []).pairs == ((prompt, " fire"), (prompt, " snow"))
  assert arc_easy.score(item, [choice(-2), choice(-1)])["acc_norm"] == 1
  with pytest.raises(BadRecord, match="'answerKey' must be one of 1, 2"):
    arc_easy.parse(Row("a:1", HUB | {"answerKey": "C"}))
  assert arc_challenge.TASK.files != arc_easy.TASK.files
