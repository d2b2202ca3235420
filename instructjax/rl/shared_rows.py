"""Puts several short episodes into one row, so that scoring and training hardly compute any padding.

Called by rows.py, inside the compiled PPO step. The lengths of answers are known on the device only. So episodes are
placed there, and rows are computed chunk by chunk in a loop until none is left. There is no budget of rows that a batch
of long episodes could exceed. Imports no model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Params, pytree
from instructjax.parallel import constraints, sharding
from instructjax.train import accumulation

# Columns of the narrowest rows. In still narrower ones attention would save little, and episodes would leave more gaps.
NARROWEST = 128
# Ratio of one width to the next. Every width has a program of its own to compile, so there are few.
NARROWING = 4
# Where episodes are shorter, rows are joined until they have so many columns: in a row that holds one episode or two,
# much would be left over.
JOINED = 128


@pytree
class Placement:
  """Where the tokens of B episodes, each padded to L columns, lie in shared rows.

  Attention's cost is the square of a row's width, so short episodes get narrow rows. There are rows of L columns, of
  L / 4, perhaps of L / 16 and so on, in this order; where L itself is short, all rows have a multiple of it. All of
  them together have B * L cells, as many as the padded rows. They are computed in chunks of `rows` * L cells; all rows
  of a chunk have one width.

  Attributes:
    cell_BL: int32 cell of each token, counted through all rows; B * L where there is no token.
    end_K: int32, for each width, the number of chunks up to its last row.
  """

  cell_BL: Array
  end_K: Array


def row_widths(length: int, rows: int, shards: int | None = None) -> list[int]:
  """The widths of rows: L, L / 4 and so on, as long as 4 divides them and they are at least NARROWEST.

  If L is below JOINED, the one width is the first multiple of L that is not; or, of those multiples that leave every
  device as many rows of a chunk, the largest. A row of n * L columns always has room for n episodes, so the joined rows
  suffice for all.

  Args:
    length: L, the columns of an episode.
    rows: rows of L columns in a chunk.
    shards: parts that rows are split into; None for those of the mesh in use.
  """
  if length < JOINED:
    each = rows // (shards or sharding.num_row_shards(jax.sharding.get_abstract_mesh()))
    joins = [n for n in range(1, max(each, 1) + 1) if each % n == 0]
    return [length * next((n for n in joins if n * length >= JOINED), joins[-1])]
  widths = [length]
  while widths[-1] % NARROWING == 0 and widths[-1] // NARROWING >= NARROWEST:
    widths.append(widths[-1] // NARROWING)
  return widths


def first_fit(is_token_BL: Array, *, rows: int, shards: int | None = None) -> Placement:
  """Places episodes by first-fit decreasing: the longest first, each into the first row with room for it.

  A new row is as narrow as its first episode allows. With a single width this needs at most 11/9 of the fewest possible
  rows, plus 6/9 (Dosa 2007).

  Args:
    is_token_BL: True on an episode's tokens, which are contiguous.
    rows: rows of L columns in a chunk; divides B.
    shards: as for `row_widths`.
  """
  # The placement is small, and each step of its scan depends on the one before. Split over devices, every step would
  # send data around; so each device computes all of it.
  is_token_BL = constraints.whole(is_token_BL)
  num_episodes, length = is_token_BL.shape
  length_B = jnp.sum(is_token_BL, axis=1, dtype=jnp.int32)
  index_B = jnp.arange(num_episodes, dtype=jnp.int32)
  widths = row_widths(length, rows, shards)
  # All rows that there may be, [widths, B]: each row's first cell, and the room that is left in it (0 if the row is not
  # open). The widest come first, because the longest episodes need them and are placed first.
  first_KB = room_KB = jnp.zeros((len(widths), num_episodes), jnp.int32)
  cell_B, ends = jnp.zeros_like(length_B), [jnp.int32(0)]
  for k, (width, narrower) in enumerate(zip(widths, [*widths[1:], 0], strict=True)):
    # Rows of this width begin after the chunks of the wider ones. Open as many as there are episodes, then place the
    # episodes that need this width; they may also go into room that is left in wider rows.
    first_KB = first_KB.at[k].set(ends[-1] * rows * length + index_B * width)
    room_KB = room_KB.at[k].set(width)
    is_due_B = (length_B > narrower) & (length_B <= width)
    room_KB, cell_B = place_each(length_B, is_due_B, jnp.array(widths), first_KB, room_KB, cell_B)
    # A chunk that has begun is computed whole. So the unused rows of the last one stay open to shorter episodes, and
    # the rows past it are closed.
    of_chunk = rows * length // width
    chunks = -(-jnp.sum(room_KB[k] < width, dtype=jnp.int32) // of_chunk)
    room_KB = room_KB.at[k].set(jnp.where(index_B < chunks * of_chunk, room_KB[k], 0))
    ends.append(ends[-1] + chunks)
  # An episode's tokens are contiguous, so its first cell and its first column give the cells of all of them.
  shift_B = cell_B - jnp.argmax(is_token_BL, axis=1).astype(jnp.int32)
  cell_BL = shift_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  cell_BL = jnp.where(is_token_BL, cell_BL, num_episodes * length)
  return Placement(cell_BL=cell_BL, end_K=jnp.stack(ends[1:]))


def place_each(
  length_B: Array, is_due_B: Array, width_K: Array, first_KB: Array, room_KB: Array, cell_B: Array
) -> tuple[Array, Array]:
  """Places the episodes that are due, longest first, each into the first row with room.

  Args:
    length_B: tokens of each episode.
    is_due_B: the episodes to place now.
    width_K: width of the rows of each kind.
    first_KB, room_KB: first cell and room of each row.
    cell_B: first cell of each episode that was placed before.
  Returns:
    (room_KB, cell_B) with these episodes placed.
  """
  shape = room_KB.shape
  first_R, width_R = first_KB.reshape(-1), jnp.repeat(width_K, shape[1])

  def one(room_R, episode):
    # Episodes that are not due go through the same steps, because the scan is over all; they take no room, and their
    # cell is not used.
    row = jnp.argmax(room_R >= length_B[episode])
    cell = first_R[row] + width_R[row] - room_R[row]
    return room_R.at[row].add(-jnp.where(is_due_B[episode], length_B[episode], 0)), cell

  order_B = jnp.argsort(-length_B, stable=True)
  room_R, placed_B = jax.lax.scan(one, room_KB.reshape(-1), order_B)
  placed_B = jnp.zeros_like(cell_B).at[order_B].set(placed_B.astype(cell_B.dtype))
  return room_R.reshape(shape), jnp.where(is_due_B, placed_B, cell_B)


def to_shared(placement: Placement, x_BL: Array, fill: int) -> Array:
  """Moves an array from one episode a row into the shared rows; `fill` where there is no token."""
  x_BL = constraints.whole(x_BL)
  # Pads have cell B * L, which is out of bounds: 'drop' leaves them out, here and as 'fill' in `to_padded`.
  empty = jnp.full((x_BL.size,), fill, x_BL.dtype)
  return empty.at[placement.cell_BL].set(x_BL, mode="drop").reshape(x_BL.shape)


def segments(placement: Placement) -> Array:
  """The episode that each cell of the shared rows belongs to: int32 from 1; 0 where there is no token."""
  number_B = jnp.arange(1, placement.cell_BL.shape[0] + 1, dtype=jnp.int32)
  return to_shared(placement, jnp.broadcast_to(number_B[:, None], placement.cell_BL.shape), 0)


def to_padded(placement: Placement, x_BL: Array) -> Array:
  """Moves an array from the shared rows back to one episode a row; 0 where there is no token."""
  x_BL = constraints.whole(x_BL)
  return x_BL.reshape(-1).at[placement.cell_BL].get(mode="fill", fill_value=0)


def map_rows(
  function: Callable, placement: Placement, tree: Any, *, rows: int, widths: Sequence[int]
) -> Any:
  """Applies a function to the shared rows, chunk by chunk. Rows that are not in use are skipped and give zeros.

  Args:
    function: arrays [n, W] -> arrays [n, W]. n is the number of rows of width W in a chunk.
    placement: which rows are in use.
    tree: arrays of the shared rows, [B, L].
    rows: as for `first_fit`.
    widths: of the rows, widest first, by which they were placed.
  """
  shapes = jax.eval_shape(function, _chunk(tree, 0, rows, widths[0]))
  num_rows = placement.cell_BL.shape[0]
  length = placement.cell_BL.shape[1]
  out = jax.tree.map(lambda x: jnp.zeros((num_rows, length, *x.shape[2:]), x.dtype), shapes)
  # One loop for each width: inside a loop shapes must be static. The number of its turns is known on the device only.
  for width, (start, end) in zip(widths, _spans(placement), strict=True):

    def one(index, out, width=width):
      new = function(_chunk(tree, index, rows, width))
      new = jax.tree.map(lambda x, old: x.reshape(rows, *old.shape[1:]), new, out)
      write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, index * rows, 0)
      return jax.tree.map(write, out, new)

    with jax.named_scope(_loop(width)):
      out = jax.lax.fori_loop(start, end, one, out)
  return out


def mean_gradient(
  loss_fn: Callable,
  params: Params,
  placement: Placement,
  tree: Any,
  over: str,
  *,
  rows: int,
  widths: Sequence[int],
) -> tuple[tuple[Array, dict[str, Array]], Params]:
  """Gradient of a loss that is a mean over tokens, accumulated over the chunks of the shared rows.

  Args:
    loss_fn: (params, arrays [n, W]) -> (loss, metrics), means over the tokens that count. A metric named `..._max` is a
      maximum.
    params: of the network.
    placement, tree, rows, widths: as for `map_rows`.
    over: name of the field of `tree` that marks the tokens that count.
  Returns:
    ((loss, metrics), gradient)
  """
  chunk_loss = accumulation.share(
    loss_fn, tree, lambda rows: {"loss": jnp.sum(getattr(rows, over))}
  )

  def gradient(index, width):
    chunk = _chunk(tree, index, rows, width)
    return jax.value_and_grad(chunk_loss, has_aux=True)(params, chunk)

  means, _ = jax.eval_shape(lambda: gradient(0, widths[0]))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), means)
  result = zeros, jax.tree.map(jnp.zeros_like, params)
  for width, (start, end) in zip(widths, _spans(placement), strict=True):

    def add(index, so_far, width=width):
      return accumulation.add(so_far, gradient(index, width))

    with jax.named_scope(_loop(width)):
      result = jax.lax.fori_loop(start, end, add, result)
  return result


def num_cells(placement: Placement, *, rows: int) -> Array:
  """Number of cells that `map_rows` and `mean_gradient` compute, those without a token included."""
  return placement.end_K[-1] * rows * placement.cell_BL.shape[1]


def _spans(placement: Placement) -> list[tuple[Array, Array]]:
  """The chunks of each width as (start, end)."""
  ends = list(placement.end_K)
  return list(zip([jnp.int32(0), *ends[:-1]], ends, strict=True))


def _loop(width: int) -> str:
  """The name of the loop over the chunks of a width, by which launch's planner knows it."""
  return f"rows_of_{width}"


def _chunk(tree: Any, index, rows: int, width: int) -> Any:
  """Chunk number `index` of the arrays, as rows of a width, split over the devices.

  A chunk is `rows` rows of [B, L], whose cells are read as rows of the other width.
  """

  def part(x):
    x = jax.lax.dynamic_slice_in_dim(x, index * rows, rows)
    return x.reshape(-1, width)

  return constraints.shard_rows(jax.tree.map(part, tree))
