"""Generalised advantage estimation: how much better each token was than the value network expected.

Called by rl/experience.py. Imports no config and no model.
"""

import chex
import jax
import jax.numpy as jnp


def gae(
  reward_BR: jax.Array,
  value_BR: jax.Array,
  is_response_BR: jax.Array,
  *,
  discount: float,
  lam: float,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimates over response tokens (Schulman et al. 2016, arXiv:1506.02438).

  delta_t = r_t + discount * V_{t+1} - V_t,   A_t = delta_t + discount * lam * A_{t+1}

  An episode ends with its last response token, so V and A are 0 after it. Nothing is whitened here.

  Args:
    reward_BR: reward for emitting token t, from `kl.penalised_reward`.
    value_BR: V before token t is emitted, in units of reward.
    is_response_BR: True on response tokens, which form a prefix of each row.
    discount: 1 in the paper (C.4). The literature calls it gamma, a name that eq. 2 uses for the pretraining
      coefficient.
    lam: lambda; .95 in lm-human-preferences (details item 28), not stated in the paper.
  Returns:
    (advantage_BR, return_BR), float32, in units of reward, zero where is_response_BR is False. The return is the
    advantage plus the value. Whiten the advantage only after this (details item 27).
  """
  chex.assert_rank(reward_BR, 2)
  chex.assert_equal_shape([reward_BR, value_BR, is_response_BR])
  chex.assert_type([reward_BR, value_BR, is_response_BR], [float, float, bool])

  reward_BR = jnp.where(is_response_BR, reward_BR, 0).astype(jnp.float32)
  value_BR = jnp.where(is_response_BR, value_BR, 0).astype(jnp.float32)
  next_value_BR = jnp.pad(value_BR[:, 1:], ((0, 0), (0, 1)))
  delta_BR = reward_BR + discount * next_value_BR - value_BR

  def step(next_advantage_B, delta_B):
    advantage_B = delta_B + discount * lam * next_advantage_B
    return advantage_B, advantage_B

  # From the last column to the first. Rewards and values are 0 past the response, so delta and the advantage are too,
  # and nothing from there reaches the last token.
  _, advantage_RB = jax.lax.scan(step, jnp.zeros_like(delta_BR[:, 0]), delta_BR.T, reverse=True)
  advantage_BR = advantage_RB.T
  return advantage_BR, advantage_BR + value_BR
