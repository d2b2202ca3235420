"""Advantages without a value network: each answer is compared with the other answers to its prompt (RLOO, GRPO).

Called by rl/experience.py. Imports no config and no model.

Rows are answers. The K answers to a prompt are K consecutive rows.
"""

import chex
import jax
import jax.numpy as jnp

# Keeps a group of equal rewards from dividing by 0; as in `masked.masked_whiten`.
_LEAST_VARIANCE = 1e-8


def leave_one_out(reward_B: jax.Array, num_answers: int) -> jax.Array:
  """RLOO: an answer's reward, less the mean reward of the other answers to its prompt.

  A_i = R_i - 1 / (K - 1) * sum over j != i of R_j

  See Ahmadian et al. 2024, arXiv:2402.14740, sec 3.2 (Kool et al. 2019). The baseline does not depend on the answer
  that it is compared with, so it adds no bias.

  Args:
    reward_B: of whole answers, in units of reward. There, it is the score less beta times the KL of the whole answer.
    num_answers: K, at least 2; divides the rows.
  Returns:
    float32 [B], which adds up to 0 over the answers to a prompt.
  """
  reward_NK = _groups(reward_B, num_answers)
  # The mean of the others is (sum - R_i) / (K - 1), so the difference is K / (K - 1) times that to the mean of all.
  deviation_NK = reward_NK - jnp.mean(reward_NK, axis=1, keepdims=True)
  return (deviation_NK * (num_answers / (num_answers - 1))).reshape(-1)


def group_normalised(score_B: jax.Array, num_answers: int) -> jax.Array:
  """GRPO: an answer's score, shifted and scaled to mean 0 and variance 1 over the answers to its prompt.

  A_i = (r_i - mean(r)) / std(r)

  See Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, sec 4.1.2, outcome supervision. The paper does not say which
  standard deviation it takes; here it is that of the K answers themselves, whose squares are divided by K.

  Args:
    score_B: of whole answers. There, the KL is not in it but in the loss.
    num_answers: K, at least 2; divides the rows.
  Returns:
    float32 [B]; 0 for the answers to a prompt that all have the same score.
  """
  score_NK = _groups(score_B, num_answers)
  deviation_NK = score_NK - jnp.mean(score_NK, axis=1, keepdims=True)
  variance_N1 = jnp.mean(jnp.square(deviation_NK), axis=1, keepdims=True)
  return (deviation_NK * jax.lax.rsqrt(variance_N1 + _LEAST_VARIANCE)).reshape(-1)


def _groups(x_B: jax.Array, num_answers: int) -> jax.Array:
  """[prompts, answers], float32."""
  chex.assert_rank(x_B, 1)
  chex.assert_type(x_B, float)
  return x_B.astype(jnp.float32).reshape(-1, num_answers)
