"""Sharding constraints inside traced functions: how arrays lie on the mesh.

The compiler plans its communication by them. Called by the models, rl/slots.py, rl/shared_rows.py and rl/step.py, under
`jax.set_mesh`. Every function only changes a layout, never a number. Without a mesh, or on one device, arrays pass
unchanged. Imports no model.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as PS

from instructjax.core.errors import UserError
from instructjax.core.structs import Params
from instructjax.parallel.chips import TPU_GIB
from instructjax.parallel.sharding import ROWS, spec_of

_ROWS_BESIDES_FSDP = tuple(axis for axis in ROWS if axis != "fsdp")

# Layout of decoding's copy of the weights -> mesh axes that the copy is gathered over. In neither does a step gather.
# tensor: the copy is split over `tensor` only. A step sends little (in each layer it sums two activations of a device's
#   own rows over `tensor`), but each device holds and reads a large part of the weights.
# 2d: the copy is split over `fsdp` too, as in training. A step reads less, but moves the activations of all rows.
DECODE_GATHERED = {"tensor": ("fsdp",), "2d": ()}
# Where the vocabulary is split for decoding, each device has whole blocks of so many tokens. They are the blocks that a
# token is drawn in, so a draw needs no logits of another device but those of one block (rl/sampling.py).
VOCAB_BLOCK = 256
# Share of a device's memory that the copy may take. The KV cache and the training state need the rest.
DECODE_SHARE = 0.4


def on_one_device() -> bool:
  """Whether the traced function runs without a mesh, or on a mesh of one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def shard_rows(tree: Any, *, tensor_dim: int | None = None, row_dim: int = 0) -> Any:
  """Splits rows over slice, data and fsdp, as batches are; other dimensions are whole.

  A dimension that the mesh does not divide is whole on every device.

  Args:
    tree: arrays with rows on `row_dim`.
    tensor_dim: a dimension to split over `tensor` too (the heads of a cache).
    row_dim: the dimension of the rows.
  """
  return _split(tree, {row_dim: ROWS, tensor_dim: ("tensor",)})


def shard_width(h_BTD: jax.Array) -> jax.Array:
  """Layout of a decode step's residual stream if the weights are split as in training (layout '2d').

  `fsdp` splits the width, as it splits the weights that this is multiplied with. So it cannot split the rows as well.
  """
  return _split(h_BTD, {0: _ROWS_BESIDES_FSDP, 2: ("fsdp",)})


def gather_rows(x_BTGRK: jax.Array) -> jax.Array:
  """Layout of attention's result before the output projection, if the weights are split as in training.

  Each fsdp device gets all rows, since it holds a part of the weights for all of them. Heads stay split over `tensor`.
  """
  return _split(x_BTGRK, {0: _ROWS_BESIDES_FSDP, 2: ("tensor",)})


def _split(tree: Any, wanted: dict):
  """Constrains arrays to a layout.

  Args:
    tree: arrays.
    wanted: dimension -> mesh axes to split it over, if they divide it. Key None is ignored. Other dimensions are whole.
  """
  if on_one_device():
    return tree
  mesh = jax.sharding.get_abstract_mesh()

  def one(x):
    spec = [None] * x.ndim
    for dim, axes in wanted.items():
      if dim is not None and x.shape[dim] % math.prod(mesh.shape[axis] for axis in axes) == 0:
        spec[dim] = axes
    return jax.lax.with_sharding_constraint(x, PS(*spec))

  return jax.tree.map(one, tree)


def after(first: Any, then: Any) -> tuple[Any, Any]:
  """Both unchanged, on a mesh with an order: what is made of `then` waits until `first` is computed.

  The compiler may otherwise run a network's forward pass inside another's gradient, if neither needs the other, and
  keep the activations of both.
  """
  return (first, then) if on_one_device() else jax.lax.optimization_barrier((first, then))


def whole(x: jax.Array) -> jax.Array:
  """Replicates an array on every device."""
  return x if on_one_device() else jax.lax.with_sharding_constraint(x, PS())


def _rows_axes(mesh: Mesh | AbstractMesh, num_rows: int):
  """Mesh axes that rows are split over; None if these axes do not divide the rows."""
  return None if num_rows % math.prod(mesh.shape[axis] for axis in ROWS) else ROWS


def split_columns(h_BTD: jax.Array) -> jax.Array:
  """Splits the columns of a residual stream over `tensor` (sequence parallelism).

  Norms, dropout and sums work on each column alone. Split like this they are computed and stored once, instead of by
  each of the `tensor` devices (Korthikanti et al. 2022, arXiv:2205.05198).
  """
  # A single column, here and below, belongs to a decode step, which has a layout of its own. Otherwise `tensor` need
  # not divide the columns (those of a window, say): inside a program the compiler pads.
  if on_one_device() or h_BTD.shape[1] == 1:
    return h_BTD
  mesh = jax.sharding.get_abstract_mesh()
  if h_BTD.shape[1] < mesh.shape["tensor"]:
    return shard_rows(h_BTD)
  return jax.lax.with_sharding_constraint(h_BTD, PS(_rows_axes(mesh, h_BTD.shape[0]), "tensor"))


def gather_columns(h_BTD: jax.Array) -> jax.Array:
  """Gathers the columns of a residual stream from `tensor`, for a product with weights that are split over `tensor`."""
  # The layout before and the layout after are both asked for, here and in `scatter_columns`. Then the compiler uses one
  # all-gather here, and one reduce-scatter for the gradient. Asked for the result only, it uses an all-reduce, which
  # sends twice as much, or gathers the weights instead, or unrolls the product into a ring whose additions take longer
  # than the sending that they hide.
  return h_BTD if h_BTD.shape[1] == 1 else shard_rows(split_columns(h_BTD))


