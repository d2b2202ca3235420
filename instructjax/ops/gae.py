"""Generalised advantage estimation.

Called by the PPO step. Imports no config and no model.
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
  V past the last response token is 0: the episode ends there. No whitening, no stop_gradient.

  Args:
    reward_BR: reward for emitting token t: -beta * (log pi - log pi_ref), in nats, plus the reward
      model's score at the last token.
    value_BR: V before token t is emitted.
    is_response_BR: True on response tokens, which form a prefix of each row.
    discount: gamma; 1 in the paper.
    lam: lambda; .95 in lm-human-preferences, not stated in the paper.
  Returns:
    (advantage_BR, return_BR), float32, zero where is_response_BR is False. The return is the raw
    advantage plus the value, so whiten the advantage only afterwards.
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

  # Past the response delta is 0: so is the advantage there, and the carry into the last token.
  _, advantage_RB = jax.lax.scan(step, jnp.zeros_like(delta_BR[:, 0]), delta_BR.T, reverse=True)
  advantage_BR = advantage_RB.T
  return advantage_BR, advantage_BR + value_BR
