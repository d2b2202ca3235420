"""BoolQ: prompts as in lm-evaluation-harness."""

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import boolq
from tests.evaluation.fake import choice


def test_rows_prompts_and_scores():
  item = boolq.parse(Row("a:1", {"passage": "Ice.", "question": "is it cold", "answer": True}))
  other = {"query": "Passage: Ice.\nQuestion: is it cold?", "choices": ["no", "yes"], "gold": 1}
  assert boolq.parse(Row("a:1", other)) == item
  prompt = "Ice.\nQuestion: is it cold?\nAnswer:"
  assert boolq.ask(item, []).pairs == ((prompt, " no"), (prompt, " yes"))
  assert boolq.score(item, [choice(-2), choice(-1)])["acc"] == 1
