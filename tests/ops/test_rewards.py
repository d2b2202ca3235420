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
