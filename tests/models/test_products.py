"""Products with weights in 8 bits and with an adapter's factors, by hand, and dropout."""

import jax
import jax.numpy as jnp
import numpy as np

from instructjax.models import products

X_BTD = np.array([[[1.0, 2.0], [0.0, -1.0]]], np.float32)


def test_a_weight_in_8_bits_by_hand():
  """Each output by its own largest number; one of zeros keeps a scale."""
  w = products.quantised(jnp.array([[127.0, 0.5, 0.0], [-63.4, -0.25, 0.0]]), 1)
  np.testing.assert_array_equal(w.values, [[127, 127, 0], [-63, -64, 0]])  # halves to even: 63.5
  np.testing.assert_allclose(w.scale, [1, 0.5 / 127, 1 / 127], rtol=1e-6)
  assert w.values.dtype == jnp.int8 and w.shape == (2, 3)
  y = products.product(X_BTD, w)
  np.testing.assert_allclose(y[0, 0], [127 - 2 * 63, (127 - 2 * 64) * 0.5 / 127, 0], rtol=1e-6)


def test_an_adapters_product_stands_beside_the_weights():
  w, a, b = jnp.eye(2), jnp.array([[1.0], [2.0]]), jnp.array([[10.0, 0.0]])
  pair = products.LowRank(a, b)
  z_BTE = products.narrow(X_BTD, pair)
  np.testing.assert_array_equal(z_BTE, [[[5], [-2]]])
  y_BTD = products.widen(products.product(X_BTD, w), z_BTE, pair)
  np.testing.assert_array_equal(y_BTD, [[[51, 2], [-20, -1]]])
  assert products.narrow(X_BTD, None) is None and products.widen("y", None, None) == "y"
  assert products.weight_name(products.low_rank_name("w_out")) == "w_out"


def test_the_gradients_of_the_factors_are_those_of_the_plain_product():
  rng = np.random.default_rng(0)
  x_BTD, a, b = (rng.normal(size=s).astype("float32") for s in ((2, 3, 4), (4, 2), (2, 5)))

  def tied(x_BTD, a, b):
    pair = products.LowRank(a, b)
    return jnp.sum(jnp.sin(products.widen(0.0, products.narrow(x_BTD, pair), pair)))

  plain = lambda x_BTD, a, b: jnp.sum(jnp.sin(x_BTD @ a @ b))
  found, expected = (jax.grad(f, argnums=(0, 1, 2))(x_BTD, a, b) for f in (tied, plain))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5), found, expected)


def test_what_is_computed_again_has_the_same_gradient():
  square = lambda x, key: {"y": x * x}
  key = jax.random.split(jax.random.key(0), 2)  # no float: it has no gradient
  loss = lambda x: jnp.sum(products.recomputed(square, x, key)["y"])
  np.testing.assert_allclose(jax.grad(loss)(jnp.array([1.0, 3.0])), [2, 6])


def test_dropout_follows_its_key_and_keeps_the_mean():
  x_BTD = jnp.ones((20, 50, 101))
  key_B = jax.random.split(jax.random.key(0), 20)
  y_BTD = products.dropout(x_BTD, key_B, 0.2)
  # A row's noise is its own, and that of its key: no matter which rows stand beside it.
  assert not np.array_equal(y_BTD[3], y_BTD[4])
  np.testing.assert_array_equal(products.dropout(x_BTD[:2], key_B[3:5], 0.2), y_BTD[3:5])
  # 52429 of 65536 are kept: the nearest there is to 0.8.
  np.testing.assert_array_equal(np.unique(y_BTD), np.float32([0.0, 65536 / 52429]))
  np.testing.assert_allclose(y_BTD.mean(), 1.0, atol=5e-3)  # 3 standard errors of 1e5 draws


def test_dropout_without_keys_is_off():
  assert products.dropout(X_BTD, None, 0.5) is X_BTD
