"""Agreement: by hand, and by Krippendorff's own example."""

import numpy as np
import pytest

from instructjax.labels import agreement
from instructjax.report import intervals

N = None
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", part C: four observers, twelve units.
OBSERVERS = (
  (1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N),
  (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3),
  (N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N),
  (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N),
)
UNITS = [[value for value in unit if value is not N] for unit in zip(*OBSERVERS)]


@pytest.mark.parametrize(
  ("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_krippendorffs_example(level, published):
  assert round(agreement.alpha(UNITS, level), 3) == published


def test_alpha_by_hand():
  """Two observers, values (0,0) (1,1) (0,1): coincidences 00: 2, 11: 2, 01 and 10: 1 each; totals 3 and 3, n = 6.

  Observed disagreement 1 + 1 = 2; expected 2 * 3 * 3 / 5 = 3.6; alpha = 1 - 2 / 3.6.
  """
  units = [(0, 0), (1, 1), (0, 1), (1,)]
  for level in ("nominal", "ordinal", "interval"):
    assert agreement.alpha(units, level) == pytest.approx(1 - 2 / 3.6)
  assert agreement.alpha([(1, 1), (1, 1)]) is None and agreement.alpha([]) is None
  with pytest.raises(ValueError, match="level='ratio' must be"):
    agreement.alpha(units, "ratio")


def test_pairs_that_neither_calls_a_tie():
  """Of 12, 13, 23: a orders all, b ties 2 and 3; 12 is alike, 13 is not."""
  a, b = {1: 1, 2: 2, 3: 3}, {1: 2, 2: 3, 3: 1}
  assert agreement.alike(a, b) == (1, 3)
  assert agreement.alike(a, {1: 1, 2: 2, 3: 2}) == (2, 2)
  assert agreement.alike(a, {1: 1, 2: 1, 3: 1}) == (0, 0)
  assert agreement.alike(a, {7: 1, 8: 2}) == (0, 0)


ITEMS = [
  {"ann": {1: 1, 2: 2}, "bea": {1: 1, 2: 2}, "eva": {1: 2, 2: 1}},
  {"ann": {3: 1, 4: 2}, "bea": {3: 2, 4: 1}},
  {"ann": {5: 1, 6: 1}, "eva": {5: 1, 6: 2}},
]


def test_agreement_of_pairs_people_and_all():
  """Alike of decided: ann and bea 1 of 1 and 0 of 1; ann and eva 0 of 1 and none; bea and eva 0 of 1."""
  pairs = agreement.of_pairs(ITEMS)
  assert {pair: (one.mean, one.count) for pair, one in pairs.items()} == {
    ("ann", "bea"): (0.5, 2),
    ("ann", "eva"): (0.0, 1),
    ("bea", "eva"): (0.0, 1),
  }
  found = agreement.overall(ITEMS)
  assert (found.mean, found.count, found.items) == (0.25, 4, 2)
  assert agreement.of_person(ITEMS, "ann").mean == pytest.approx(1 / 3)
  assert agreement.of_person(ITEMS, "zoe").mean is None
  assert agreement.disagreement(ITEMS[0]) == pytest.approx(2 / 3)
  assert agreement.disagreement(ITEMS[2]) is None


def test_win_rates_of_models():
  """Ranks 1, 2, 2 of a1, b1, b2: a beats b twice; then b1 = a1 and b2 above a1: half a win of two. 2.5 of 4."""
  origins = {1: "a", 2: "b", 3: "b", 4: "a"}
  found = agreement.win_rates([{1: 1, 2: 2, 3: 2}, {1: 2, 2: 2, 3: 1}, {1: 1, 4: 2}, {}], origins)
  ((pair, one),) = found.items()
  assert (pair, one.mean, one.count, one.items) == (("a", "b"), 0.625, 4, 2)


def test_intervals_are_over_items():
  """With one try an item they are those of the report's bootstrap of a mean."""
  hits = [1, 0, 1, 1, 1, 0, 1]
  found = agreement.share([(hit, 1) for hit in hits])
  mean, (low, high) = intervals.mean_interval(np.array(hits), 1000, np.random.default_rng(0))
  assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high))
  wide = agreement.share([(10 * hit, 10) for hit in hits])
  assert (wide.low, wide.high, wide.count) == (found.low, found.high, 70)


def test_bias_against_the_others():
  """7 against 5 and 5 is +2; 3 against 4 is -1; what nobody else has rated does not count."""
  ratings = [{"ann": 7, "bea": 5, "eva": 5}, {"ann": 3, "bea": 4}, {"ann": 1}, {"bea": 2}]
  found = agreement.bias(ratings, "ann")
  assert (found.mean, found.count) == (0.5, 2)
