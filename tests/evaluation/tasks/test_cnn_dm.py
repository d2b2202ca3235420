"""CNN/DM and TL;DR: the prompt of Figs. 26 and 27."""

import pytest

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import cnn_dm, tldr


def test_rows_and_prompts():
  item = cnn_dm.parse(Row("a:1", {"article": "It rained.\nA lot.", "highlights": "Rain."}))
  assert cnn_dm.ask(item, []).prompt == "It rained.\nA lot.\n\nTL;DR:"
  row = Row("a:1", {"post": "It rained.\nA lot.", "summary": " Rain.", "title": "t"})
  assert tldr.parse(row) == item


def test_scores():
  pytest.importorskip("rouge_score")
  item = cnn_dm.Item("It rained.", "heavy rain fell")
  assert cnn_dm.score(item, " heavy rain fell") == {"rouge_l": 1}
