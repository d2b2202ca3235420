"""Scores along the distance from the starting policy, and the curves of Gao et al. (2022) fitted to them."""

import dataclasses

import numpy as np
import pytest

from instructjax.report import overoptimization
from instructjax.report.results import BestOfN
from tests.report import example


def test_column_takes_rows_that_have_all_metrics():
  rows = [{"a": 1, "b": 2}, {"a": 3}, {"a": 5, "b": 6}]
  np.testing.assert_array_equal(overoptimization.column(rows, "a", "b"), [[1, 5], [2, 6]])
  np.testing.assert_array_equal(overoptimization.column(rows, "a"), [[1, 3, 5]])


def test_overoptimization_scores_start_at_zero_in_standard_deviations():
  init = dataclasses.replace(
    example.results().measured["ppo_init"],
    gold=np.array([0.0, 4.0]),  # deviation 2
    reward=np.array([1.0, 2.0]),  # 0.5
  )
  results = dataclasses.replace(
    example.results(),
    measured={"ppo_init": init},
    best_of_n=[
      BestOfN(n=1, kl=0.0, gold=2.0, reward=1.5, by_prompt=np.array([2.0])),
      BestOfN(n=2, kl=0.25, gold=3.0, reward=2.0, by_prompt=np.array([3.0])),
    ],
    curves={
      "ppo": [{"kl": 0.0, "gold": 1.0, "reward": 1.2}],
      "ppo_beta0": [
        {"kl": -0.1, "gold": 3.0, "reward": 1.4},
        {"kl": 9.0, "gold": 0.0, "reward": 2.3},
      ],
    },
  )
  scores = overoptimization.scores(results)
  for which, distance, gold, reward in (
    ("best_of_n", [0, 0.5], [0, 0.5], [0, 1]),
    ("rl", [0, 3], [0.5, -1], [0.2, 2]),  # origin: the first iterations' means, 2 and 1.3
  ):
    np.testing.assert_allclose(scores[which]["distance"], distance)
    np.testing.assert_allclose(scores[which]["gold"], gold)
    np.testing.assert_allclose(scores[which]["reward"], reward)
  without = {"ppo_init": dataclasses.replace(init, gold=None)}
  alone = overoptimization.scores(dataclasses.replace(results, measured=without))
  for which in ("best_of_n", "rl"):
    assert alone[which].keys() == {"distance", "reward"}
    np.testing.assert_array_equal(alone[which]["reward"], scores[which]["reward"])
  assert overoptimization.scores(dataclasses.replace(results, measured={})) == {}


@pytest.mark.parametrize("which", ["best_of_n", "rl"])
def test_fit_recovers_the_curve_and_its_peak(which):
  distance = np.linspace(0, 8, 400)
  score = overoptimization.curve(which, distance, 0.9, 0.3)
  np.testing.assert_allclose(overoptimization.fit(which, distance, score), [0.9, 0.3])
  top = overoptimization.peak(which, 0.9, 0.3)
  assert top == pytest.approx(distance[np.argmax(score)], abs=0.02)
  assert overoptimization.peak(which, 0.9, -0.1) is None


def test_curves_are_those_of_gao_et_al():
  # d = 2, alpha = 3, beta = 0.5: 2 (3 - 0.5 * 2) and 2 (3 - 0.5 log 2).
  np.testing.assert_allclose(overoptimization.curve("best_of_n", [0, 2], 3, 0.5), [0, 4])
  np.testing.assert_allclose(overoptimization.curve("rl", [0, 2], 3, 0.5), [0, 6 - np.log(2)])


def test_no_fit_where_points_do_not_determine_one():
  assert overoptimization.fit("rl", [0.0, 2.0], [0.0, 1.0]) is None
  assert overoptimization.fit("best_of_n", [0.0, 0.0, 2.0], [0.0, 0.0, 1.0]) is None
  assert overoptimization.peak("best_of_n", -1.0, 0.3) is None


def test_running_mean():
  np.testing.assert_allclose(overoptimization.running_mean([1, 2, 3, 10], 3), [1, 2, 5, 10])
  np.testing.assert_allclose(overoptimization.running_mean([1, 2, 3, 10], 1), [1, 2, 3, 10])
  # Window 5: at its full reach in the middle, 3 wide next to the ends, 1 at them.
  np.testing.assert_allclose(overoptimization.running_mean([1, 2, 6, 1, 0], 5), [1, 3, 2, 7 / 3, 0])
  assert overoptimization.running_mean([], 3).shape == (0,)
  # Along the last axis, so that resampled curves are smoothed at once.
  np.testing.assert_allclose(overoptimization.running_mean([[0, 3, 6, 0]] * 2, 3)[1], [0, 3, 3, 0])
