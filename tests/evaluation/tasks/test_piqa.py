"""PIQA: prompts as in lm-evaluation-harness."""

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import piqa
from tests.evaluation.fake import choice


def test_rows_and_prompts():
  row = Row("a:1", {"goal": "Open a jar.", "sol1": "Turn it.", "sol2": "Eat it.", "label": 0})
  item = piqa.parse(row)
  other = {"query": "Question: Open a jar.\n", "choices": ["Turn it.", "Eat it."], "gold": 0}
  assert piqa.parse(Row("a:1", other)) == item
  assert piqa.ask(item, []).pairs == (
    ("Question: Open a jar.\nAnswer:", " Turn it."),
    ("Question: Open a jar.\nAnswer:", " Eat it."),
  )
  assert piqa.score(item, [choice(-8), choice(-7.5)]) == {"accuracy": 0, "acc": 0, "acc_norm": 1}
