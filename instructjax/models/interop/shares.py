"""Brings one tensor of a file into the shards of a parameter, with each process reading only its share of the file.

Called by transfer.py. Files store rows one after the other. Where a process's shards are whole rows, it reads these.
Where they are columns, it would touch every page of the file: then each process reads an equal share of the rows, and
they pass the numbers to each other through their devices. Reads no header and knows no names of tensors.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.models.interop import tensor_table

Bounds = tuple[tuple[int, int], ...]
ReadRows = Callable[[str, int, int], np.ndarray]

_SMALL = (
  1 << 20
)  # bytes in float32 of a tensor that is not worth an exchange: every process reads it whole


def bring(
  read_rows: ReadRows,
  part: tensor_table.Tensor,
  buffers: Mapping[Bounds, np.ndarray],
  shape: Sequence[int],
  place,
):
  """Copies a tensor's numbers into the shards that this process has of a parameter.

  Processes exchange numbers, so all of them must call it with the same tensors in the same order.

  Args:
    read_rows: as `Source.read_rows`.
    part: the tensor, and where its numbers lie in the parameter.
    buffers: bounds in the whole parameter -> the shard to fill, float32.
    shape: of the whole parameter.
    place: its sharding.
  """
  stack = () if part.layer is None else (slice(part.layer, part.layer + 1),)
  covered = bounds((*stack, *part.part), shape)
  targets = [
    (buffer[inner], outer[len(stack) :])
    for key, buffer in buffers.items()
    for inner, outer in _overlap(key, covered)
  ]
  if not targets:  # the tensor belongs to other processes
    return
  if is_scattered(part, shape, place):
    pieces = _exchanged(read_rows, part, place)
    for target, outer in targets:
      piece = pieces[tuple((cut.start, cut.stop) for cut in outer)]
      target[...] = piece[None] if stack else piece
    return
  first, last, axis, unit = _rows_of(part, [outer for _, outer in targets])
  ours = part.to_ours(read_rows(part.name, first, last))
  for target, outer in targets:
    cuts = list(outer)
    if axis is not None:
      before = first // unit
      cuts[axis] = slice(cuts[axis].start - before, cuts[axis].stop - before)
    piece = ours[tuple(cuts)]
    target[...] = piece[None] if stack else piece


def is_scattered(part: tensor_table.Tensor, shape: Sequence[int], place) -> bool:
  """Whether the shards of several processes are no runs of the tensor's rows; the same in all processes."""
  if place.is_fully_addressable or 4 * math.prod(part.shape) < _SMALL:
    return False
  stacked = part.layer is not None
  shard = place.shard_shape(tuple(shape))[stacked:]
  split = {axis for axis, size in enumerate(shape[stacked:]) if shard[axis] < size}
  return bool(split - {_own_axis(part)})


def _own_axis(part: tensor_table.Tensor) -> int | None:
  """The dimension of our parameter along which the tensor's rows are apart; None if there is none."""
  axis = part.row_axis
  return None if axis is None else part.order.index(axis)


def _rows_of(
  part: tensor_table.Tensor, outers: Sequence[tuple[slice, ...]]
) -> tuple[int, int, int | None, int]:
  """(first row, row after the last, our dimension along which they are apart, rows of one index of that dimension)."""
  axis = _own_axis(part)
  if axis is None:
    return 0, part.shape[0], None, 1
  unit = part.rows_apart
  first, last = min(cut[axis].start for cut in outers), max(cut[axis].stop for cut in outers)
  return first * unit, last * unit, axis, unit


def _exchanged(
  read_rows: ReadRows, part: tensor_table.Tensor, place: NamedSharding
) -> dict[Bounds, np.ndarray]:
  """This process's shards of a tensor of which each process reads an equal share: bounds in the part -> numbers."""
  devices = place.mesh.devices.reshape(-1)
  rows, rest = part.shape[0], part.shape[1:]
  share = -(-rows // devices.size)  # the last devices may have fewer, filled up with zeros

  def read(index):
    start, stop, _ = index[0].indices(share * devices.size)
    found = np.zeros((stop - start, *rest), np.float32)
    last = min(stop, rows)
    if start < last:
      found[: last - start] = read_rows(part.name, start, last)
    return found

  by_rows = NamedSharding(Mesh(devices, ("all",)), PS("all"))
  tensor = jax.make_array_from_callback((share * devices.size, *rest), by_rows, read)
  spec = place.spec if part.layer is None else place.spec[1:]
  laid = _arrange(rows, part.unfold, part.order, NamedSharding(place.mesh, PS(*spec)))(tensor)
  return {bounds(one.index, laid.shape): np.asarray(one.data) for one in laid.addressable_shards}


# Cached, because jit compiles again for every new function; the layers of a stack share a program.
@functools.lru_cache(maxsize=64)
def _arrange(rows: int, unfold: tuple[int, ...], order: tuple[int, ...], place: NamedSharding):
  """The program that takes a tensor, split by rows, to a parameter's layout and sharding."""
  change = lambda tensor: jnp.transpose(tensor[:rows].reshape(unfold), order)
  return jax.jit(change, out_shardings=place)


def bounds(index: Sequence[slice] | None, shape: Sequence[int]) -> Bounds:
  """An index of slices as ((start, stop), ...), which is hashable."""
  whole = index or (slice(None),) * len(shape)
  return tuple(piece.indices(size)[:2] for piece, size in zip(whole, shape, strict=True))


def _overlap(shard: Bounds, part: Bounds) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
  """The numbers that a shard and a part have in common, as [(index into the shard, index into the part)].

  Both arguments are `bounds` in the whole parameter. [] if they have nothing in common.
  """
  both = [(max(s[0], p[0]), min(s[1], p[1])) for s, p in zip(shard, part)]
  if any(start >= stop for start, stop in both):
    return []
  within = lambda outer: tuple(
    slice(start - o[0], stop - o[0]) for (start, stop), o in zip(both, outer)
  )
  return [(within(shard), within(part))]
