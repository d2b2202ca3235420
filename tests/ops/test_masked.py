"""Masked statistics: hand-worked numbers, published ones, and no leak from masked places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.ops import masked

# Compiled as a whole: op by op the tests would mostly compile.
masked_mean, masked_sum = (
  jax.jit(fn, static_argnames="axis") for fn in (masked.masked_mean, masked.masked_sum)
)
masked_var = jax.jit(masked.masked_var)
masked_whiten = jax.jit(masked.masked_whiten, static_argnames="shift_mean")

NAN = float("nan")
X = np.array([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
MASK = np.array([[True, True, False], [True, False, False]])
STATISTICS = {
  "sum": masked_sum,
  "mean": masked_mean,
  "var": masked_var,
  "whiten": lambda x, mask: masked_sum(jnp.exp(masked_whiten(x, mask)), mask),
}


def test_hand_worked():
  # 1, 2, 6: sum 9, mean 3, squared deviations 4 + 1 + 9 = 14.
  assert masked_sum(X, MASK) == masked.masked_sum(X, MASK) == 9  # compiled or not
  assert masked_mean(X, MASK) == 3
  np.testing.assert_allclose(masked_var(X, MASK), 14 / 3, rtol=1e-6)
  # (1 - 3, 2 - 3, 6 - 3) / sqrt(14 / 3) = (-2, -1, 3) * 0.46291
  whitened = np.array([[-0.92582, -0.46291, 0], [1.38873, 0, 0]])
  np.testing.assert_allclose(masked_whiten(X, MASK), whitened, atol=1e-5)
  kept_mean = np.where(MASK, whitened + 3, 0)
  np.testing.assert_allclose(masked_whiten(X, MASK, shift_mean=False), kept_mean, atol=1e-5)


def test_any_of_some_ids():
  token = np.array([[1, 2], [3, 9]])
  for ids, expected in (((), []), ((2,), [2]), ((3, 1), [1, 3]), ((9, 9, 7), [9])):
    np.testing.assert_array_equal(masked.is_any(token, ids), np.isin(token, expected))


def test_axis():
  np.testing.assert_array_equal(masked_sum(X, MASK, axis=1), [3, 6])
  np.testing.assert_array_equal(masked_mean(X, MASK, axis=1), [1.5, 6])
  np.testing.assert_array_equal(masked_mean(X, MASK, axis=0), [3.5, 2, 0])  # empty column: 0


@pytest.mark.parametrize("name", STATISTICS)
def test_equals_the_subset(name):
  fn = jax.jit(jax.value_and_grad(STATISTICS[name]))
  subset = jnp.array([1.0, 2.0, 6.0])
  value, grad = jax.device_get(fn(X, MASK))
  subset_value, subset_grad = fn(subset, np.ones(3, bool))
  np.testing.assert_allclose(value, subset_value, rtol=1e-6)
  np.testing.assert_allclose(grad[MASK], subset_grad, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(grad[~MASK], 0)


@pytest.mark.parametrize("name", STATISTICS)
def test_empty_mask(name):
  value, grad = jax.jit(jax.value_and_grad(STATISTICS[name]))(X, np.zeros_like(MASK))
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


def test_whiten_is_zero_where_masked_even_when_the_mean_is_kept():
  for shift_mean in (True, False):
    whitened = np.asarray(masked_whiten(X, MASK, shift_mean=shift_mean))
    np.testing.assert_array_equal(whitened[~MASK], 0)


def test_whiten_of_equal_values_is_finite():
  x = np.full((2, 3), 5.0)
  np.testing.assert_array_equal(masked_whiten(x, np.ones((2, 3), bool)), 0)


def test_details_25_whitening_keeps_mean(published):
  golden = published["whitening"]
  reward = jnp.array(golden["reward"])
  whitened = masked_whiten(reward, np.ones((3, 3), bool), shift_mean=False)
  np.testing.assert_allclose(whitened, golden["whitened_mean_kept"], rtol=2e-6)
  np.testing.assert_allclose(masked_mean(whitened, np.ones((3, 3), bool)), 1.6, rtol=1e-6)


def test_details_25_variance_is_biased(published):
  golden = published["whitening"]
  reward, mask = jnp.array(golden["reward"]), np.ones((3, 3), bool)
  variance = masked_var(reward, mask)
  np.testing.assert_allclose(variance, golden["var_tensorflow"], rtol=1e-6)
  # Nine rewards: dividing by 8, as torch.var does, gives another number.
  np.testing.assert_allclose(variance * 9 / 8, golden["var_torch_unbiased"], rtol=1e-6)
  whitened = masked_whiten(reward, mask)
  np.testing.assert_allclose(np.mean(np.square(whitened)), 1, rtol=1e-5)


def test_sums_bfloat16_in_float32():
  x = jnp.ones((4099,), jnp.bfloat16)  # the nearest bfloat16 is 4096
  total = masked_sum(x, np.ones((4099,), bool))
  assert total.dtype == jnp.float32 and total == 4099


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_refuses_wrong_types_and_shapes(statistic):
  with pytest.raises(AssertionError):
    statistic(jnp.array([1, 2]), jnp.array([True, False]))  # would truncate
  with pytest.raises(AssertionError):
    statistic(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]))
  with pytest.raises(AssertionError):
    statistic(np.ones((2, 3)), np.ones((2, 1), bool))
