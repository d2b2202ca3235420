"""The length rule and the weighted sum, by hand."""

import jax.numpy as jnp
import numpy as np

from instructjax.ops import rewards


def test_the_length_rule_counts_the_tokens_outside():
  length_B = jnp.array([0, 2, 3, 5, 7, 8, 11])
  found = rewards.length_rule(length_B, 3, 7)
  np.testing.assert_array_equal(found, [-3, -1, 0, 0, 0, -1, -4])
  assert found.dtype == jnp.float32


def test_the_weighted_sum():
  values = [jnp.array([1.0, 2.0]), jnp.array([4.0, -8.0]), jnp.array([5.0, 6.0])]
  np.testing.assert_array_equal(rewards.weighted_sum(values, [1.0, 0.5, 0.0]), [3.0, -2.0])
  assert rewards.weighted_sum(values[:1], [1.0]) is values[0]
  np.testing.assert_array_equal(rewards.weighted_sum(values[:1], [-2.0]), [-2.0, -4.0])


def test_an_ensembles_score_hand_worked():
  score_MB = jnp.array([[1.0, 4.0], [3.0, 4.0], [2.0, -2.0]])
  # Means 2 and 2; variances 2/3 and (4 + 4 + 16) / 3 = 8.
  np.testing.assert_allclose(rewards.ensemble(score_MB, "mean", 0.5), [2, 2], rtol=1e-6)
  np.testing.assert_array_equal(rewards.ensemble(score_MB, "worst", 0.5), [1, -2])
  expected = [2 - 1 / 3, 2 - 4]
  np.testing.assert_allclose(rewards.ensemble(score_MB, "uncertainty", 0.5), expected, rtol=1e-6)
