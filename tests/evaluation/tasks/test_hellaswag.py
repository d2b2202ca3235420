"""HellaSwag: prompts as in the paper's Fig. 21 and in lm-evaluation-harness."""

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import hellaswag
from tests.evaluation.fake import choice

PUBLISHED = {
  "activity_label": "Roof shingle removal",
  "ctx_a": "A man is sitting on a roof.",
  "ctx_b": "he",
  "endings": ["is  using wrap.", "[step] starts pulling [title] Up."],
  "label": "1",
}
ITEM = hellaswag.parse(Row("a:1", PUBLISHED))
OTHER = hellaswag.Item("Polo: A horse", ("runs.", "sings."), 0)


def test_rows_of_both_forms():
  assert ITEM.context == "Roof shingle removal: A man is sitting on a roof. He"
  assert ITEM.endings == ("is using wrap.", " starts pulling. Up.") and ITEM.gold == 1
  row = Row("a:1", {"ctx": "Polo: A horse", "endings": ["runs.", "sings."], "label": 0})
  assert hellaswag.parse(row) == OTHER
  tfds = {
    "activity_label": "Polo",
    "context": "A horse",
    "endings": ["runs.", "sings."],
    "label": 0,
  }
  assert hellaswag.parse(Row("a:1", tfds)) == OTHER


def test_prompts():
  (context, continuation), _ = hellaswag.ask(ITEM, [OTHER]).pairs
  assert context == (
    "Complete each independent paragraph using common-sense reasoning.\n\n"
    "Polo: A horse runs.\n\n"
    "Roof shingle removal: A man is sitting on a roof. He"
  )
  assert continuation == " is using wrap."
  assert hellaswag.ask_harness(ITEM, []).pairs[0] == (ITEM.context, " is using wrap.")


def test_scores():
  answer = [choice(-1, -1), choice(-1.5)]
  assert hellaswag.score(ITEM, answer) == {"accuracy": 0, "acc": 1, "acc_norm": 1}
