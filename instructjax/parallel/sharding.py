"""The device mesh, which mesh axis each named dimension lies on, and placing arrays accordingly.

Called by the stages (parameters, optimiser state, batches), the pipeline (the mesh) and constraints.py, for what lies
inside a step. Imports no model.

Mesh axes: `slice`, `data` and `fsdp` split the batch, `fsdp` also splits parameters along the model
width, `tensor` splits heads and the mlp. All are Auto: the compiler inserts the communication.
`slice` is the TPU slices of a job of several, between which there is only the data centre's network
(DCN): weights are whole in each, so that nothing large but gradients has to cross it.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError

MESH_AXES = ("slice", "data", "fsdp", "tensor")
ROWS = ("slice", "data", "fsdp")  # what dimension 0 of a batch is split over

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


def make_mesh(cfg: MeshConfig, devices: Sequence | None = None) -> Mesh:
  """The mesh over all devices, or the ones given.

  Where the devices know their TPU slice, `slice` is over these; elsewhere it is an axis like `data`.

  Args:
    cfg: devices along each axis; one -1 takes what is left.
    devices: jax devices, real ones or a topology's; None is all there are.
  Raises:
    UserError: the axes do not multiply to the number of devices, or `slice` is not the number of
      slices; names the nearest mesh that fits.
  """
  devices = jax.devices() if devices is None else list(devices)
  asked = [getattr(cfg, axis) for axis in MESH_AXES]
  free = asked.count(-1)
  if free > 1 or any(size < 1 and size != -1 for size in asked):
    raise UserError(f"mesh: {_spell(asked)} must be positive sizes, with -1 at most once")
  slices = _num_slices(devices)
  fixed = math.prod(size for size in asked if size != -1)
  shape = tuple(len(devices) // fixed if size == -1 else size for size in asked)
  rule = None
  if math.prod(shape) != len(devices):
    rule = f"multiply to the number of devices, got {len(devices)}"
  elif slices > 1 and shape[0] != slices:
    rule = f"have as many slices as the devices lie in, got {slices}"
  if rule:
    nearest = _nearest(asked, len(devices), num_slices=slices if slices > 1 else None)
    raise UserError(f"mesh: {_spell(asked)} must {rule}. Nearest that fits: {_spell(nearest)}")
  if slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _num_slices(devices: Sequence) -> int:
  """How many TPU slices the devices lie in. GPUs have a `slice_index` too: it is their host's."""
  if not all(device.platform == "tpu" and hasattr(device, "slice_index") for device in devices):
    return 1
  return len({device.slice_index for device in devices})


def _spell(shape) -> str:
  """As flags, to be pasted."""
  return " ".join(f"--config.mesh.{axis}={size}" for axis, size in zip(MESH_AXES, shape))


