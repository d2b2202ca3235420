"""ROUGE-L: a case worked by hand, and what is said without the library."""

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation.metrics import rouge


def test_the_longest_common_run_of_words():
  pytest.importorskip("rouge_score")
  # "police kill gunman": 2 of 3 words in order, of 4: P = 2/3, R = 2/4 -> 4/7.
  assert rouge.rouge_l("police kill gunman", ["police killed the gunman"]) == pytest.approx(6 / 7)
  assert rouge.rouge_l("police end gunman", ["police killed the gunman"]) == pytest.approx(4 / 7)
  assert rouge.rouge_l("a b", ["c d", "a b"]) == 1


def test_without_rouge_score_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
  rouge._scorer.cache_clear()
  with pytest.raises(UserError, match=r"ROUGE needs rouge-score .*'instructjax\[eval\]'"):
    rouge.require()
