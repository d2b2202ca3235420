"""How arrays lie on the mesh inside a traced function: constraints that the compiler plans its communication by.

Called by the models, batching, episodes and PPO's step, under `jax.set_mesh`. Every function is only a layout: no
number changes, and without a mesh, or on one device, arrays pass unchanged. Imports no model.
"""

import functools
import math
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as PS

from instructjax.core.errors import UserError
from instructjax.core.structs import Params
from instructjax.parallel.chips import TPU_GIB
from instructjax.parallel.sharding import ROWS, spec_of

_ROWS_BESIDES_FSDP = tuple(axis for axis in ROWS if axis != "fsdp")

# How decoding splits its copy of the weights -> mesh axes that it is not split over.
# tensor: a step sums two activations of a device's own rows a layer over `tensor`, and reads most of the weights.
# 2d: the weights lie as in training, and a step moves the activations of all rows to them.
DECODE_GATHERED = {"tensor": ("fsdp",), "2d": ()}
DECODE_SHARE = (
  0.4  # of a device's memory is what the copy may take: cache and training state lie beside it
)


def on_one_device() -> bool:
  """Inside a traced function: whether no mesh splits anything."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def shard_rows(tree: Any, *, tensor_dim: int | None = None, row_dim: int = 0) -> Any:
  """Inside a traced function under `jax.set_mesh`: keep rows split over slice, data and fsdp.

  Only a layout: without a mesh, or where rows do not divide, arrays pass unchanged.

  Args:
    tree: arrays with rows on `row_dim`.
    tensor_dim: dimension to split over `tensor` besides (heads of a cache).
    row_dim: which dimension the rows are.
  """
  return _split(tree, {row_dim: ROWS, tensor_dim: ("tensor",)})


def shard_width(h_BTD: jax.Array) -> jax.Array:
  """As `shard_rows`, for a residual stream that meets weights split as in training: fsdp splits its width."""
  return _split(h_BTD, {0: _ROWS_BESIDES_FSDP, 2: ("fsdp",)})


def gather_rows(x_BTGRK: jax.Array) -> jax.Array:
  """As `shard_rows`, with every row of what the heads give on each fsdp device, for weights split as in training."""
  return _split(x_BTGRK, {0: _ROWS_BESIDES_FSDP, 2: ("tensor",)})


def _split(tree: Any, wanted: dict):
  """Constrains arrays: dimension -> mesh axes to split it over, where they divide it; all else is whole."""
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


def whole(x: jax.Array) -> jax.Array:
  """Inside a traced function under `jax.set_mesh`: the array whole on every device."""
  return x if on_one_device() else jax.lax.with_sharding_constraint(x, PS())


def _rows_axes(mesh: Mesh | AbstractMesh, num_rows: int):
  """Mesh axes that rows are split over: none where they do not divide."""
  return None if num_rows % math.prod(mesh.shape[axis] for axis in ROWS) else ROWS


def split_columns(h_BTD: jax.Array) -> jax.Array:
  """Inside a traced function under `jax.set_mesh`: a residual stream with its columns split over `tensor`.

  What works on each column alone (norms, dropout, sums) is then done once, not by each of the `tensor` devices, and
  kept once (Korthikanti et al. 2022, arXiv:2205.05198). Only a layout, like `shard_rows`; columns need not divide, as
  those of a window do not: inside a program the compiler pads. A single column, here and below, is a decode step's,
  which has a layout of its own.
  """
  if on_one_device() or h_BTD.shape[1] == 1:
    return h_BTD
  mesh = jax.sharding.get_abstract_mesh()
  if h_BTD.shape[1] < mesh.shape["tensor"]:
    return shard_rows(h_BTD)
  return jax.lax.with_sharding_constraint(h_BTD, PS(_rows_axes(mesh, h_BTD.shape[0]), "tensor"))


def gather_columns(h_BTD: jax.Array) -> jax.Array:
  """The same stream with whole columns, as products with weights that are split over `tensor` want it.

  Both layouts are asked for, here and in `scatter_columns`, so that each way is one all-gather, and backwards one
  reduce-scatter. Asked for the result only, the compiler all-reduces, which sends twice as much, or gathers the
  weights instead, or unrolls the product into a ring whose additions take longer than what they hide.
  """
  return h_BTD if h_BTD.shape[1] == 1 else shard_rows(split_columns(h_BTD))


def scatter_columns(h_BTD: jax.Array) -> jax.Array:
  """The other way: sums over `tensor` of what such products yield, each device keeping its columns."""
  return h_BTD if h_BTD.shape[1] == 1 else split_columns(shard_rows(h_BTD))


def split_products(y_BT: jax.Array, *, tensor_dim: int) -> jax.Array:
  """What products with weights that are split over `tensor` yield: heads or hidden units stay split."""
  return y_BT if y_BT.shape[1] == 1 else shard_rows(y_BT, tensor_dim=tensor_dim)


def split_vocab(table_VD: jax.Array) -> jax.Array:
  """Inside a traced function under `jax.set_mesh`: an embedding table as the head multiplies with it.

  Rows over `tensor`, which need not divide. In between split both ways, so that the width is gathered, and its gradient
  reduce-scattered, for the rows that a device has only.
  """
  if on_one_device():
    return table_VD
  for spec in (PS("tensor", "fsdp"), PS("tensor", None)):
    table_VD = jax.lax.with_sharding_constraint(table_VD, spec)
  return table_VD


def split_logits(logits_BTV: jax.Array) -> jax.Array:
  """Logits of a table from `split_vocab`."""
  if on_one_device():
    return logits_BTV
  rows = _rows_axes(jax.sharding.get_abstract_mesh(), logits_BTV.shape[0])
  return jax.lax.with_sharding_constraint(logits_BTV, PS(rows, None, "tensor"))


def place_for_decoding(params: Params, axes_tree: Any, layout: str) -> Any:
  """Inside a traced function under `jax.set_mesh`: parameters split as `layout`, one of DECODE_GATHERED, has it."""
  if on_one_device():
    return params
  spec = functools.partial(spec_of, gathered=DECODE_GATHERED[layout])
  return jax.tree.map(
    lambda axes, x: jax.lax.with_sharding_constraint(x, spec(axes)),
    axes_tree,
    params,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def decode_layout(
  axes_tree: Any, shapes_tree: Any, itemsize: int, mesh: Mesh | AbstractMesh, memory: float
) -> Literal["tensor", "2d"]:
  """The layout that decoding fits in: 'tensor' while its copy of the weights takes at most DECODE_SHARE of a device.

  Static, and the same on every process and for devices that are not here.

  Args:
    axes_tree, shapes_tree: of the parameters, as `param_shardings` takes them.
    itemsize: bytes of one element of the copy.
    mesh: a Mesh or an AbstractMesh.
    memory: bytes of one device, from `device_memory`.
  """

  def local_bytes(axes, leaf):
    split = [axis for axis in spec_of(axes, gathered=DECODE_GATHERED["tensor"]) if axis]
    return math.prod(leaf.shape) * itemsize / math.prod(mesh.shape[axis] for axis in split)

  is_axes = lambda node: isinstance(node, tuple)
  copy = jax.tree.map(local_bytes, axes_tree, shapes_tree, is_leaf=is_axes)
  return "tensor" if sum(jax.tree.leaves(copy)) <= DECODE_SHARE * memory else "2d"


def device_memory(mesh: Mesh | AbstractMesh) -> float | None:
  """Bytes that a program may use on a device of this mesh; None where there is no bound to keep (CPUs).

  Args:
    mesh: a Mesh or an AbstractMesh.
  Raises:
    UserError: the devices are not here, and of a kind that the table lacks.
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
