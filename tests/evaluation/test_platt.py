"""Areas by counting pairs, and probabilities by what they must satisfy."""

import numpy as np
import pytest

from instructjax.evaluation import platt


def test_an_area_by_hand():
  """Of the four pairs, 3 > 1, 3 > 2, 2 > 1 and a tie at 2: (3 + .5) / 4."""
  assert platt.auc([3, 2, 1, 2], [True, True, False, False]) == pytest.approx(3.5 / 4)


def test_an_area_counts_pairs():
  rng = np.random.default_rng(0)
  score, positive = rng.integers(0, 9, 60), rng.random(60) < 0.3
  pairs = [
    (a > b) + 0.5 * (a == b) for a in score[positive].tolist() for b in score[~positive].tolist()
  ]
  assert platt.auc(score, positive) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("function", [platt.auc, platt.fit])
@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone_is_refused(function, label):
  with pytest.raises(ValueError, match="both classes"):
    function([1, 2], [label, label])


def test_probabilities_find_the_curve_that_the_labels_are_drawn_from():
  rng = np.random.default_rng(1)
  score = rng.normal(40.0, 3.0, 20_000)
  positive = rng.random(20_000) < platt.probability(score, 0.5, -21.0)
  slope, offset = platt.fit(score, positive)
  assert (slope, offset) == (pytest.approx(0.5, abs=0.03), pytest.approx(-21.0, abs=1.2))
  # At the maximum, probabilities sum to the number of positives.
  total = platt.probability(score, slope, offset).sum()
  assert total == pytest.approx(positive.sum(), rel=1e-3)


def test_scores_that_are_all_equal_or_separable_have_finite_curves():
  slope, offset = platt.fit([1.0, 1.0, 1.0, 1.0], [True, False, False, False])
  assert platt.probability([1.0], slope, offset)[0] == pytest.approx(1 / 3, abs=0.05)
  slope, offset = platt.fit([0.0, 1.0], [False, True])
  low, high = platt.probability([0.0, 1.0], slope, offset)
  assert 0.3 < low < 0.4 and 0.6 < high < 0.7