def scatter_columns(h_BTD: jax.Array) -> jax.Array:
  """Sums the results of products over `tensor`, and leaves each device its own columns: one reduce-scatter."""
  return h_BTD if h_BTD.shape[1] == 1 else split_columns(shard_rows(h_BTD))


def split_products(y_BT: jax.Array, *, tensor_dim: int) -> jax.Array:
  """Keeps the result of a product split over `tensor` on `tensor_dim` (heads or hidden units), as its weights are."""
  return y_BT if y_BT.shape[1] == 1 else shard_rows(y_BT, tensor_dim=tensor_dim)


def split_vocab(table_VD: jax.Array) -> jax.Array:
  """Layout of an embedding table for the head's product: the vocabulary is split over `tensor`.

  `tensor` need not divide the vocabulary; the compiler pads.
  """
  if on_one_device():
    return table_VD
  # First split both ways, then gathered over `fsdp`. So a device gathers the width of its own vocabulary rows only, and
  # the gradient is reduce-scattered for these only.
  for spec in (PS("tensor", "fsdp"), PS("tensor", None)):
    table_VD = jax.lax.with_sharding_constraint(table_VD, spec)
  return table_VD


def split_logits(logits_BTV: jax.Array) -> jax.Array:
  """Layout of logits that were computed with a table from `split_vocab`: split over rows and vocabulary."""
  if on_one_device():
    return logits_BTV
  rows = _rows_axes(jax.sharding.get_abstract_mesh(), logits_BTV.shape[0])
  return jax.lax.with_sharding_constraint(logits_BTV, PS(rows, None, "tensor"))


def splits_vocab() -> bool:
  """Whether decoding splits the vocabulary: over `tensor`, if it has several devices."""
  return not on_one_device() and jax.sharding.get_abstract_mesh().shape["tensor"] > 1


def pad_vocab(x: jax.Array, axis: int, value: float = 0.0) -> jax.Array:
  """Lengthens the vocabulary to whole blocks on every device of `tensor`, where decoding splits it."""
  if not splits_vocab():
    return x
  multiple = VOCAB_BLOCK * jax.sharding.get_abstract_mesh().shape["tensor"]
  widths = [(0, -x.shape[axis] % multiple if dim == axis else 0) for dim in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value)


def decode_spec(axes: tuple[str, ...], layout: str) -> PS:
  """The PartitionSpec of decoding's copy of a parameter. Unlike the parameter's own, it splits the vocabulary.

  Args:
    axes: logical axis name of each dimension.
    layout: a key of DECODE_GATHERED.
  Raises:
    ValueError: a name has no rule.
  """
  spec = spec_of(axes, gathered=DECODE_GATHERED[layout])
  return PS(*("tensor" if axis == "vocab" else part for axis, part in zip(axes, spec)))


def place_for_decoding(params: Params, axes_tree: Any, layout: str) -> Any:
  """Splits decoding's copy of the parameters. Dimensions of the vocabulary are lengthened, see `pad_vocab`.

  Args:
    params, axes_tree: parameters and their logical axis names, in the same tree.
    layout: a key of DECODE_GATHERED.
  Raises:
    ValueError: a logical axis has no rule.
  """
  if on_one_device():
    return params

  def place(axes, x):
    if "vocab" in axes:
      # First split both ways: see `split_vocab`.
      x = pad_vocab(x, axes.index("vocab"))
      x = jax.lax.with_sharding_constraint(x, decode_spec(axes, "2d"))
    return jax.lax.with_sharding_constraint(x, decode_spec(axes, layout))

  return jax.tree.map(place, axes_tree, params, is_leaf=lambda node: isinstance(node, tuple))


def decode_layout(
  axes_tree: Any, shapes_tree: Any, itemsize: int, mesh: Mesh | AbstractMesh, memory: float
) -> Literal["tensor", "2d"]:
  """Chooses the layout for decoding: 'tensor' if its copy of the weights takes at most DECODE_SHARE of a device.

  The choice depends on the arguments only, so it is the same in every process, and can be made for devices that are not
  attached.

  Args:
    axes_tree, shapes_tree: of the parameters, as for `sharding.param_shardings`.
    itemsize: bytes of one element of the copy.
    mesh: a Mesh or an AbstractMesh.
    memory: bytes of one device, from `device_memory`.
  Raises:
    ValueError: a logical axis has no rule.
  """

  def local_bytes(axes, leaf):
    split = [axis for axis in decode_spec(axes, "tensor") if axis]
    return math.prod(leaf.shape) * itemsize / math.prod(mesh.shape[axis] for axis in split)

  is_axes = lambda node: isinstance(node, tuple)
  copy = jax.tree.map(local_bytes, axes_tree, shapes_tree, is_leaf=is_axes)
  return "tensor" if sum(jax.tree.leaves(copy)) <= DECODE_SHARE * memory else "2d"


def device_memory(mesh: Mesh | AbstractMesh) -> float | None:
  """Bytes that a program may use on a device of this mesh; None on CPUs, where no bound is kept.

  Args:
    mesh: a Mesh or an AbstractMesh.
  Raises:
    UserError: the devices are not attached, and the table does not have their kind.
  """
  device = mesh.abstract_mesh.abstract_device
  if device is None or device.platform == "cpu":
    return None
  if device.device_kind in TPU_GIB:
    return TPU_GIB[device.device_kind] * 2**30
  here = jax.local_devices()[0]
  if here.device_kind != device.device_kind:
    raise UserError(
      f"execution.decode_layout='auto' must know the memory of a {device.device_kind!r}, and does not; set"
      " --config.execution.decode_layout to 'tensor' or '2d'"
    )
  return float(here.memory_stats()["bytes_limit"])
