"""Generalised advantage estimation: by hand, against a loop, and blind to padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.ops.gae import gae

jitted_gae = jax.jit(gae, static_argnames=("discount", "lam"))


def ragged(seed, num_rows=5, num_tokens=7):
  """Random rewards, values, and masks of every kind of length, 0 and full included."""
  rng = np.random.default_rng(seed)
  lengths = np.concatenate([[0, num_tokens], rng.integers(1, num_tokens, num_rows - 2)])
  is_response_BR = np.arange(num_tokens) < lengths[:, None]
  reward_BR, value_BR = rng.normal(size=(2, num_rows, num_tokens)).astype(np.float32)
  return reward_BR, value_BR, is_response_BR


def gae_loop(reward_BR, value_BR, is_response_BR, discount, lam):
  """From the definition: A_t is the sum over k of (discount * lam)^k delta_{t+k}."""
  advantage_BR = np.zeros(reward_BR.shape)
  for b, length in enumerate(is_response_BR.sum(axis=1)):
    for t in range(length):
      for k in range(length - t):
        next_value = value_BR[b, t + k + 1] if t + k + 1 < length else 0.0
        delta = reward_BR[b, t + k] + discount * next_value - value_BR[b, t + k]
        advantage_BR[b, t] += (discount * lam) ** k * delta
  return advantage_BR


def test_hand_worked():
  # Row 0, three tokens: delta = 1 + .25 - .5, 2 + .125 - .25, 3 + 0 - .125 = .75, 1.875, 2.875.
  #   A_2 = 2.875, A_1 = 1.875 + .5 * 2.875 = 3.3125, A_0 = .75 + .5 * 3.3125 = 2.40625.
  # Row 1, the same but only two tokens: delta_1 = 2 + 0 - .25 = 1.75, A_0 = .75 + .875 = 1.625.
  reward_BR = jnp.array([[1.0, 2.0, 3.0]] * 2)
  value_BR = jnp.array([[0.5, 0.25, 0.125]] * 2)
  is_response_BR = jnp.array([[True, True, True], [True, True, False]])
  advantage_BR, return_BR = jitted_gae(reward_BR, value_BR, is_response_BR, discount=1.0, lam=0.5)
  np.testing.assert_array_equal(advantage_BR, [[2.40625, 3.3125, 2.875], [1.625, 1.75, 0]])
  np.testing.assert_array_equal(return_BR, [[2.90625, 3.5625, 3.0], [2.125, 2.0, 0]])


@pytest.mark.parametrize("discount, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_equals_the_definition(discount, lam):
  reward_BR, value_BR, is_response_BR = ragged(0)
  compute = functools.partial(jitted_gae, discount=discount, lam=lam)
  advantage_BR, return_BR = compute(reward_BR, value_BR, is_response_BR)
  expected_BR = gae_loop(reward_BR, value_BR, is_response_BR, discount, lam)
  np.testing.assert_allclose(advantage_BR, expected_BR, atol=1e-5)
  np.testing.assert_allclose(
    return_BR, np.where(is_response_BR, expected_BR + value_BR, 0), atol=1e-5
  )


def test_details_27_returns_are_raw_advantages_plus_values():
  # With discount = lam = 1 that makes the return the plain sum of the rewards still to come.
  reward_BR, value_BR, is_response_BR = ragged(1)
  _, return_BR = jitted_gae(reward_BR, value_BR, is_response_BR, discount=1.0, lam=1.0)
  masked_reward_BR = np.where(is_response_BR, reward_BR, 0)
  to_go_BR = np.cumsum(masked_reward_BR[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(return_BR, np.where(is_response_BR, to_go_BR, 0), atol=1e-5)


def test_padding_never_matters():
  reward_BR, value_BR, is_response_BR = ragged(2)

  def total(reward_BR, value_BR):
    outputs = jitted_gae(reward_BR, value_BR, is_response_BR, discount=0.9, lam=0.95)
    return jnp.sum(outputs[0] * outputs[1]), outputs

  grad = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
  clean_grads, clean = jax.device_get(grad(reward_BR, value_BR))
  with_nan = (np.where(is_response_BR, x, np.nan) for x in (reward_BR, value_BR))
  garbage_grads, garbage = jax.device_get(grad(*with_nan))
  for a, b in zip(clean + clean_grads, garbage + garbage_grads, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(b[~is_response_BR], 0)
  assert all(np.all(g[is_response_BR] != 0) for g in clean_grads)

  wider = [np.pad(x, ((0, 0), (0, 3))) for x in (reward_BR, value_BR, is_response_BR)]
  for a, b in zip(clean, jax.device_get(jitted_gae(*wider, discount=0.9, lam=0.95)), strict=True):
    np.testing.assert_array_equal(a, b[:, :-3])


def test_computes_in_float32():
  reward_BR, value_BR, is_response_BR = ragged(3)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (reward_BR, value_BR)]
  advantage_BR, return_BR = jitted_gae(*low, is_response_BR, discount=1.0, lam=0.95)
  assert advantage_BR.dtype == return_BR.dtype == jnp.float32


def test_refuses_integer_rewards():
  with pytest.raises(AssertionError):  # zeros_like(token ids) + score would truncate the score
    gae(np.ones((1, 2), int), np.ones((1, 2)), np.ones((1, 2), bool), discount=1.0, lam=1.0)
