"""Over-optimisation at checkpoints, by hand: what is gained in standard deviations, and which prompts are resampled."""

import dataclasses

import numpy as np
import pytest

from instructjax.report import overoptimization_points
from tests.report import example


def answered(gold, reward, kl):
  """Two prompts of two answers each; the gold score may be None."""
  found = example.measured_policy(np.random.default_rng(0), 0.0, has_kl=True).take(np.arange(4))
  gold = None if gold is None else np.array(gold, float)
  return dataclasses.replace(
    found, gold=gold, reward=np.array(reward, float), kl=np.array(kl, float)
  )


def results(with_gold=True):
  gold = lambda *values: values if with_gold else None
  return dataclasses.replace(
    example.results(),
    measured={
      # Deviations 2 and 1. The second prompt is the easier one.
      "ppo_init": answered(gold(0, 0, 4, 4), [1, 1, 3, 3], [0] * 4),
      "ppo_beta0": answered(gold(-5, -3, 0, 0), [5, 5, 5, 5], [9, 9, 9, 9]),
    },
    # By prompt, gold gains 2 and 4 and the reward 1 and 1.
    checkpoints={"ppo_beta0": {10: answered(gold(1, 3, 7, 9), [1, 3, 4, 4], [-1, 1, 8, 8])}},
  )


def points(results):
  return overoptimization_points.of_results(results, bootstrap=200, seed=0)


def test_a_checkpoint_and_the_end_stand_where_their_answers_are():
  kept, end = points(results())
  assert (kept.step, end.step) == (10, None)
  # The first prompt has a KL of 0 on average and the second one of 8.
  assert kept.distance == (2.0, pytest.approx([0, np.sqrt(8)]))
  assert kept.scores == {"gold": (1.5, [1.0, 2.0]), "reward": (1.0, [1.0, 1.0])}
  assert end.distance == (3.0, [3.0, 3.0])
  assert end.scores["gold"] == (-2.0, [-2.0, -2.0])
  assert end.scores["reward"][0] == 3.0


def test_a_kl_below_zero_is_no_distance():
  found = results()
  near = answered((0, 0, 4, 4), [1, 1, 3, 3], [-1, -1, -1, 1])
  kept, _ = points(dataclasses.replace(found, checkpoints={"ppo_beta0": {1: near}}))
  assert kept.distance == (0.0, [0.0, 0.0])


def test_the_points_in_words():
  assert overoptimization_points.in_words(points(results())) == (
    "after 10 iterations d = 2.00 [0.00, 2.83], gold 1.50 [1.00, 2.00], reward 1.00 [1.00, 1.00]; at the end"
    " d = 3.00 [3.00, 3.00], gold −2.00 [−2.00, −2.00], reward 3.00 [2.00, 4.00]"
  )
  assert overoptimization_points.in_words([]) == ""


def test_without_gold_scores_there_is_the_reward():
  assert [point.scores.keys() for point in points(results(with_gold=False))] == [{"reward"}] * 2


def test_nothing_is_said_of_a_run_without_checkpoints():
  found = results()
  others = {"ppo": found.checkpoints["ppo_beta0"]}
  for missing in ({}, others):
    assert points(dataclasses.replace(found, checkpoints=missing)) == []
