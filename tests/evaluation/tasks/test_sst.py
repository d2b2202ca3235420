"""SST: the prompt of Fig. 23."""

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import sst
from tests.evaluation.fake import choice


def test_rows_prompts_and_scores():
  item = sst.parse(Row("a:1", {"sentence": "this film seems thirsty ", "label": "0"}))
  instruction = "For each snippet of text, label the sentiment of the text as positive or negative."
  text = f"{instruction}\n\nText: this film seems thirsty\nLabel:"
  assert sst.ask(item, []).pairs == ((text, " negative"), (text, " positive"))
  worked = sst.Item("a joy", 1)
  assert (
    sst.ask(item, [worked])
    .pairs[0][0]
    .startswith(f"{instruction}\n\nText: a joy\nLabel: positive\n\nText: this")
  )
  assert sst.score(item, [choice(-1), choice(-2)])["accuracy"] == 1
