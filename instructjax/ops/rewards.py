"""Rewards of whole answers: the length rule, ensembles of reward models, and the weighted sum of several rewards.

Called by rl/experience.py, inside the compiled step.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def length_rule(length_B: Array, low: int, high: int) -> Array:
  """Minus the number of tokens by which an answer is too short or too long; 0 from `low` to `high` tokens."""
  missing_B, surplus_B = jnp.maximum(low - length_B, 0), jnp.maximum(length_B - high, 0)
  return -(missing_B + surplus_B).astype(jnp.float32)


def ensemble(score_MB: Array, how: str, penalty: float) -> Array:
  """One score for each answer from those of M reward models (Coste et al. 2023, arXiv:2310.02743, sec 3).

  Args:
    score_MB: scores whose zero is the same.
    how: 'mean'; 'worst', the least score (WCO); or 'uncertainty', the mean minus `penalty` times the variance between
      the models (UWO).
    penalty: lambda of UWO, in 1 / score.
  """
  if how == "worst":
    return jnp.min(score_MB, axis=0)
  mean_B = jnp.mean(score_MB, axis=0)
  return mean_B if how == "mean" else mean_B - penalty * jnp.var(score_MB, axis=0)


def weighted_sum(values: Sequence[Array], weights: Sequence[float]) -> Array:
  """The sum of weight times value, in the order given. A lone value of weight 1 is returned as it is."""
  # No product where the weight is 1: the program with the reward model alone has none.
  terms = [value if weight == 1 else weight * value for value, weight in zip(values, weights)]
  total = terms[0]
  for term in terms[1:]:
    total = total + term
  return total
