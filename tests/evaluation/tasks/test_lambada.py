"""LAMBADA: the last word, whether it is written, and the perplexity of all."""

import math

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Choice, Row
from instructjax.evaluation.tasks import lambada


def test_rows_prompts_and_scores():
  item = lambada.parse(Row("a:1", {"text": "I look\nat the sign"}))
  assert lambada.parse(Row("a:1", {"context": "I look\nat the", "continuation": "sign"})) == item
  assert lambada.ask(item, []).pairs == (("I look\nat the", " sign"),)
  answer = [Choice(-2.0, (-1.5, -0.5), ("s", "ign"), True)]
  assert lambada.score(item, answer) == {"acc": 1, "perplexity": [-2.0, 1.0]}
  perplexity = next(metric.corpus for metric in lambada.TASK.metrics if metric.corpus)
  assert perplexity([-6.0, 2.0]) == pytest.approx(math.exp(3))
  assert math.isfinite(perplexity([-1e6, 1.0]))
  with pytest.raises(BadRecord, match="two words or more"):
    lambada.parse(Row("a:1", {"text": "word"}))
