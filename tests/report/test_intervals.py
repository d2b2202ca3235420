"""Tests of instructjax.report.intervals: numbers worked out by hand, and scipy's."""

import numpy as np
import pytest
import scipy.stats

from instructjax.report import intervals
from instructjax.report.results import Measured


def _scored(gold, reward=()) -> Measured:
  gold = None if gold is None else np.array(gold, float)
  return Measured([], np.array(reward), *[None] * 3, gold, *[None] * 4)


def test_reward_model_judges_where_there_is_no_gold_score():
  np.testing.assert_array_equal(intervals.judged(_scored(None, [1.0, 0.0])), [1, 0])
  np.testing.assert_array_equal(intervals.judged(_scored([5, 6], [0.0, 1.0])), [5, 6])


def test_win_rate_counts_ties_half_and_resamples_prompts():
  # Two samples a prompt. Prompts 1 and 2 are won twice, 3 lost twice, 4 is one win and one loss
  # in the first case, two ties in the second: rate (2 + 2 + 0 + 1) / 8.
  rng = np.random.default_rng(0)
  b = _scored(np.zeros(8))
  for last in ([1, -1], [0, 0]):
    a = _scored([1, 1, 1, 1, -1, -1, *last])
    assert intervals.win_rate(a, b, 2, 100, rng)[0] == 5 / 8
  # Prompts won, won, lost, lost: a resample of 4 prompts holds no won one with probability 1/16,
  # which is over 2.5%, so the interval is all of [0, 1]. Resampling the 8 answers would give less.
  a = _scored([1, 1, 1, 1, -1, -1, -1, -1])
  rate, interval = intervals.win_rate(a, b, 2, 4000, rng)
  assert (rate, interval) == (0.5, [0.0, 1.0])


def test_win_rate_compares_every_answer_to_a_prompt_with_every_other():
  rng = np.random.default_rng(0)
  # Prompt 1: of 4 comparisons, 1 > 0 and 3 > 0, 3 > 2 are won, 1 < 2 is lost. Prompt 2: two ties, two losses.
  a, b = _scored([1, 3, 0, 0]), _scored([0, 2, 0, 5])
  assert intervals.win_rate(a, b, 2, 100, rng)[0] == (3 / 4 + 1 / 4) / 2
  assert intervals.win_rate(b, a, 2, 100, rng)[0] == 1 - (3 / 4 + 1 / 4) / 2


def test_interval_is_the_normal_one_for_many_prompts():
  values = np.random.default_rng(1).normal(3, 2, 400)
  mean, (low, high) = intervals.mean_interval(values, 4000, np.random.default_rng(0))
  assert mean == values.mean()
  half = 1.96 * values.std() / np.sqrt(400)
  np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.1 * half)


@pytest.mark.parametrize("num_prompts", [2, 37, 300])
def test_interval_is_scipys(num_prompts):
  values = np.random.default_rng(1).normal(0.4, 1, num_prompts)
  theirs = scipy.stats.bootstrap(
    (values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(2)
  )
  _, interval = intervals.mean_interval(values, 500, np.random.default_rng(2))
  np.testing.assert_allclose(interval, theirs.confidence_interval, rtol=1e-12)


def test_loss_differences_interval_is_scipys():
  rng = np.random.default_rng(3)
  a, b = np.abs(rng.normal(30, 3, (2, 40, 2)))  # nats and tokens of a row
  # Paired: both policies' rows are drawn together.
  theirs = scipy.stats.bootstrap(
    (*a.T, *b.T),
    lambda nll_a, n_a, nll_b, n_b, axis: (
      nll_a.sum(axis) / n_a.sum(axis) - nll_b.sum(axis) / n_b.sum(axis)
    ),
    paired=True,
    vectorized=True,
    n_resamples=500,
    method="percentile",
    rng=np.random.default_rng(2),
  )
  _, interval = intervals.loss_difference(a, b, 500, np.random.default_rng(2))
  np.testing.assert_allclose(interval, theirs.confidence_interval, rtol=1e-9)


def test_one_prompt_has_an_interval_of_no_width():
  assert intervals.mean_interval(np.array([0.5]), 50, np.random.default_rng(0)) == (0.5, [0.5, 0.5])


def test_loss_difference_weighs_tokens_and_pairs_rows():
  rng = np.random.default_rng(0)
  # a: 11 nats over 10 tokens (the mean of the two rows' rates would be 1.5); b: 1 a token.
  a, b = [[2, 1], [9, 9]], [[1, 1], [9, 9]]
  difference, interval = intervals.loss_difference(a, b, 2000, rng)
  assert difference == pytest.approx(0.1)
  # Resamples: first row twice 1, second twice 0 (a quarter of them each), one of each 0.1.
  np.testing.assert_allclose(interval, [0, 1], atol=1e-12)
  # The same rows are drawn for both, so a constant difference per token is known exactly.
  tokens = np.array([3.0, 50.0, 7.0])
  a = np.stack([np.array([9.0, 20.0, 70.0]), tokens], axis=1)
  b = a - np.stack([0.25 * tokens, 0 * tokens], axis=1)
  difference, interval = intervals.loss_difference(a, b, 200, rng)
  np.testing.assert_allclose([difference, *interval], 0.25)


@pytest.mark.parametrize(
  "interval, above, at_least, below, at_most",
  [
    ((0.6, 0.7), True, True, False, False),
    ((0.3, 0.4), False, False, True, True),
    ((0.4, 0.6), None, None, None, None),
    ((0.5, 0.6), None, True, False, None),  # the threshold itself
    ((0.4, 0.5), False, None, None, True),
  ],
)
def test_what_an_interval_says_about_a_threshold(interval, above, at_least, below, at_most):
  assert intervals.above(interval, 0.5) is above
  assert intervals.at_least(interval, 0.5) is at_least
  assert intervals.below(interval, 0.5) is below
  assert intervals.at_most(interval, 0.5) is at_most


def test_what_is_false_decides_before_what_cannot_be_told():
  assert intervals.all_of(True, None, False) is False
  assert intervals.all_of(True, None) is None
  assert intervals.all_of(True, True) is True
