"""Products of activations with weights: whole, in 8 bits, and with an adapter's factors beside them.

Called by layers.py and adapters.py. Dimension letters as in layers.py; E is the rank of an adapter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, pytree
from instructjax.parallel import constraints


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("w_a", "w_b", "key_B"),
  meta_fields=("dropout_rate",),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """An addition to a weight: the product of two factors, of which the second holds the scale alpha / rank.

  Attributes:
    w_a: the weight's input dimensions, and the rank E.
    w_b: the rank E, and the weight's output dimensions.
    key_B: a typed key for each row, of the dropout before A; None for none.
    dropout_rate: static.
  """

  w_a: Array
  w_b: Array
  key_B: Array | None = None
  dropout_rate: float = 0.0


@pytree
class Int8:
  """A weight in 8 bits: whole numbers from -127 to 127, times a scale for each output.

  Attributes:
    values: int8, in the weight's shape.
    scale: float32, in the shape of the weight's output dimensions.
  """

  values: Array
  scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    """The weight's."""
    return self.values.shape


def quantised(w: Array, inputs: int) -> Int8:
  """A weight rounded to 8 bits, each output by its own largest number.

  Args:
    w: float weight.
    inputs: how many of its first dimensions are contracted.
  """
  axes = tuple(range(inputs))
  largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.0).astype(jnp.float32) / 127
  return Int8(jnp.round(w / scale).astype(jnp.int8), scale.squeeze(axes))


def low_rank_name(weight: str) -> str:
  """Where a layer's dict has the addition to a weight, if the network is adapted."""
  return f"low_rank/{weight}"


def weight_name(low_rank: str) -> str:
  """The weight that an addition belongs to."""
  return low_rank.partition("/")[2]


def product(x_BTD, w):
  """x_BTD times weights of shape [D, ...]."""
  if isinstance(w, Int8):
    y = product(x_BTD, w.values.astype(x_BTD.dtype))
    return (y.astype(jnp.float32) * w.scale[None, None]).astype(x_BTD.dtype)
  # On one device as a product of two matrices: with more dimensions XLA's CPU backend computes the gradients in another
  # order, and copies them and the weights. On a mesh the dimensions stay apart: a joined one (2F, say) could not stay
  # split over `tensor`, and would be gathered.
  if constraints.on_one_device():
    y = x_BTD.reshape(-1, w.shape[0]) @ w.reshape(w.shape[0], -1)
    return y.reshape(*x_BTD.shape[:2], *w.shape[1:])
  return jnp.tensordot(x_BTD, w, axes=1)


@jax.custom_vjp
def _factor_product(x_BTD, w):
  """`product` with a factor of an adapter, whose gradient is computed before that of x.

  XLA puts off the gradients of all layers' factors to the end, and keeps what they are made of until then: for a
  network of 30 layers more than a half of the memory of a step.
  """
  return product(x_BTD, w)


def _factor_gradient(kept, dy):
  x_BTD, w = kept
  dx_BTD, dw = jax.vjp(product, x_BTD, w)[1](dy)
  if constraints.on_one_device():
    if w.ndim == 2 and w.shape[0] > w.shape[1]:
      # The other way round, with few rows in place of few columns, which XLA's CPU backend multiplies much faster.
      wide = dy.reshape(-1, w.shape[1]).T @ x_BTD.reshape(-1, w.shape[0])
      dw = jax.lax.optimization_barrier(wide).T.astype(w.dtype)
    dx_BTD = dx_BTD + _zero(dw).astype(dx_BTD.dtype)
  return dx_BTD, dw


_factor_product.defvjp(lambda x_BTD, w: (product(x_BTD, w), (x_BTD, w)), _factor_gradient)


def narrow(x_BTD, pair: LowRank | None):
  """x A, the narrow half of an adapter's product with x; None without an adapter."""
  if pair is None:
    return None
  x_BTD = dropout(x_BTD, pair.key_B, pair.dropout_rate)
  # Needed whole by every device that holds a part of B's columns.
  z_BTE = _factor_product(x_BTD, pair.w_a.reshape(-1, pair.w_a.shape[-1]))
  # A single column belongs to a decode step, which has a layout of its own.
  return z_BTE if z_BTE.shape[1] == 1 else constraints.shard_rows(z_BTE)


def widen(y, z_BTE, pair: LowRank | None, place=lambda y: y):
  """y, the product of x with a weight, and to it z B, with z from `narrow`; y itself without an adapter.

  Args:
    y: in the layout that `place` gives it.
    z_BTE, pair: of the weight.
    place: layout of the result on a mesh.
  """
  return y if pair is None else y + place(_factor_product(z_BTE, pair.w_b))


def recomputed(function, *args):
  """Calls a function of which the backward pass keeps the arguments only, and calls it again.

  On one device that happens no sooner than the gradient of its result is there. `jax.checkpoint` alone does not see to
  it: XLA's CPU backend then computes it early for many layers, and keeps the results. On a mesh it is `jax.checkpoint`.
  """
  if not constraints.on_one_device():
    return jax.checkpoint(function)(*args)

  def gradient(kept, d_result):
    zero = _zero(jax.tree.leaves(d_result)[-1])  # z, which A's gradient needs anyway
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    late = jax.tree.map(lambda x: x + zero.astype(x.dtype) if is_float(x) else x, kept)
    return jax.vjp(function, *late)[1](d_result)

  run = jax.custom_vjp(function)
  run.defvjp(lambda *args: (function(*args), args), gradient)
  return run(*args)


def _zero(x):
  """0 times a number of x, for which XLA must have computed x, since it could be NaN."""
  return 0 * x[(0,) * x.ndim]


def dropout(x_BTD, key_B, rate: float):
  """Inverted dropout: sets elements to 0 with probability `rate`, and scales the others to keep the expectation.

  The rate is rounded to a multiple of 2 ** -16. The scale uses the rounded rate, so the expectation is exact.

  Args:
    x_BTD: any float dtype.
    key_B: a typed key for each row; None switches dropout off.
    rate: static, in [0, 1).
  """
  if key_B is None:
    return x_BTD
  # 16 random bits decide on an element, so one 32-bit word serves two: half of the random bits to generate.
  kept = round((1.0 - rate) * 2**16)
  shape = (x_BTD.shape[1], (x_BTD.shape[2] + 1) // 2)
  word_BTE = jax.vmap(lambda key: jax.random.bits(key, shape))(key_B)
  keep_BTD = jnp.concatenate([word_BTE & 0xFFFF < kept, word_BTE >> 16 < kept], axis=2)
  scale_BTD = jnp.where(keep_BTD[:, :, : x_BTD.shape[2]], 2**16 / kept, 0.0)
  return x_BTD * scale_BTD.astype(x_BTD.dtype)
