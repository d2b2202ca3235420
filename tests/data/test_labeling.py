"""Ranks and agreement by hand."""

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data import labeling


def test_ranks_by_hand():
  # 1.7 lies .3 below 2.0, so a new rank; 1.5 lies .2 below 1.7, so a tie; 0 is alone.
  assert labeling.ranks_of(np.array([2.0, 1.5, 1.7, 0.0]), 0.3) == (1, 2, 2, 3)
  # A chain of small steps is no tie of its ends.
  assert labeling.ranks_of(np.array([1.0, 0.8, 0.6]), 0.3) == (1, 1, 2)


def test_agreement_by_hand():
  """Pairs (ab, ac, bc): of the first prompt +, +, tie and +, -, +; of the second one pair, alike."""
  twice = [((1, 2, 2), (1, 3, 2)), ((2, 1), (2, 1))]
  found = labeling.agreement(["p", "q"], twice)
  # Both order ab and ac of the first alike, and ba of the second: 3 of 3. One tie among 4 pairs of two labelers.
  assert found["agreement"] == 1.0 and found["tie_rate"] == pytest.approx(1 / 8)
  other = labeling.agreement(["p", "q"], [((1, 2, 3), (3, 2, 1)), ((2, 1), (2, 1))])
  # 0 of 3 and 1 of 1: mean .25; residuals 0 - .75 and 1 - .25 over 4 pairs.
  assert other["agreement"] == 0.25
  assert other["agreement_stderr"] == pytest.approx(np.sqrt(0.75**2 + 0.75**2) / 4)
  with pytest.raises(UserError, match="no pair of answers in 1 prompts"):
    labeling.agreement(["p"], [((1, 1), (1, 2))])


def test_too_few_or_many_answers_are_refused():
  labeling.require_counts([("p", ["a", "b"])])
  for count in (1, 10):
    with pytest.raises(UserError, match=f"has {count} responses to rank; must be 2 to 9"):
      labeling.require_counts([("p", ["a"] * count)])
