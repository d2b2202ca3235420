"""KL estimators, the penalised reward and the adaptive coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.ops import kl as ops
from instructjax.ops.masked import masked_sum

k1, k3, penalised_reward = map(jax.jit, (ops.k1, ops.k3, ops.penalised_reward))
adaptive_coef = jax.jit(ops.adaptive_coef, static_argnames=("target", "horizon", "num_episodes"))

# target and horizon of lm-human-preferences.
CONTROLLER = dict(target=6.0, horizon=10000, num_episodes=512)


def test_estimators_are_unbiased_and_k3_is_never_negative():
  # Over all 6 outcomes the expectation is exact: sum of pi * estimate = sum of pi log(pi / ref).
  policy_BV, ref_BV = np.random.default_rng(0).dirichlet(np.ones(6), size=2)[:, None]
  kl = np.sum(policy_BV * np.log(policy_BV / ref_BV))
  logs = np.log(np.float32(policy_BV)), np.log(np.float32(ref_BV))
  for estimator in (k1, k3):
    np.testing.assert_allclose(np.sum(policy_BV * estimator(*logs)), kl, rtol=1e-5)
  assert np.all(k3(*logs) >= 0) and np.any(k1(*logs) < 0)


def test_k3_hand_worked_and_exact_near_zero():
  # log-ratio log 2: 1/2 - 1 + log 2 = .193147. For small d, k3 = d^2 / 2, where exp(-d) - 1 + d
  # would lose all digits in float32 without expm1.
  np.testing.assert_allclose(k3(np.log(np.array([[2.0]])), np.zeros((1, 1))), 0.193147, 1e-5)
  small_BR = np.full((1, 1), 1e-4)
  np.testing.assert_allclose(k3(small_BR, np.zeros((1, 1))), 0.5e-8, rtol=0.01)


def test_only_an_additive_form_takes_whole_responses():
  whole_N = np.array([-1.0, -2.0])
  np.testing.assert_array_equal(ops.estimate(whole_N, whole_N - 3, "k1"), [3.0, 3.0])
  with pytest.raises(AssertionError, match="rank"):
    ops.estimate(whole_N, whole_N, "k3")


@pytest.mark.parametrize("form", ops.FORMS)
def test_policy_and_reference_must_have_one_shape(form):
  """Not broadcast: one reference for all rows would be a wrong KL without a word."""
  with pytest.raises(AssertionError, match="shape"):
    ops.estimate(np.zeros((2, 3)), np.zeros((1, 3)), form)


def test_k1_of_whole_responses_is_the_sum_over_their_tokens():
  # As the report has it: log-probabilities that are summed already. By hand: -3 - -5 = 2.
  logprob_BR, ref_logprob_BR = np.array([[-1.0, -2.0]]), np.array([[-1.5, -3.5]])
  np.testing.assert_array_equal(k1(logprob_BR.sum(1), ref_logprob_BR.sum(1)), [2.0])
  np.testing.assert_array_equal(k1(logprob_BR, ref_logprob_BR).sum(1), [2.0])


def test_details_23_reward_of_the_published_example(published):
  # The score lands on the last token; the blog writes beta * kl, the code that it describes
  # (train_policy.py, -kl_coef * kl) and the paper's eq. 2 have the minus.
  golden = published["kl_penalty"]
  ref_logprob_BR = np.array([golden["ref_logprob"]])
  kl_BR = np.array([golden["kl"]])
  kl_BR = k1(ref_logprob_BR + kl_BR, ref_logprob_BR)
  score_B, is_response_BR = np.array([golden["score"]]), np.ones((1, 3), bool)
  reward_BR = penalised_reward(score_B, kl_BR, is_response_BR, 0.15)
  expected_BR = [[0.15 * 0.3315, 0.15 * 0.0426, -0.15 * 0.6351 + 0.4]]
  np.testing.assert_allclose(reward_BR, expected_BR, rtol=1e-5)


def test_details_23_score_lands_exactly_on_the_last_response_token():
  length_B = np.array([4, 2, 1, 0])
  is_response_BR = np.arange(4) < length_B[:, None]
  score_B = jnp.array([3.0, -1.0, 7.0, 9.0])
  reward_BR = penalised_reward(score_B, np.zeros((4, 4)), is_response_BR, 0.1)
  expected_BR = [[0, 0, 0, 3], [0, -1, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
  np.testing.assert_array_equal(reward_BR, expected_BR)


def test_reward_sums_to_eq_2_and_ignores_padding():
  rng = np.random.default_rng(1)
  is_response_BR = np.arange(5) < np.array([5, 2, 0, 1])[:, None]
  logprob_BR, ref_logprob_BR = rng.normal(size=(2, 4, 5)).astype(np.float32)
  score_B = jnp.array([1.0, 2.0, np.nan, 3.0])  # the row without a response has no score either

  def total(logprob_BR, ref_logprob_BR):
    kl_BR = k1(logprob_BR, ref_logprob_BR)
    reward_BR = penalised_reward(score_B, kl_BR, is_response_BR, np.float32(0.02))
    return jnp.sum(reward_BR), reward_BR

  grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  grads, reward_BR = jax.device_get(grad(logprob_BR, ref_logprob_BR))
  for b in (0, 1, 3):
    kl = sum(logprob_BR[b, t] - ref_logprob_BR[b, t] for t in range(is_response_BR[b].sum()))
    np.testing.assert_allclose(reward_BR[b].sum(), score_B[b] - 0.02 * kl, rtol=1e-5)
  np.testing.assert_array_equal(reward_BR[~is_response_BR], 0)

  garbage = (np.where(is_response_BR, x, np.nan) for x in (logprob_BR, ref_logprob_BR))
  garbage_grads, garbage_reward_BR = grad(*garbage)
  np.testing.assert_array_equal(garbage_reward_BR, reward_BR)
  for grad, sign in zip(garbage_grads, (-1, 1), strict=True):
    np.testing.assert_allclose(grad, np.where(is_response_BR, sign * 0.02, 0), rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, grads, garbage_grads)


@pytest.mark.parametrize(
  "kl, expected",
  [
    (7.0, 0.15 * (1 + (1 / 6) * 0.0512)),  # inside the clip: error 7/6 - 1
    (100.0, 0.15 * (1 + 0.2 * 0.0512)),
    (0.0, 0.15 * (1 - 0.2 * 0.0512)),
    (-3.0, 0.15 * (1 - 0.2 * 0.0512)),  # a sampled KL may be negative
    (6.0, 0.15),
  ],
)
def test_details_30_adaptive_kl(kl, expected):
  np.testing.assert_allclose(adaptive_coef(0.15, kl, **CONTROLLER), expected, rtol=1e-6)


def test_details_30_kl_is_summed_over_tokens():
  # 24 tokens of .25 nats are 6 nats a response, which is the target: the coefficient stays. Their
  # mean would be .25 and would lower it.
  kl_BR = k1(np.full((2, 24), -1.0), np.full((2, 24), -1.25))
  kl = np.mean(masked_sum(kl_BR, np.ones((2, 24), bool), axis=1))
  assert adaptive_coef(0.15, kl, **CONTROLLER) == np.float32(0.15)


@pytest.mark.parametrize("name", ["target", "horizon"])
@pytest.mark.parametrize("value", [0, -1.0])
def test_adaptive_kl_refuses(name, value):
  with pytest.raises(ValueError, match=f"{name}={value}"):
    adaptive_coef(0.15, 6.0, **CONTROLLER | {name: value})
