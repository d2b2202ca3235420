"""PPO's clipped losses for policy and value function (Schulman et al. 2017, arXiv:1707.06347).

Called by rl/step.py (and by rl/experience.py for the explained variance). Imports no config and no model.

Means are over all response tokens of the minibatch, as in lm-human-preferences, so a long response weighs more than a
short one. Behaviour log-probabilities, advantages, old values and returns were computed after the rollout and come in
as data, so there is no gradient to stop.
"""

import chex
import jax
import jax.numpy as jnp

from instructjax.ops.masked import masked_mean, masked_var


def clipped_surrogate(
  logprob_BR: jax.Array,
  behaviour_logprob_BR: jax.Array,
  advantage_BR: jax.Array,
  is_response_BR: jax.Array,
  *,
  clip: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Policy loss: mean of max(-A * ratio, -A * clip(ratio, 1 - clip, 1 + clip)).

  ratio = exp(logprob - behaviour_logprob). At masked places it is exactly 1 (details item 24).

  Args:
    logprob_BR: log-probability of each token under the policy being trained, in nats.
    behaviour_logprob_BR: the same under the policy that sampled the tokens.
    advantage_BR: advantage of each token, whitened or in units of reward.
    is_response_BR: True on the response tokens to learn from.
    clip: 0.2 in the paper (C.4).
  Returns:
    (loss, metrics), float32 scalars.
    clip_fraction: share of tokens whose loss is the clipped one.
    approx_kl: mean of (log-ratio)^2 / 2 (details item 32), in nats. It says how far the policy has moved from the one
      that sampled, not from the reference.
    ratio_mean, ratio_max: of the response tokens; ratio_max is 0 if there are none.
  """
  arrays = [logprob_BR, behaviour_logprob_BR, advantage_BR, is_response_BR]
  chex.assert_rank(logprob_BR, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, float, bool])

  # Masked before exp: a ratio that overflows in the padding would turn a gradient of 0 into NaN.
  log_ratio_BR = jnp.where(is_response_BR, logprob_BR - behaviour_logprob_BR, 0)
  log_ratio_BR = log_ratio_BR.astype(jnp.float32)
  advantage_BR = jnp.where(is_response_BR, advantage_BR, 0).astype(jnp.float32)
  ratio_BR = jnp.exp(log_ratio_BR)
  unclipped_BR = -advantage_BR * ratio_BR
  clipped_BR = -advantage_BR * jnp.clip(ratio_BR, 1 - clip, 1 + clip)
  loss = masked_mean(jnp.maximum(unclipped_BR, clipped_BR), is_response_BR)

  is_clipped_BR = (clipped_BR > unclipped_BR).astype(jnp.float32)
  return loss, {
    "clip_fraction": masked_mean(is_clipped_BR, is_response_BR),
    "approx_kl": 0.5 * masked_mean(jnp.square(log_ratio_BR), is_response_BR),
    "ratio_mean": masked_mean(ratio_BR, is_response_BR),
    "ratio_max": jnp.max(jnp.where(is_response_BR, ratio_BR, 0)),
  }


def clipped_value_loss(
  value_BR: jax.Array,
  old_value_BR: jax.Array,
  return_BR: jax.Array,
  is_response_BR: jax.Array,
  *,
  clip: float | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Value loss: half the mean of max((V - G)^2, (V_clipped - G)^2), as in lm-human-preferences (details item 28).

  V_clipped is V kept within clip of the value at the time of the rollout. The paper does not state its value loss.

  Args:
    value_BR: V before each token, by the value network being trained, in units of reward.
    old_value_BR: the same at the time of the rollout.
    return_BR: the target G.
    is_response_BR: True on response tokens.
    clip: half-width around old_value_BR, in units of reward; None for the plain squared error.
  Returns:
    (loss, metrics), float32 scalars.
    clip_fraction: share of tokens whose loss is the clipped one.
    explained_variance: see the function of that name.
  """
  arrays = [value_BR, old_value_BR, return_BR, is_response_BR]
  chex.assert_rank(value_BR, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, float, bool])

  value_BR, old_value_BR, return_BR = (
    jnp.where(is_response_BR, x, 0).astype(jnp.float32) for x in (value_BR, old_value_BR, return_BR)
  )
  unclipped_BR = jnp.square(value_BR - return_BR)
  if clip is None:
    clipped_BR = unclipped_BR
  else:
    value_clipped_BR = jnp.clip(value_BR, old_value_BR - clip, old_value_BR + clip)
    clipped_BR = jnp.square(value_clipped_BR - return_BR)
  loss = 0.5 * masked_mean(jnp.maximum(unclipped_BR, clipped_BR), is_response_BR)

  is_clipped_BR = (clipped_BR > unclipped_BR).astype(jnp.float32)
  return loss, {
    "clip_fraction": masked_mean(is_clipped_BR, is_response_BR),
    "explained_variance": explained_variance(value_BR, return_BR, is_response_BR),
  }


def explained_variance(value: jax.Array, return_: jax.Array, mask: jax.Array) -> jax.Array:
  """1 - mean((value - return)^2) / var(return) over the True places; 0 where all returns are equal.

  1 is a perfect fit. 0 is no better than always predicting the mean return, and below 0 is worse (details item 32).
  """
  chex.assert_equal_shape([value, return_, mask])
  chex.assert_type([value, return_, mask], [float, float, bool])
  variance = masked_var(return_, mask)
  error = masked_mean(jnp.square(jnp.where(mask, value - return_, 0)), mask)
  # The inner select keeps the branch that is not taken from dividing by 0.
  return jnp.where(variance > 0, 1 - error / jnp.where(variance > 0, variance, 1), 0)
