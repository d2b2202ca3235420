"""Sums, means, variances and whitening over the True places of a mask; and the mask of some tokens.

Called by surrogate.py, preference.py and rl/ (experience, sampling and slots). Imports no config and no model.

Every function of a mask first puts 0 at the masked places and computes only then. So what stands in padding, NaN
included, reaches neither the value nor the gradient (details item 24). Sums are taken in float32 whatever the input's
type.
"""

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def masked_sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
  """Sum of x where mask is True, float32."""
  _check(x, mask)
  return jnp.sum(jnp.where(mask, x, 0), axis=axis, dtype=jnp.float32)


def masked_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
  """Mean of x where mask is True, float32; 0 where the mask is empty."""
  _check(x, mask)
  return masked_sum(x, mask, axis) / jnp.maximum(_count(mask, axis), 1)


def masked_var(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Variance of x over all True places, float32; 0 where the mask is empty.

  The sum of squares is divided by the number of values n, as in lm-human-preferences (tf.nn.moments). Several later
  ports of it divide by n - 1 (torch.var).
  """
  _check(x, mask)
  deviation = jnp.where(mask, x, 0).astype(jnp.float32) - masked_mean(x, mask)
  return masked_sum(jnp.square(deviation), mask) / jnp.maximum(_count(mask), 1)


def masked_whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """x scaled to variance 1 over the True places: (x - mean) / sqrt(var + 1e-8), with the biased variance.

  As in lm-human-preferences, which whitens advantages with shift_mean=True and rewards with
  shift_mean=False (details item 25). The paper does not say whether it whitens.

  Args:
    x: values of any float dtype.
    mask: True at the places that count.
    shift_mean: True for a result with mean 0; False adds the mean of x back.
  Returns:
    float32, zero where masked.
  """
  _check(x, mask)
  mean = masked_mean(x, mask)
  deviation = jnp.where(mask, x, 0).astype(jnp.float32) - mean
  whitened = deviation * jax.lax.rsqrt(masked_var(x, mask) + 1e-8)
  return jnp.where(mask, whitened if shift_mean else whitened + mean, 0)


def _count(mask: jax.Array, axis: Axis = None) -> jax.Array:
  return jnp.sum(mask, axis=axis, dtype=jnp.float32)


def _check(x: jax.Array, mask: jax.Array) -> None:
  chex.assert_equal_shape([x, mask])
  chex.assert_type([x, mask], [float, bool])


def is_any(token: jax.Array, ids: Sequence[int | jax.Array]) -> jax.Array:
  """Whether each token is one of these ids; of no ids, none is."""
  first = token == ids[0] if ids else jnp.zeros(token.shape, bool)
  # One comparison for each id: there are a handful, and with one id this is that comparison alone.
  return functools.reduce(lambda found, i: found | (token == i), ids[1:], first)
