"""The device mesh, which mesh axis each named dimension lies on, and placing arrays accordingly.

Called by the model (constraints inside a step), the stages (parameters, optimiser state, batches)
and the pipeline (the mesh). Imports no model.

Mesh axes: `data` and `fsdp` split the batch, `fsdp` also splits parameters along the model width,
`tensor` splits heads and the mlp. All are Auto: the compiler inserts the communication.
"""

import itertools
import math

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what dimension 0 of a batch is split over

# Logical dimension -> mesh axis; None is whole on every device.
AXIS_RULES = {
  "layers": None,  # sliced by the scan over layers
  "embed": "fsdp",
  "embed_vector": None,  # norm scales, output biases: too small to split
  # GPT-3's 50257 = 29 * 1733 divides by no mesh, and a padded table would no longer be the table of
  # a released checkpoint. So the tables are split along their other dimension, embed.
  "vocab": None,
  "position": None,
  "kv_heads": "tensor",  # with the queries that share the head: one projection, no communication
  "queries_key_value": None,
  "queries_per_kv": None,
  "head_dim": None,
  "gate_up": None,
  "mlp": "tensor",
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
  """The mesh over all devices, or the ones given.

  Args:
    cfg: devices along each axis; one -1 takes what is left.
    devices: jax devices, real ones or a topology's; None is all there are.
  Raises:
    ValueError: the axes do not multiply to the number of devices; names the nearest mesh that does.
  """
  devices = jax.devices() if devices is None else list(devices)
  asked = [getattr(cfg, axis) for axis in MESH_AXES]
  free = asked.count(-1)
  if free > 1 or any(size < 1 and size != -1 for size in asked):
    raise ValueError(f"mesh: {_spell(asked)} must be positive sizes, with -1 at most once")
  fixed = math.prod(size for size in asked if size != -1)
  if len(devices) % fixed or (not free and len(devices) != fixed):
    raise ValueError(
      f"mesh: {_spell(asked)} must multiply to the number of devices, got {len(devices)}."
      f" Nearest that fits: {_spell(_nearest(asked, len(devices)))}."
    )
  shape = tuple(len(devices) // fixed if size == -1 else size for size in asked)
  grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _spell(shape) -> str:
  return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape))


