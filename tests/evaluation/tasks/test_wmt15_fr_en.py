"""WMT15: the prompt of Fig. 25."""

import pytest

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import wmt15_fr_en as wmt


def test_rows_and_prompts():
  item = wmt.parse(Row("a:1", {"translation": {"fr": "Merci !", "en": "Thanks!"}}))
  assert wmt.parse(Row("a:1", {"fr": "Merci !", "en": "Thanks!"})) == item
  instruction = "Translate the following sentences from French into English.\n\n"
  assert wmt.ask(item, []).prompt == f"{instruction}French: Merci !\nEnglish:"
  assert wmt.ask(item, [item]).prompt == (
    f"{instruction}French: Merci !\nEnglish: Thanks!\n\nFrench: Merci !\nEnglish:"
  )


def test_scores_are_counts():
  pytest.importorskip("sacrebleu")
  item = wmt.Item("Merci !", "Thanks a lot, all of you!")
  (metric,) = wmt.TASK.metrics
  assert metric.corpus(wmt.score(item, " Thanks a lot, all of you!")["bleu"]) == pytest.approx(100)
