"""The KL to the frozen reference: its estimate per token, the reward that it lowers, and the adaptive coefficient.

`estimate` with `FORM`, which is `k1`, is the one estimate that everything uses: PPO's reward, its metric (which
`ppo.max_kl` limits), and the report. PPO only logs the other forms of `FORMS` beside it. Called by rl/experience.py,
rl/step.py and stages/evaluate.py. Imports no config and no model.
"""

from collections.abc import Callable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

_Numbers = TypeVar("_Numbers", jax.Array, np.ndarray)

# lm-human-preferences limits the relative error that one update of the coefficient acts on (details item 30).
_MAX_RELATIVE_ERROR = 0.2


def k1(logprob: _Numbers, ref_logprob: _Numbers) -> _Numbers:
  """log(pi / pi_ref), in nats: the KL that eq. 2 penalises, estimated from samples of pi.

  The estimate is unbiased, but a single one may be negative. It is additive: for the log-probabilities of whole
  responses it is the sum of its values for the tokens.

  Args:
    logprob: log-probability, under the policy, of what the policy sampled; of tokens or of whole responses, in nats.
    ref_logprob: the same under the frozen reference.
  """
  _check(logprob, ref_logprob)
  return logprob - ref_logprob


def k3(logprob_BR: jax.Array, ref_logprob_BR: jax.Array) -> jax.Array:
  """pi_ref / pi - 1 + log(pi / pi_ref), in nats: an estimate of the KL that is unbiased like `k1`, but never negative.

  See Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html). It is for single tokens. It is not
  additive: computed from the log-probability of a whole response it is much noisier than the sum over the tokens.

  Args:
    logprob_BR: log-probability of each token under the policy that sampled it, in nats.
    ref_logprob_BR: the same under the frozen reference.
  """
  _check(logprob_BR, ref_logprob_BR)
  chex.assert_rank(logprob_BR, 2)  # of tokens: sums over whole responses would give another number
  log_ratio_BR = logprob_BR - ref_logprob_BR
  # expm1, since both terms nearly cancel where the ratio is close to 1.
  return jnp.expm1(-log_ratio_BR) + log_ratio_BR


# Form of the estimate -> its function.
FORMS: dict[str, Callable] = {"k1": k1, "k3": k3}
FORM = "k1"  # the one in use


def estimate(logprob: _Numbers, ref_logprob: _Numbers, form: str) -> _Numbers:
  """The KL to the reference in nats, estimated from samples of the policy.

  Args:
    logprob, ref_logprob: as for `k1`. Only an additive form takes log-probabilities of whole responses.
    form: a key of FORMS.
  """
  return FORMS[form](logprob, ref_logprob)


def penalised_reward(
  score_B: jax.Array, kl_BR: jax.Array, is_response_BR: jax.Array, kl_coef: jax.Array | float
) -> jax.Array:
  """Reward per token: -beta * KL at every token, and the response's score on the last one (sec 3.5, details item 23).

  Summed over a row it is r(x, y) - beta log(pi(y | x) / pi_ref(y | x)), the first line of eq. 2.

  Args:
    score_B: reward model's score of the whole response.
    kl_BR: KL of each token, in nats.
    is_response_BR: True on response tokens, which form a prefix of each row. A row without one gets no reward.
    kl_coef: beta, reward per nat; 0.02 in the paper.
  Returns:
    reward_BR, float32, zero where is_response_BR is False.
  """
  chex.assert_rank([score_B, kl_BR], [1, 2])
  chex.assert_equal_shape([kl_BR, is_response_BR])
  chex.assert_equal_shape_prefix([score_B, kl_BR], 1)
  chex.assert_type([score_B, kl_BR, is_response_BR], [float, float, bool])

  # What stands at pads, NaN included, must not reach the reward (details item 24).
  kl_BR = jnp.where(is_response_BR, kl_BR, 0)
  is_next_response_BR = jnp.pad(is_response_BR[:, 1:], ((0, 0), (0, 1)))
  is_last_BR = is_response_BR & ~is_next_response_BR
  score_BR = jnp.where(is_last_BR, score_B[:, None], 0)
  return score_BR.astype(jnp.float32) - kl_coef * kl_BR.astype(jnp.float32)


def adaptive_coef(
  kl_coef: jax.Array | float,
  kl: jax.Array | float,
  *,
  target: float,
  horizon: float,
  num_episodes: int,
) -> jax.Array:
  """The KL coefficient after an update by the adaptive controller (details item 30).

  beta * (1 + clip(kl / target - 1, -.2, .2) * num_episodes / horizon)

  A proportional controller in log space (Ziegler et al. 2019, arXiv:1909.08593, sec 2.2). In the paper beta is fixed.

  Args:
    kl_coef: the current beta, reward per nat.
    kl: KL of a whole response, in nats: the mean over samples of the **sum** over tokens.
    target: the KL to reach, in nats; 6 in lm-human-preferences.
    horizon: number of episodes over which a relative error of 1 would change beta by a factor of e; 10000 there.
    num_episodes: episodes since the last update, which is the batch size.
  Returns:
    The new beta, float32.
  Raises:
    ValueError: target or horizon is not positive.
  """
  if target <= 0:
    raise ValueError(f"adaptive KL: target={target} must be > 0 (nats per response).")
  if horizon <= 0:
    raise ValueError(f"adaptive KL: horizon={horizon} must be > 0 (episodes).")
  relative_error = jnp.asarray(kl, jnp.float32) / target - 1
  relative_error = jnp.clip(relative_error, -_MAX_RELATIVE_ERROR, _MAX_RELATIVE_ERROR)
  return jnp.asarray(kl_coef, jnp.float32) * (1 + relative_error * (num_episodes / horizon))


def _check(logprob: _Numbers, ref_logprob: _Numbers) -> None:
  chex.assert_equal_shape([logprob, ref_logprob])
  chex.assert_type([logprob, ref_logprob], float)
