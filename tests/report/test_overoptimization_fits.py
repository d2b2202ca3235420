"""The fits of Gao et al.'s forms: known coefficients come back, and intervals cover them as often as they say."""

import numpy as np
import pytest

from instructjax.report import overoptimization, overoptimization_fits
from tests.report import example

D = np.linspace(0.1, 5, 60)


@pytest.mark.parametrize(
  ("which", "peak"),
  [("best_of_n", 2.0 / (2 * 0.5)), ("rl", float(np.exp(2.0 / 0.5 - 1)))],
)
def test_known_coefficients_come_back(which, peak):
  score = overoptimization.curve(which, D, 2.0, 0.5)
  fit = overoptimization_fits.fit_runs(which, [(D, score)] * 3, bootstrap=50, seed=0)
  assert (fit.alpha, fit.beta, fit.peak) == pytest.approx((2.0, 0.5, peak))
  assert fit.r_squared == pytest.approx(1) and fit.reach == 5
  np.testing.assert_allclose(fit.alpha_interval, [2.0, 2.0], rtol=1e-6)
  np.testing.assert_allclose(fit.peak_interval, [peak, peak], rtol=1e-6)


def test_the_top_is_that_of_the_measured_scores_and_not_of_the_form():
  score = np.where(D < 1.5, D, 3 - D)  # highest at 1.5, by no form
  fit = overoptimization_fits.fit_runs("rl", [(D, score)], bootstrap=20, seed=0)
  assert fit.top == pytest.approx(1.5, abs=0.15)
  assert abs(fit.peak - 1.5) > 0.2
  assert "the measured gold is highest at d = 1.5" in overoptimization_fits.in_words(
    "rl", "gold", fit
  )


def test_weights_give_what_repeated_points_give():
  rng = np.random.default_rng(0)
  score = rng.normal(size=len(D))
  times = rng.integers(0, 3, size=(4, len(D)))
  design = overoptimization_fits._design("rl", D)
  found = overoptimization_fits._solve(design, score, times.astype(float))
  for row, pair in zip(times, found):
    expected = overoptimization.fit("rl", D.repeat(row), score.repeat(row))
    np.testing.assert_allclose(pair, expected, rtol=1e-8)
  nothing = overoptimization_fits._solve(design, score, np.zeros((1, len(D))))
  assert np.isnan(nothing).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
  rng = np.random.default_rng(1)
  truth = overoptimization.curve("rl", D, 1.0, 0.4)
  covered = []
  for number in range(100):
    runs = [(D, truth + rng.normal(0, 0.3, len(D)))]
    low, high = overoptimization_fits.fit_runs(
      "rl", runs, bootstrap=200, seed=number
    ).alpha_interval
    covered.append(low <= 1.0 <= high)
  assert 0.85 <= np.mean(covered) <= 1.0


def test_one_curve_of_best_of_n_has_no_interval_over_runs_and_three_have():
  curve = overoptimization.curve("best_of_n", D, 2.0, 0.5)
  fit = lambda count: overoptimization_fits.fit_runs(
    "best_of_n", [(D, curve * (1 + 0.1 * i)) for i in range(count)], bootstrap=200, seed=0
  )
  assert fit(1).alpha_interval is None and "[" not in overoptimization_fits.in_words(
    "best_of_n", "gold", fit(1)
  )
  low, high = fit(3).alpha_interval
  assert low < fit(3).alpha < high and 2.0 <= low and high <= 2.4 + 1e-9


def test_prompts_are_resampled_where_they_are_known():
  rng = np.random.default_rng(2)
  curve = overoptimization.curve("best_of_n", np.r_[0, D], 2.0, 0.5)
  slope = rng.normal(1, 0.5, size=(200, 1))
  fit = overoptimization_fits.fit_prompts(np.r_[0, D], curve * slope, bootstrap=400, seed=0)
  mean = float(slope.mean())
  assert fit.alpha == pytest.approx(2 * mean)
  half = 1.96 * 2 * float(slope.std()) / np.sqrt(200)
  np.testing.assert_allclose(fit.alpha_interval, [2 * mean - half, 2 * mean + half], atol=0.05)


def test_too_few_points_are_no_fit():
  assert overoptimization_fits.fit_runs("rl", [], bootstrap=10, seed=0) is None
  assert overoptimization_fits.fit_runs("rl", [(D[:2], D[:2])], bootstrap=10, seed=0) is None
  assert overoptimization_fits.fit_prompts(D[:2], np.ones((4, 2)), bootstrap=10, seed=0) is None


def test_a_run_has_fits_of_both_scores():
  found = overoptimization_fits.of_results(example.results(), bootstrap=50, seed=0)
  assert found.keys() <= {"best_of_n", "rl"} and found
  for fits in found.values():
    assert set(fits) == {"gold", "reward"}
