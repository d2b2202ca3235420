"""The device mesh, the rules that assign named dimensions to its axes, and functions that place arrays by them.

Called by the stages (for parameters, optimiser state and batches), the pipeline (for the mesh) and constraints.py (for
arrays inside a step). Imports no model.

Mesh axes: `slice`, `data` and `fsdp` split the batch, `fsdp` also splits parameters along the model width, and `tensor`
splits heads and the mlp. All axes are Auto, so the compiler inserts the communication. A job on several TPU slices has
one entry of `slice` for each. Slices are connected by the data centre's network (DCN) only, so each holds all weights,
and nothing large but gradients crosses it.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError

MESH_AXES = ("slice", "data", "fsdp", "tensor")
ROWS = ("slice", "data", "fsdp")  # mesh axes that dimension 0 of a batch is split over

# Logical axis of a parameter's dimension -> mesh axis that it is split over; None: whole on every device.
AXIS_RULES = {
  "layers": None,  # the scan takes one layer after the other
  "embed": "fsdp",
  "embed_vector": None,  # norm scales, output biases: too small to split
  # No usual mesh divides GPT-3's 50257 = 29 * 1733 rows, and a padded table would differ from that of a released
  # checkpoint. So the tables are split along their other dimension, embed.
  "vocab": None,
  "position": None,
  "kv_heads": "tensor",  # a key/value head and the queries that share it are on one device, so attention sends nothing
  "queries_key_value": None,
  "queries_per_kv": None,
  "head_dim": None,
  "gate_up": None,
  "mlp": "tensor",
  "rank": None,  # of an adapter; its other dimensions are split as those of the weight that it adapts
}


def make_mesh(cfg: MeshConfig, devices: Sequence | None = None) -> Mesh:
  """Makes the mesh over all devices, or over the given ones.

  On several TPU slices, the axis `slice` must be their number. Elsewhere it is an axis like `data`.

  Args:
    cfg: size of each axis; one of them may be -1, which takes the devices that are left.
    devices: jax devices, real ones or those of a topology; None for all that are attached.
  Raises:
    UserError: the axes do not multiply to the number of devices, or `slice` is not the number of slices. The message
      names the nearest mesh that fits.
  """
  devices = jax.devices() if devices is None else list(devices)
  slices = _num_slices(devices)
  shape = _mesh_shape(cfg, len(devices), slices)
  # Sizes inside a slice first, then over slices: only the axis `slice` may cross DCN.
  if slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def describe_mesh(cfg: MeshConfig, kind: str, num_devices: int, num_slices: int) -> AbstractMesh:
  """The mesh over the devices of TPU slices that are not attached to this machine.

  Args:
    cfg: as for `make_mesh`.
    kind: `jax.Device.device_kind`.
    num_devices: devices of all slices together.
    num_slices: number of slices.
  Raises:
    UserError: as for `make_mesh`.
  """
  device = AbstractDevice(kind, None, platform="tpu")
  shape = _mesh_shape(cfg, num_devices, num_slices)
  return AbstractMesh(
    shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), abstract_device=device
  )


def _mesh_shape(cfg: MeshConfig, num_devices: int, num_slices: int) -> tuple[int, ...]:
  """Sizes in the order of MESH_AXES, with the devices that are left in place of -1.

  Raises:
    UserError: as for `make_mesh`.
  """
  asked = [getattr(cfg, axis) for axis in MESH_AXES]
  free = asked.count(-1)
  if free > 1 or any(size < 1 and size != -1 for size in asked):
    raise UserError(f"mesh: {_spell(asked)} must be positive sizes, with -1 at most once")
  fixed = math.prod(size for size in asked if size != -1)
  shape = tuple(num_devices // fixed if size == -1 else size for size in asked)
  rule = None
  if math.prod(shape) != num_devices:
    rule = f"multiply to the number of devices, got {num_devices}"
  elif num_slices > 1 and shape[0] != num_slices:
    rule = f"have as many slices as the devices lie in, got {num_slices}"
  if rule:
    nearest = _nearest(asked, num_devices, fixed={"slice": num_slices} if num_slices > 1 else {})
    raise UserError(f"mesh: {_spell(asked)} must {rule}. Nearest that fits: {_spell(nearest)}")
  return shape


def _num_slices(devices: Sequence) -> int:
  """Number of TPU slices that the devices belong to; 1 for other devices."""
  # GPUs have a `slice_index` too, but it is the number of their host.
  if not all(device.platform == "tpu" and hasattr(device, "slice_index") for device in devices):
    return 1
  return len({device.slice_index for device in devices})


def _spell(shape) -> str:
  """A mesh as flags that can be pasted into a command."""
  return " ".join(f"--config.mesh.{axis}={size}" for axis, size in zip(MESH_AXES, shape))


def _nearest(asked, num_devices: int, *, fixed: Mapping[str, int], splits: Iterable[tuple] = ()):
  """The mesh shape that is nearest to what was asked and that fits the devices.

  The distance is the sum of the axes' log ratios to the sizes asked for. Of shapes equally near, the one is taken that
  changes tensor least, then fsdp, then slice.

  Args:
    asked: sizes in the order of MESH_AXES; an axis of -1 does not count.
    num_devices: the product of the sizes.
    fixed: axes that keep a size.
    splits: (mesh axes, size of a dimension that is split over them and must be divisible).
  Returns:
    The shape, or None if there is none.
  """
  divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
  choices = [[fixed[axis]] if axis in fixed else divisors for axis in MESH_AXES]
  shapes = (shape for shape in itertools.product(*choices) if math.prod(shape) == num_devices)
  # A mesh divides all dimensions exactly if it divides their greatest common divisor, so one number for each tuple of
  # axes is enough.
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
    # Rounded, so that equal distances compare equal in floating point.
    return round(slices + data + fsdp + tensor, 6), tensor, fsdp, slices

  return min(filter(fits, shapes), key=distance, default=None)


def _num_shards(sizes: Mapping[str, int], axes: Iterable[str]) -> int:
  return math.prod(sizes[axis] for axis in axes)


def spec_of(axes: tuple[str, ...], *, gathered: tuple[str, ...] = ()) -> PS:
  """The PartitionSpec for logical axis names.

  Args:
    axes: a name for each dimension.
    gathered: mesh axes over which the array is not split, against the rules.
  Raises:
    ValueError: a name has no rule. To replicate such a dimension would hide a misspelling.
  """
  for axis in axes:
    if axis not in AXIS_RULES:
      known = ", ".join(sorted(AXIS_RULES))
      raise ValueError(f"sharding: logical axis {axis!r} must have a rule; known are {known}")
  return PS(*(None if AXIS_RULES[axis] in gathered else AXIS_RULES[axis] for axis in axes))


def require_fit(
  mesh: Mesh | AbstractMesh,
  axes_tree: Any,
  shapes_tree: Any,
  rows: Mapping[str, int],
  parts: Mapping[str, tuple[int, str]] | None = None,
):
  """Refuses a mesh that does not divide a parameter, a batch or a part of one.

  Args:
    mesh: a Mesh or an AbstractMesh.
    axes_tree: tuples of logical axis names, as from `models.param_axes`.
    shapes_tree: arrays, or anything with shapes, in the same tree.
    rows: flag that sets a batch size -> rows of that batch.
    parts: settings that a batch is divided by -> (rows of a part, how to mend it).
  Raises:
    UserError: names the first parameter, batch or part that is not divisible, and the nearest mesh of as many devices
      that divides everything. If there is none, it names one with the batches that must then change; for a parameter,
      the nearest that divides the parameters.
    ValueError: a logical axis has no rule, or a parameter has another number of axes than dimensions.
  """
  params, parts = list(_split_dimensions(axes_tree, shapes_tree)), parts or {}
  batches = [(name, size, ROWS) for name, size in rows.items()]
  pieces = [(name, size, ROWS) for name, (size, _) in parts.items()]
  for name, size, axes in params + batches + pieces:
    shards = _num_shards(mesh.shape, axes)
    if size % shards == 0:
      continue
    fitting = _nearest_to(mesh, params + batches + pieces)
    if axes != ROWS:
      place = f"axis {axes[0]}={shards}"
      mend = f"Nearest mesh that fits: {fitting or _nearest_to(mesh, params)}"
      raise UserError(f"sharding: {name}={size} must be divisible by mesh {place}. {mend}")
    place = f"{' * '.join(ROWS)} = {shards}"
    mesh_of = fitting or _with_batches(mesh, params, rows, pieces)
    if name in rows:
      mend = f"Set --{name} to a multiple" + (f", or the mesh to {mesh_of}" if mesh_of else "")
      raise UserError(f"sharding: {name}={size} must be divisible by mesh {place}. {mend}")
    mend = (f"Set the mesh to {mesh_of}, or " if mesh_of else "") + parts[name][1]
    raise UserError(
      f"sharding: {name} = {size} rows must be divisible by mesh {place}, else each device computes all of them."
      f" {mend[0].upper()}{mend[1:]}"
    )


def _with_batches(
  mesh: Mesh | AbstractMesh, params: list[tuple], rows: Mapping[str, int], pieces: list[tuple]
) -> str:
  """A mesh with the batches that have to grow for it, as flags; the smallest ones. '' if there is none."""
  sizes = sorted(set(rows.values()))
  for least in sizes[1:]:
    kept = [(name, size, ROWS) for name, size in rows.items() if size >= least]
    shape = _shape_nearest_to(mesh, params + kept + pieces)
    if shape is not None:
      shards = math.prod(shape[MESH_AXES.index(axis)] for axis in ROWS)
      grown = {name: -(-size // shards) * shards for name, size in rows.items() if size % shards}
      return " ".join([_spell(shape), *(f"--{name}={size}" for name, size in grown.items())])
  return ""


def _nearest_to(mesh: Mesh | AbstractMesh, dimensions: list[tuple[str, int, tuple]]) -> str:
  """The nearest mesh of as many devices and slices that divides the dimensions, as flags; '' if there is none."""
  shape = _shape_nearest_to(mesh, dimensions)
  return _spell(shape) if shape else ""


def _shape_nearest_to(
  mesh: Mesh | AbstractMesh,
  dimensions: list[tuple[str, int, tuple]],
  fixed: tuple[str, ...] = ("slice",),
) -> tuple | None:
  return _nearest(
    [mesh.shape[axis] for axis in MESH_AXES],
    mesh.size,
    fixed={axis: mesh.shape[axis] for axis in fixed},
    splits=[(axes, size) for _, size, axes in dimensions],
  )


def nearest_mesh(
  mesh: Mesh | AbstractMesh, axes_tree: Any, shapes_tree: Any, sizes: Iterable[int]
) -> MeshConfig | None:
  """The mesh nearest to `mesh` that divides all parameters and these numbers of rows, with as many devices.

  Axes `slice` and `data` keep their sizes, and `fsdp` and `tensor` share the rest.

  Args:
    mesh, axes_tree, shapes_tree: as for `require_fit`.
    sizes: rows of batches and of their parts.
  Returns:
    The sizes of its axes; None if there is no such mesh.
  """
  params = list(_split_dimensions(axes_tree, shapes_tree))
  dimensions = params + [("", size, ROWS) for size in sizes]
  shape = _shape_nearest_to(mesh, dimensions, fixed=("slice", "data"))
  return None if shape is None else MeshConfig(**dict(zip(MESH_AXES, shape)))


def _split_dimensions(axes_tree: Any, shapes_tree: Any):
  """(`parameter NAME: AXIS`, size, mesh axes) for every dimension of a parameter that the rules split."""
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
  """NamedSharding of every parameter, by the rules.

  Raises:
    UserError, ValueError: see `require_fit`.
  """
  require_fit(mesh, axes_tree, shapes_tree, rows={})
  return jax.tree.map(lambda axes: NamedSharding(mesh, spec_of(axes)), axes_tree, is_leaf=_is_axes)


def opt_state_shardings(
  tx: optax.GradientTransformation, params_shapes: Any, params_shardings: Any, mesh: Mesh
) -> Any:
  """Shardings of the optimiser state: moments are split as their parameters, counters are on every device."""
  # Given to jit as out_shardings of `tx.init`. Without them the compiler would make the moments whole on every device.
  return optax.tree_map_params(
    tx.init,
    lambda _, sharding: sharding,
    jax.eval_shape(tx.init, params_shapes),
    params_shardings,
    transform_non_params=lambda _: replicated(mesh),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows (dimension 0) split over `slice`, `data` and `fsdp`."""
  return NamedSharding(mesh, PS(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PS())


def stacked(shardings: Any) -> Any:
  """NamedShardings of arrays with a new first axis, which is whole on every device."""
  return jax.tree.map(lambda one: NamedSharding(one.mesh, PS(None, *one.spec)), shardings)


# Bytes of weights from which on, on a CPU, a step's memory counts more than its concurrency.
LARGE = 2**28


def step_options(mesh: Mesh, *params_shapes: Any) -> dict[str, str]:
  """Compiler options for a step that trains these networks.

  Large networks on a CPU are compiled for the order of instructions that needs the least memory. XLA's own order is for
  concurrency: it computes the updates of all weights before it applies the first, and runs PPO's two networks at once,
  each with all its gradients. For PPO at the size of GPT-2 small that takes 1.5 GB of temporaries instead of .7
  (docs/performance.md, "Where we lose"). For small networks it is a few percent faster, so they keep it.
  """
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params_shapes))
  on_cpu = not isinstance(mesh, AbstractMesh) and mesh.devices.flat[0].platform == "cpu"
  if not on_cpu or size < LARGE:
    return {}
  return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
  """Number of parts that rows are split into; 1 for the empty mesh of a traced function without a mesh."""
  return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def own_row_shards(mesh: Mesh) -> np.ndarray:
  """Numbers of the row shards that this process's devices hold, ascending."""
  # They need not be consecutive: a TPU host is a square of a slice. If `tensor` spans hosts, several of them hold the
  # same shard.
  mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
  return np.flatnonzero(np.reshape(mine, (num_row_shards(mesh), -1)).any(axis=1))