def _nearest(asked, num_devices: int):
  """The factorisation with the smallest ratios to what was asked; an axis of -1 has no say.

  Of equals, the one that keeps tensor, then fsdp: those must divide the model.
  """
  divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  shapes = (
    (data, fsdp, num_devices // (data * fsdp))
    for data, fsdp in itertools.product(divisors, divisors)
    if num_devices % (data * fsdp) == 0
  )

  def distance(shape):
    data, fsdp, tensor = (
      0.0 if want == -1 else abs(math.log(size / want)) for size, want in zip(shape, asked)
    )
    return round(data + fsdp + tensor, 6), tensor, fsdp

  return min(shapes, key=distance)


def spec_of(axes: tuple[str, ...], *, gathered: tuple[str, ...] = ()) -> PS:
  """PartitionSpec of logical axis names; mesh axes in `gathered` are left out.

  Raises:
    ValueError: a name has no rule. Silent replication would hide a misspelling.
  """
  for axis in axes:
    if axis not in AXIS_RULES:
      known = ", ".join(sorted(AXIS_RULES))
      raise ValueError(f"sharding: logical axis {axis!r} must have a rule; known are {known}")
  return PS(*(None if AXIS_RULES[axis] in gathered else AXIS_RULES[axis] for axis in axes))


def param_shardings(mesh: Mesh, axes_tree, shapes_tree):
  """NamedSharding of every parameter.

  Args:
    mesh: a Mesh or an AbstractMesh.
    axes_tree: tuples of logical axis names, as from `models.param_axes`.
    shapes_tree: anything with shapes, in the same tree.
  Raises:
    ValueError: naming the parameter whose dimension its mesh axis does not divide.
  """

  def one(path, axes, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = spec_of(axes)
    if len(axes) != len(leaf.shape):
      raise ValueError(f"sharding: parameter {name}: shape {leaf.shape} must have axes, got {axes}")
    for axis, mesh_axis, size in zip(axes, spec, leaf.shape):
      if mesh_axis is not None and size % mesh.shape[mesh_axis]:
        raise ValueError(
          f"sharding: parameter {name}: {axis}={size} must be divisible by mesh axis"
          f" {mesh_axis}={mesh.shape[mesh_axis]}. Set --config.mesh.{mesh_axis} to a divisor."
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(
    one, axes_tree, shapes_tree, is_leaf=lambda node: isinstance(node, tuple)
  )


def opt_state_shardings(
  tx: optax.GradientTransformation, params_shapes, params_shardings, mesh: Mesh
):
  """Shardings of the optimiser state: moments lie as their parameters do, counters on every device.

  Without them a jitted `tx.init` gives moments that are whole on every device.
  """
  return optax.tree_map_params(
    tx,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, params_shapes),
    params_shardings,
    transform_non_params=lambda _: replicated(mesh),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PS(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PS())


def num_row_shards(mesh: Mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in ROWS)


def own_row_shards(mesh: Mesh) -> np.ndarray:
  """Which of the shards of a batch's rows lie on this process's devices, ascending.

  They need not be neighbours: a TPU host is a square of a slice. Where `tensor` goes across hosts,
  several hold the same.
  """
  mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
  return np.flatnonzero(np.reshape(mine, (num_row_shards(mesh), -1)).any(axis=1))


def own_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Places in a global batch of the rows that this process must bring, ascending.

  Raises:
    ValueError: the rows do not divide over the mesh.
  """
  shards = num_row_shards(mesh)
  if num_rows % shards:
    raise ValueError(
      f"batch: {num_rows} rows must be divisible by the mesh's data * fsdp = {shards}."
      " Set the batch size to a multiple, or a smaller mesh."
    )
  return np.arange(num_rows).reshape(shards, -1)[own_row_shards(mesh)].reshape(-1)


def place_batch(mesh: Mesh, batch):
  """Global arrays from this process's own rows, a pytree of numpy arrays in the order of `own_rows`.

  Raises:
    ValueError: the rows do not divide over this process's share of the mesh.
  """
  mine, shards = own_row_shards(mesh).tolist(), num_row_shards(mesh)

  def one(rows):
    size, rest = divmod(rows.shape[0], len(mine))
    if rest:
      raise ValueError(
        f"batch: {rows.shape[0]} rows must be divisible by this process's data * fsdp = {len(mine)}."
        " Set the batch size to a multiple, or a smaller mesh."
      )

    def shard(index):
      start = size * mine.index((index[0].start or 0) // size)
      return rows[start : start + size]

    shape = (size * shards, *rows.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)

  return jax.tree.map(one, batch)


def place_rows(mesh: Mesh, batch):
  """Global arrays from rows that every process holds alike; not split if they do not divide."""
  shards = num_row_shards(mesh)

  def one(rows):
    sharding = replicated(mesh) if rows.shape[0] % shards else batch_sharding(mesh)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

  return jax.tree.map(one, batch)


def to_host(tree):
  """Whole numpy arrays on every process; all processes must call it alike."""

  def one(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)


def shard_rows(tree, *, tensor_dim: int | None = None, row_dim: int = 0):
  """Inside a traced function under `jax.set_mesh`: keep rows split over data and fsdp.

  Only a layout: without a mesh, or where rows do not divide, arrays pass unchanged.

  Args:
    tree: arrays with rows on `row_dim`.
    tensor_dim: dimension to split over `tensor` besides (heads of a cache).
    row_dim: which dimension the rows are.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return tree

  def one(x):
    spec = [None] * x.ndim
    for dim, axes in ((row_dim, ROWS), (tensor_dim, ("tensor",))):
      if dim is not None and x.shape[dim] % math.prod(mesh.shape[axis] for axis in axes) == 0:
        spec[dim] = axes
    return jax.lax.with_sharding_constraint(x, PS(*spec))

  return jax.tree.map(one, tree)


def gather_fsdp(params, axes_tree):
  """Inside a traced function under `jax.set_mesh`: parameters split over `tensor` only.

  For decoding: left in the training layout, every step of the loop would gather all weights anew.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return params
  return jax.tree.map(
    lambda axes, x: jax.lax.with_sharding_constraint(x, spec_of(axes, gathered=("fsdp",))),
    axes_tree,
    params,
    is_leaf=lambda node: isinstance(node, tuple),
  )
