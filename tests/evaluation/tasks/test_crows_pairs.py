"""CrowS-Pairs: two sentences, and what is told of them."""

import pytest

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import crows_pairs
from tests.evaluation.fake import choice


def test_rows_and_scores():
  row = Row("a:1", {"sent_more": "They ran.", "sent_less": "We ran.", "bias_type": "age"})
  item = crows_pairs.parse(row)
  asked = crows_pairs.TASK.prompts["basic"].ask(item, [])
  assert asked.pairs == (("", "They ran."), ("", "We ran."))
  assert crows_pairs.score(item, [choice(-2), choice(-2)]) == {"entropy": 1, "stereotype": 0}
  found = crows_pairs.score(item, [choice(-2), choice(-9)])
  assert found["stereotype"] == 1 and found["entropy"] == pytest.approx(0.0106, abs=1e-3)
