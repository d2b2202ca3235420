"""Baselines from the other answers to a prompt: by hand, and beside plain NumPy loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.ops import baselines


def test_leave_one_out_by_hand():
  """Rewards 1, 2, 6 against the means 4, 3.5 and 1.5 of the two others; then two answers, 5 and 3."""
  found = baselines.leave_one_out(jnp.array([1.0, 2, 6]), 3)
  np.testing.assert_allclose(found, [-3, -1.5, 4.5], rtol=1e-6)
  found = baselines.leave_one_out(jnp.array([5.0, 3, -1, -1]), 2)
  np.testing.assert_allclose(found, [2, -2, 0, 0], atol=1e-6)


def test_group_normalised_by_hand():
  """Scores 1, 1, 4, 6: mean 3, squares of 4, 4, 1, 9 to it, so a standard deviation of sqrt(18 / 4)."""
  found = baselines.group_normalised(jnp.array([1.0, 1, 4, 6]), 4)
  np.testing.assert_allclose(found, np.array([-2, -2, 1, 3]) / np.sqrt(4.5), rtol=1e-6)


def test_a_group_of_equal_scores_says_nothing():
  found = baselines.group_normalised(jnp.array([0.7, 0.7, 0.7, 1.0, 2.0, 3.0]), 3)
  np.testing.assert_array_equal(found[:3], [0, 0, 0])
  assert np.all(np.isfinite(found)) and found[5] > 1


@pytest.mark.parametrize("num_answers", [2, 3, 6])
def test_beside_loops(num_answers):
  reward_B = np.random.default_rng(num_answers).normal(2, 3, 12).astype(np.float32)
  one_out, normalised = [], []
  for first in range(0, 12, num_answers):
    group = [float(x) for x in reward_B[first : first + num_answers]]
    for place, reward in enumerate(group):
      others = group[:place] + group[place + 1 :]
      one_out.append(reward - sum(others) / len(others))
      normalised.append((reward - np.mean(group)) / np.std(group))
  found = baselines.leave_one_out(jnp.asarray(reward_B), num_answers)
  np.testing.assert_allclose(found, one_out, rtol=1e-5, atol=1e-6)
  found = baselines.group_normalised(jnp.asarray(reward_B), num_answers)
  np.testing.assert_allclose(found, normalised, rtol=1e-5, atol=1e-6)


def test_neither_depends_on_a_shift_of_a_prompts_rewards():
  """What the reward model adds to every answer to a prompt teaches nothing."""
  reward_B = jnp.array([1.0, 2, 6, 0, 3, 3])
  shift_B = jnp.repeat(jnp.array([10.0, -4.0]), 3)
  for function in (baselines.leave_one_out, baselines.group_normalised):
    np.testing.assert_allclose(
      function(reward_B + shift_B, 3), function(reward_B, 3), rtol=1e-5, atol=1e-6
    )
