"""PPO's clipped losses: by hand, against a loop, published numbers, and blind to padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.ops.surrogate import clipped_surrogate, clipped_value_loss, explained_variance

explained_variance = jax.jit(explained_variance)
surrogate = jax.jit(functools.partial(clipped_surrogate, clip=0.2))
surrogate_grad = jax.jit(
  jax.value_and_grad(functools.partial(clipped_surrogate, clip=0.2), has_aux=True)
)

ALL_4 = np.ones((1, 4), bool)


def random_batch(seed, num_arrays):
  rng = np.random.default_rng(seed)
  is_response_BR = np.arange(6) < np.array([6, 3, 0, 1])[:, None]
  return [*rng.normal(size=(num_arrays, 4, 6)).astype(np.float32), is_response_BR]


def test_surrogate_hand_worked():
  # ratio, A:        1.5, 1   1.5, -1   .5, 1   .5, -1
  # -A * ratio:     -1.5      1.5       -.5     .5
  # -A * clipped:   -1.2      1.2       -.8     .8
  # loss, the max:  -1.2*     1.5       -.5     .8*     (* clipped)  mean .6 / 4 = .15
  log_ratio_BR = np.log(np.array([[1.5, 1.5, 0.5, 0.5]]))
  advantage_BR = np.array([[1.0, -1.0, 1.0, -1.0]])
  behaviour_BR = np.full((1, 4), -2.0)
  (loss, metrics), grad_BR = surrogate_grad(
    behaviour_BR + log_ratio_BR, behaviour_BR, advantage_BR, ALL_4
  )
  np.testing.assert_allclose(loss, 0.15, rtol=1e-6)
  assert metrics["clip_fraction"] == 0.5
  approx_kl = 0.5 * (2 * math.log(1.5) ** 2 + 2 * math.log(0.5) ** 2) / 4
  np.testing.assert_allclose(metrics["approx_kl"], approx_kl, rtol=1e-6)
  np.testing.assert_allclose(metrics["ratio_mean"], 1.0, rtol=1e-6)
  np.testing.assert_allclose(metrics["ratio_max"], 1.5, rtol=1e-6)
  # Clipped tokens push no more; the others have d loss / d logprob = -A * ratio / 4.
  np.testing.assert_allclose(grad_BR, [[0, 1.5 / 4, -0.5 / 4, 0]], rtol=1e-6)


def test_surrogate_equals_a_loop():
  logprob_BR, behaviour_BR, advantage_BR, is_response_BR = batch = random_batch(0, 3)
  loss, metrics = surrogate(*batch)
  losses, clipped, ratios = [], [], []
  for b, t in np.argwhere(is_response_BR):
    ratio = math.exp(logprob_BR[b, t] - behaviour_BR[b, t])
    objective = ratio * advantage_BR[b, t]
    kept = min(max(ratio, 0.8), 1.2) * advantage_BR[b, t]
    losses.append(-min(objective, kept))
    clipped.append(kept < objective)
    ratios.append(ratio)
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics["clip_fraction"], np.mean(clipped), rtol=1e-6)
  np.testing.assert_allclose(metrics["ratio_mean"], np.mean(ratios), rtol=1e-5)
  np.testing.assert_allclose(metrics["ratio_max"], np.max(ratios), rtol=1e-5)


def test_details_8_first_minibatch_has_ratio_one_and_the_policy_gradient():
  logprob_BR, advantage_BR, is_response_BR = random_batch(1, 2)
  (_, metrics), grad_BR = surrogate_grad(logprob_BR, logprob_BR, advantage_BR, is_response_BR)
  assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
  assert metrics["approx_kl"] == metrics["clip_fraction"] == 0
  expected_BR = np.where(is_response_BR, -advantage_BR / is_response_BR.sum(), 0)
  np.testing.assert_allclose(grad_BR, expected_BR, rtol=1e-6)


def test_details_24_masked_ratio_is_one():
  # lm-human-preferences writes 1.0 into masked log-probs, so that the ratio there is 1 and the KL
  # 0. Any other content, NaN included, must do the same; and all-masked must stay finite.
  *arrays, is_response_BR = random_batch(2, 3)
  outcomes = [
    surrogate_grad(*(np.where(is_response_BR, x, filler) for x in arrays), is_response_BR)
    for filler in (1.0, 500.0, np.nan, np.inf)
  ]
  (_, _), grad_BR = jax.device_get(outcomes[0])
  np.testing.assert_array_equal(grad_BR[~is_response_BR], 0)
  for other in outcomes[1:]:
    jax.tree.map(np.testing.assert_array_equal, outcomes[0], other)

  nothing = np.zeros_like(is_response_BR)
  (loss, metrics), grad_BR = surrogate_grad(*arrays, nothing)
  assert loss == 0 and not np.any(grad_BR) and not any(metrics.values())


@pytest.mark.parametrize(
  "run", ["tensorflow_adam", "pytorch_adam", "tensorflow_style_adam_in_torch"]
)
def test_details_32_approx_kl_and_ratio_of_published_runs(published, run):
  # The blog prints mean and variance of the log-ratio next to approxkl, and its largest value next
  # to ratio_max: two tokens at mean +- sd have that mean and variance, whatever the rest was.
  golden = published["two_epochs_of_gpt2"][run]
  mean, sd = golden["logprob_diff_mean"], math.sqrt(golden["logprob_diff_var"])
  zero_BR = np.zeros((1, 2))
  both = np.ones((1, 2), bool)
  metrics = surrogate(np.array([[mean + sd, mean - sd]]), zero_BR, zero_BR, both)[1]
  np.testing.assert_allclose(metrics["approx_kl"], golden["approxkl"], rtol=1e-5)
  metrics = surrogate(np.array([[golden["logprob_diff_max"], 0.0]]), zero_BR, zero_BR, both)[1]
  np.testing.assert_allclose(metrics["ratio_max"], golden["ratio_max"], rtol=1e-5)


def test_value_loss_hand_worked():
  # V 1, old .5, clip .2: V_clipped .7.     G 0: max(1, .49) = 1.   G 2: max(1, 1.69) = 1.69*.
  # V .6, old .5: V_clipped .6.             G 1: .16.               V 0: V_clipped .3, G .1:
  # max(.01, .04) = .04*.   loss = (1 + 1.69 + .16 + .04) / 2 / 4 = .36125    (* clipped)
  value_BR = np.array([[1.0, 1.0, 0.6, 0.0]])
  old_value_BR = np.full((1, 4), 0.5)
  return_BR = np.array([[0.0, 2.0, 1.0, 0.1]])
  loss_of = jax.jit(
    jax.value_and_grad(functools.partial(clipped_value_loss, clip=0.2), has_aux=True)
  )
  (loss, metrics), grad_BR = loss_of(value_BR, old_value_BR, return_BR, ALL_4)
  np.testing.assert_allclose(loss, 0.36125, rtol=1e-6)
  assert metrics["clip_fraction"] == 0.5
  # (V - G) / 4 where not clipped.
  np.testing.assert_allclose(grad_BR, [[1 / 4, 0, -0.4 / 4, 0]], rtol=1e-5)


def test_value_loss_without_clip_is_half_the_squared_error():
  value_BR, old_value_BR, return_BR, is_response_BR = batch = random_batch(3, 3)
  loss, metrics = jax.jit(functools.partial(clipped_value_loss, clip=None))(*batch)
  expected = 0.5 * np.mean(np.square(value_BR - return_BR)[is_response_BR])
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert metrics["clip_fraction"] == 0


def test_details_28_value_loss_equals_a_loop():
  value_BR, old_value_BR, return_BR, is_response_BR = batch = random_batch(4, 3)
  loss, metrics = jax.jit(functools.partial(clipped_value_loss, clip=0.2))(*batch)
  losses, clipped = [], []
  for b, t in np.argwhere(is_response_BR):
    v, old, g = value_BR[b, t], old_value_BR[b, t], return_BR[b, t]
    kept = min(max(v, old - 0.2), old + 0.2)
    losses.append(0.5 * max((v - g) ** 2, (kept - g) ** 2))
    clipped.append((kept - g) ** 2 > (v - g) ** 2)
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics["clip_fraction"], np.mean(clipped), rtol=1e-6)


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_ignores_padding(clip):
  *arrays, is_response_BR = random_batch(5, 3)
  loss_of = jax.jit(
    jax.value_and_grad(functools.partial(clipped_value_loss, clip=clip), has_aux=True)
  )
  clean = jax.device_get(loss_of(*arrays, is_response_BR))
  garbage = loss_of(*(np.where(is_response_BR, x, np.nan) for x in arrays), is_response_BR)
  jax.tree.map(np.testing.assert_array_equal, clean, garbage)
  np.testing.assert_array_equal(clean[1][~is_response_BR], 0)


def test_details_32_explained_variance():
  # Returns 1, 2, 3 have variance 2/3. Errors 0; (1, 0, 1) -> 2/3; (2, 0, 2) -> 8/3.
  return_BR, mask = np.array([[1.0, 2.0, 3.0, np.nan]]), np.array([[True, True, True, False]])
  for value, expected in (([1, 2, 3], 1), ([2, 2, 2], 0), ([3, 2, 1], -3)):
    value_BR = np.array([[*value, 7]], jnp.float32)
    np.testing.assert_allclose(explained_variance(value_BR, return_BR, mask), expected, atol=1e-6)
  assert explained_variance(value_BR, np.full((1, 4), 2.0), mask) == 0


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("loss", [clipped_surrogate, clipped_value_loss])
def test_arguments_of_another_shape_are_refused(loss, which):
  """Not broadcast: one row of old values for all would be a wrong loss without a word."""
  arguments = random_batch(6, 3)
  loss(*arguments, clip=0.2)
  arguments[which] = arguments[which][:1]
  with pytest.raises(AssertionError):
    loss(*arguments, clip=0.2)