def platform_of(mesh: Mesh | AbstractMesh | None) -> str:
  """Platform of a mesh's devices, which need not be attached to this machine.

  Without a mesh, or for an abstract mesh that names no device, it is the platform of this process.
  """
  device = None if mesh is None else mesh.abstract_mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def platform_of_arrays(tree: Any) -> str:
  """Platform of the devices that hold a tree of arrays."""
  return next(iter(jax.tree.leaves(tree)[0].devices())).platform


def mesh_of(shardings: Any) -> Mesh:
  """The mesh of a tree of NamedShardings."""
  return jax.tree.leaves(shardings)[0].mesh


def own_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Indices in a global batch of the rows that this process must provide, ascending.

  Raises:
    UserError: the mesh does not divide the rows.
  """
  shards = num_row_shards(mesh)
  if num_rows % shards:
    raise UserError(
      f"batch: {num_rows} rows must be divisible by the mesh's slice * data * fsdp = {shards}."
      " Set the batch size to a multiple, or a smaller mesh."
    )
  return np.arange(num_rows).reshape(shards, -1)[own_row_shards(mesh)].reshape(-1)


def place_batch(mesh: Mesh, batch: Any) -> Any:
  """Makes global arrays from this process's own rows.

  Args:
    mesh: of all processes.
    batch: pytree of numpy arrays with the rows of `own_rows`, in that order.
  Raises:
    UserError: this process's share of the mesh does not divide its rows.
  """
  mine, shards = own_row_shards(mesh).tolist(), num_row_shards(mesh)

  def one(rows):
    size, rest = divmod(rows.shape[0], len(mine))
    if rest:
      raise UserError(
        f"batch: {rows.shape[0]} rows must be divisible by this process's slice * data * fsdp = {len(mine)}."
        " Set the batch size to a multiple, or a smaller mesh."
      )

    # JAX asks for a shard by its slice of the global batch. That gives the shard's number, and with it the place of its
    # rows among this process's own.
    def shard(index):
      start = size * mine.index((index[0].start or 0) // size)
      return rows[start : start + size]

    shape = (size * shards, *rows.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)

  return jax.tree.map(one, batch)


def place_rows(mesh: Mesh, batch: Any) -> Any:
  """Makes global arrays from rows that every process has; they are replicated if the mesh does not divide them."""
  shards = num_row_shards(mesh)

  def one(rows):
    sharding = replicated(mesh) if rows.shape[0] % shards else batch_sharding(mesh)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

  return jax.tree.map(one, batch)


def to_host(tree: Any) -> Any:
  """Whole numpy arrays in every process. It gathers, so all processes must call it with the same tree."""

  def one(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)
