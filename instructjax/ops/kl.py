"""KL to the frozen reference: estimators, the penalised reward, the adaptive coefficient.

Called by the PPO step and by the evaluations. Imports no config and no model.
"""

import chex
import jax
import jax.numpy as jnp

# lm-human-preferences bounds the relative error that one update may act on.
_MAX_RELATIVE_ERROR = 0.2


def kl_k1(logprob_BR: jax.Array, ref_logprob_BR: jax.Array) -> jax.Array:
  """Per-token estimate log(pi / pi_ref), in nats: unbiased under samples from pi, of either sign.

  This is the KL that the paper's objective (eq. 2) penalises.
  """
  _check(logprob_BR, ref_logprob_BR)
  return logprob_BR - ref_logprob_BR


def kl_k3(logprob_BR: jax.Array, ref_logprob_BR: jax.Array) -> jax.Array:
  """Per-token estimate pi_ref / pi - 1 + log(pi / pi_ref), in nats: unbiased, never negative.

  See Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). For logging.
  """
  _check(logprob_BR, ref_logprob_BR)
  log_ratio_BR = logprob_BR - ref_logprob_BR
  return jnp.expm1(-log_ratio_BR) + log_ratio_BR


def kl_penalised_reward(
  score_B: jax.Array,
  logprob_BR: jax.Array,
  ref_logprob_BR: jax.Array,
  is_response_BR: jax.Array,
  kl_coef: jax.Array | float,
) -> jax.Array:
  """Reward per token: -kl_coef * (log pi - log pi_ref), plus the score on the last one.

  Summed over a row it is the paper's eq. 2 without the pretraining term.

  Args:
    score_B: reward model's score of the whole response.
    logprob_BR: log-probability of each sampled token under the policy, in nats.
    ref_logprob_BR: the same under the frozen reference.
    is_response_BR: True on response tokens, which form a prefix of each row. A row without any gets
      no reward.
    kl_coef: beta; 0.02 in the paper.
  Returns:
    reward_BR, float32, zero where masked.
  """
  arrays = [logprob_BR, ref_logprob_BR, is_response_BR]
  chex.assert_rank([score_B, logprob_BR], [1, 2])
  chex.assert_equal_shape(arrays)
  chex.assert_equal_shape_prefix([score_B, logprob_BR], 1)
  chex.assert_type([score_B, *arrays], [float, float, float, bool])

  kl_BR = jnp.where(is_response_BR, kl_k1(logprob_BR, ref_logprob_BR), 0)
  is_next_response_BR = jnp.pad(is_response_BR[:, 1:], ((0, 0), (0, 1)))
  is_last_BR = is_response_BR & ~is_next_response_BR
  score_BR = jnp.where(is_last_BR, score_B[:, None], 0)
  return score_BR.astype(jnp.float32) - kl_coef * kl_BR.astype(jnp.float32)


def adaptive_kl_coef(
  kl_coef: jax.Array | float,
  kl: jax.Array | float,
  *,
  target: float,
  horizon: float,
  num_episodes: int,
) -> jax.Array:
  """kl_coef * (1 + clip(kl / target - 1, -.2, .2) * num_episodes / horizon).

  Proportional controller in log space (Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2).

  Args:
    kl_coef: beta in use.
    kl: KL of a whole response, in nats: mean over samples of the **sum** over tokens.
    target: the KL aimed at, in nats; 6 in lm-human-preferences.
    horizon: episodes over which an error of 1 would change beta by a factor of e; 10000 there.
    num_episodes: episodes since the last update: the batch size.
  Returns:
    The new coefficient, float32.
  """
  if target <= 0:
    raise ValueError(f"adaptive KL: target={target} must be > 0 (nats per response).")
  if horizon <= 0:
    raise ValueError(f"adaptive KL: horizon={horizon} must be > 0 (episodes).")
  relative_error = jnp.asarray(kl, jnp.float32) / target - 1
  relative_error = jnp.clip(relative_error, -_MAX_RELATIVE_ERROR, _MAX_RELATIVE_ERROR)
  return jnp.asarray(kl_coef, jnp.float32) * (1 + relative_error * (num_episodes / horizon))


def _check(logprob_BR: jax.Array, ref_logprob_BR: jax.Array) -> None:
  chex.assert_equal_shape([logprob_BR, ref_logprob_BR])
  chex.assert_type([logprob_BR, ref_logprob_BR], float)
