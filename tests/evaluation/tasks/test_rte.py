"""RTE: the prompt of Fig. 22, and the labels of three publishers."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import rte
from tests.evaluation.fake import choice

PASSAGE = "It appears that the train is ready."
ROW = {"premise": PASSAGE, "hypothesis": "Maglev is commercially used.", "label": "not_entailment"}
ITEM = rte.parse(Row("a:1", ROW))


def test_labels():
  assert ITEM.gold == 1
  assert rte.parse(Row("a:1", ROW | {"label": 0})).gold == 0
  glue = {"sentence1": "a", "sentence2": "b", "label": "entailment"}
  assert rte.parse(Row("a:1", glue)) == rte.Item("a", "b", 0)
  with pytest.raises(BadRecord, match="'label' must be entailment or not_entailment"):
    rte.parse(Row("a:1", ROW | {"label": "maybe"}))


def test_prompts():
  text = (
    f"Passage: {PASSAGE}\n"
    "Question: From this passage can one reasonably conclude that Maglev is commercially used?\n"
    "Answer:"
  )
  assert rte.ask(ITEM, []).pairs == ((text, " Yes"), (text, " No"))
  assert rte.ask(ITEM, [ITEM]).pairs[0][0] == f"{text} No\n\n{text}"
  assert rte.score(ITEM, [choice(-2), choice(-1)])["accuracy"] == 1