def _nearest(
  asked, num_devices: int, *, num_slices: int | None = None, splits: Iterable[tuple] = ()
):
  """The factorisation with the smallest ratios to what was asked; an axis of -1 has no say.

  Of equals, the one that keeps tensor, then fsdp, then slice.

  Args:
    asked: sizes in the order of MESH_AXES.
    num_devices: what they must multiply to.
    num_slices: what `slice` must be, None for anything.
    splits: (mesh axes, size of a dimension that lies on them and must divide).
  Returns:
    The shape, None where there is none.
  """
  divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  slices = divisors if num_slices is None else [num_slices]
  shapes = (
    (*sizes, num_devices // math.prod(sizes))
    for sizes in itertools.product(slices, divisors, divisors)
    if num_devices % math.prod(sizes) == 0
  )
  # Few numbers stand for all dimensions: what divides them all divides their greatest common divisor.
  limits = {}
  for axes, size in splits:
    limits[axes] = math.gcd(size, limits.get(axes, 0))

  def fits(shape):
    sizes = dict(zip(MESH_AXES, shape))
    return all(limit % _num_shards(sizes, axes) == 0 for axes, limit in limits.items())

  def distance(shape):
    slices, data, fsdp, tensor = (
      0.0 if want == -1 else abs(math.log(size / want)) for size, want in zip(shape, asked)
    )
    return round(slices + data + fsdp + tensor, 6), tensor, fsdp, slices

  return min(filter(fits, shapes), key=distance, default=None)


def _num_shards(sizes: Mapping[str, int], axes: Iterable[str]) -> int:
  return math.prod(sizes[axis] for axis in axes)


def spec_of(axes: tuple[str, ...], *, gathered: tuple[str, ...] = ()) -> PS:
  """PartitionSpec of logical axis names; mesh axes in `gathered` are left out.

  Raises:
    UserError: a name has no rule. Silent replication would hide a misspelling.
  """
  for axis in axes:
    if axis not in AXIS_RULES:
      known = ", ".join(sorted(AXIS_RULES))
      raise ValueError(f"sharding: logical axis {axis!r} must have a rule; known are {known}")
  return PS(*(None if AXIS_RULES[axis] in gathered else AXIS_RULES[axis] for axis in axes))


def require_fit(mesh: Mesh, axes_tree: Any, shapes_tree: Any, rows: Mapping[str, int]):
  """Refuses a mesh that does not divide what is to lie on it.

  Args:
    mesh: a Mesh or an AbstractMesh.
    axes_tree: tuples of logical axis names, as from `models.param_axes`.
    shapes_tree: anything with shapes, in the same tree.
    rows: name -> rows of a batch.
  Raises:
    UserError: naming the first parameter or batch that does not divide, and the nearest mesh of as
      many devices that fits all of them, or where none does the parameters.
  """
  params = list(_split_dimensions(axes_tree, shapes_tree))
  batches = [(name, size, ROWS) for name, size in rows.items()]
  for name, size, axes in params + batches:
    shards = _num_shards(mesh.shape, axes)
    if size % shards == 0:
      continue
    fitting = _nearest_to(mesh, params + batches)
    if axes == ROWS:
      place = f"{' * '.join(ROWS)} = {shards}"
      mend = f"Set --{name} to a multiple" + (f", or the mesh to {fitting}" if fitting else "")
    else:
      place = f"axis {axes[0]}={shards}"
      mend = f"Nearest mesh that fits: {fitting or _nearest_to(mesh, params)}"
    raise UserError(f"sharding: {name}={size} must be divisible by mesh {place}. {mend}")


def _nearest_to(mesh: Mesh, dimensions: list[tuple[str, int, tuple]]) -> str:
  """The mesh of as many devices and slices that divides (_, size, mesh axes), spelt out; '' for none."""
  shape = _nearest(
    [mesh.shape[axis] for axis in MESH_AXES],
    mesh.size,
    num_slices=mesh.shape["slice"],
    splits=[(axes, size) for _, size, axes in dimensions],
  )
  return _spell(shape) if shape else ""


def _split_dimensions(axes_tree: Any, shapes_tree: Any):
  """(`parameter NAME: AXIS`, size, mesh axes) of each dimension of each parameter that is split."""
  leaves = jax.tree_util.tree_leaves_with_path(axes_tree, is_leaf=_is_axes)
  for (path, axes), leaf in zip(leaves, jax.tree.leaves(shapes_tree), strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if len(axes) != len(leaf.shape):
      raise ValueError(f"sharding: parameter {name}: shape {leaf.shape} must have axes, got {axes}")
    for axis, mesh_axis, size in zip(axes, spec_of(axes), leaf.shape):
      if mesh_axis is not None:
        yield f"parameter {name}: {axis}", size, (mesh_axis,)


def _is_axes(node: Any) -> bool:
  return isinstance(node, tuple)


def param_shardings(mesh: Mesh, axes_tree: Any, shapes_tree: Any) -> Any:
  """NamedSharding of every parameter.

  Raises:
    UserError: see `require_fit`.
  """
  require_fit(mesh, axes_tree, shapes_tree, rows={})
  return jax.tree.map(lambda axes: NamedSharding(mesh, spec_of(axes)), axes_tree, is_leaf=_is_axes)


def opt_state_shardings(
  tx: optax.GradientTransformation, params_shapes: Any, params_shardings: Any, mesh: Mesh
) -> Any:
  """Shardings of the optimiser state: moments lie as their parameters do, counters on every device.

  Without them a jitted `tx.init` gives moments that are whole on every device.
  """
  return optax.tree_map_params(
    tx.init,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, params_shapes),
    params_shardings,
    transform_non_params=lambda _: replicated(mesh),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PS(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PS())


LARGE = 2**28  # bytes of weights from which on a CPU memory counts more than concurrency


def step_options(mesh: Mesh, *params_shapes: Any) -> dict[str, str]:
  """Compiler options of a step that trains these networks: large ones on CPU in the order that needs the least memory.

  XLA's own order there is for concurrency: it computes the updates of all weights before it applies the first, and
  PPO's two networks at once, each with all its gradients. Where networks are small it is a few percent faster.
  """
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params_shapes))
  on_cpu = not isinstance(mesh, AbstractMesh) and mesh.devices.flat[0].platform == "cpu"
  if not on_cpu or size < LARGE:
    return {}
  return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
  """Parts that rows are split into; 1 on the empty mesh of a traced function without one."""
  return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def own_row_shards(mesh: Mesh) -> np.ndarray:
  """Which of the shards of a batch's rows lie on this process's devices, ascending.

  They need not be neighbours: a TPU host is a square of a slice. Where `tensor` goes across hosts,
  several hold the same.
  """
  mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
  return np.flatnonzero(np.reshape(mine, (num_row_shards(mesh), -1)).any(axis=1))


def mesh_of(shardings: Any) -> Mesh:
  """The mesh of a tree of NamedShardings."""
  return jax.tree.leaves(shardings)[0].mesh


def own_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Places in a global batch of the rows that this process must bring, ascending.

  Raises:
    UserError: the rows do not divide over the mesh.
  """
  shards = num_row_shards(mesh)
  if num_rows % shards:
    raise UserError(
      f"batch: {num_rows} rows must be divisible by the mesh's slice * data * fsdp = {shards}."
      " Set the batch size to a multiple, or a smaller mesh."
    )
  return np.arange(num_rows).reshape(shards, -1)[own_row_shards(mesh)].reshape(-1)


def place_batch(mesh: Mesh, batch: Any) -> Any:
  """Global arrays from this process's own rows, a pytree of numpy arrays in the order of `own_rows`.

  Raises:
    UserError: the rows do not divide over this process's share of the mesh.
  """
  mine, shards = own_row_shards(mesh).tolist(), num_row_shards(mesh)

  def one(rows):
    size, rest = divmod(rows.shape[0], len(mine))
    if rest:
      raise UserError(
        f"batch: {rows.shape[0]} rows must be divisible by this process's slice * data * fsdp = {len(mine)}."
        " Set the batch size to a multiple, or a smaller mesh."
      )

    def shard(index):
      start = size * mine.index((index[0].start or 0) // size)
      return rows[start : start + size]

    shape = (size * shards, *rows.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)

  return jax.tree.map(one, batch)


def place_rows(mesh: Mesh, batch: Any) -> Any:
  """Global arrays from rows that every process holds alike; not split if they do not divide."""
  shards = num_row_shards(mesh)

  def one(rows):
    sharding = replicated(mesh) if rows.shape[0] % shards else batch_sharding(mesh)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

  return jax.tree.map(one, batch)


def to_host(tree: Any) -> Any:
  """Whole numpy arrays on every process; all processes must call it alike."""

  def one(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)
