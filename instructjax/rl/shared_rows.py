"""Several short episodes in a row, so that scoring and training cost what the tokens cost and padding nothing.

Called by rows.py, inside the compiled PPO step. Lengths are known on the device only, so rows are filled there and
worked off in chunks until none is left: there is no budget that a batch of long episodes could exceed. Imports no
model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Params, pytree
from instructjax.parallel import constraints

# Columns: in narrower rows attention takes little anyway, and episodes leave more gaps.
NARROWEST = 128
NARROWING = 4  # from one width to the next: each is compiled anew


@pytree
class Placement:
  """Where the tokens of B episodes, each padded to L columns, lie in shared rows.

  There are rows of L columns, of L / 4 and perhaps L / 16, the wide ones first: attention costs the square of a row's
  width, so short episodes get narrow rows. Rows are worked off in chunks of `rows` * L cells.

  Attributes:
    cell_BL: int32 index into the cells of all rows, which are B * L; B * L where there is no token.
    end_K: int32 number of chunks up to the last row of each width.
  """

  cell_BL: Array
  end_K: Array


def row_widths(length: int) -> list[int]:
  """L, L / 4, ... as long as it divides and is not too narrow."""
  widths = [length]
  while widths[-1] % NARROWING == 0 and widths[-1] // NARROWING >= NARROWEST:
    widths.append(widths[-1] // NARROWING)
  return widths


def first_fit(is_token_BL: Array, *, rows: int) -> Placement:
  """First-fit decreasing: the longest episode first, each into the first row that has room for it.

  A new row is as narrow as its first episode allows. At most 11/9 of the fewest possible rows, and 6/9, where all have
  one width (Dosa 2007).

  Args:
    is_token_BL: True on an episode's tokens, which are contiguous.
    rows: of L columns, in a chunk; divides B. All rows of a chunk have one width.
  """
  # Small, and needed whole: split over devices, every step of a scan would send it around.
  is_token_BL = constraints.whole(is_token_BL)
  num_episodes, length = is_token_BL.shape
  length_B = jnp.sum(is_token_BL, axis=1, dtype=jnp.int32)
  index_B = jnp.arange(num_episodes, dtype=jnp.int32)
  widths = row_widths(length)
  # Rows that there may be, the wide ones first: where each begins, and what room is left, none where it is not open.
  first_KB = room_KB = jnp.zeros((len(widths), num_episodes), jnp.int32)
  cell_B, ends = jnp.zeros_like(length_B), [jnp.int32(0)]
  for k, (width, narrower) in enumerate(zip(widths, [*widths[1:], 0], strict=True)):
    first_KB = first_KB.at[k].set(ends[-1] * rows * length + index_B * width)
    room_KB = room_KB.at[k].set(width)
    is_due_B = (length_B > narrower) & (length_B <= width)
    room_KB, cell_B = _place(length_B, is_due_B, jnp.array(widths), first_KB, room_KB, cell_B)
    of_chunk = rows * length // width
    chunks = -(-jnp.sum(room_KB[k] < width, dtype=jnp.int32) // of_chunk)
    room_KB = room_KB.at[k].set(jnp.where(index_B < chunks * of_chunk, room_KB[k], 0))
    ends.append(ends[-1] + chunks)
  shift_B = cell_B - jnp.argmax(is_token_BL, axis=1).astype(jnp.int32)
  cell_BL = shift_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  cell_BL = jnp.where(is_token_BL, cell_BL, num_episodes * length)
  return Placement(cell_BL=cell_BL, end_K=jnp.stack(ends[1:]))


def _place(
  length_B: Array, is_due_B: Array, width_K: Array, first_KB: Array, room_KB: Array, cell_B: Array
) -> tuple[Array, Array]:
  """The episodes that are due, longest first, each into the first row with room: (room_KB, first cell of each)."""
  shape = room_KB.shape
  first_R, width_R = first_KB.reshape(-1), jnp.repeat(width_K, shape[1])

  def one(room_R, episode):
    row = jnp.argmax(room_R >= length_B[episode])
    cell = first_R[row] + width_R[row] - room_R[row]
    return room_R.at[row].add(-jnp.where(is_due_B[episode], length_B[episode], 0)), cell

  order_B = jnp.argsort(-length_B, stable=True)
  room_R, placed_B = jax.lax.scan(one, room_KB.reshape(-1), order_B)
  placed_B = jnp.zeros_like(cell_B).at[order_B].set(placed_B.astype(cell_B.dtype))
  return room_R.reshape(shape), jnp.where(is_due_B, placed_B, cell_B)


def to_shared(placement: Placement, x_BL: Array, fill: int) -> Array:
  """Values of the episodes' tokens in the shared rows, `fill` where there is no token."""
  x_BL = constraints.whole(x_BL)
  empty = jnp.full((x_BL.size,), fill, x_BL.dtype)
  return empty.at[placement.cell_BL].set(x_BL, mode="drop").reshape(x_BL.shape)


def segments(placement: Placement) -> Array:
  """int32 number of the episode that each cell of the shared rows belongs to, from 1; 0 where there is no token."""
  number_B = jnp.arange(1, placement.cell_BL.shape[0] + 1, dtype=jnp.int32)
  return to_shared(placement, jnp.broadcast_to(number_B[:, None], placement.cell_BL.shape), 0)


def to_padded(placement: Placement, x_BL: Array) -> Array:
  """Undoes `to_shared`: from the shared rows back to one episode a row, 0 where there is no token."""
  x_BL = constraints.whole(x_BL)
  return x_BL.reshape(-1).at[placement.cell_BL].get(mode="fill", fill_value=0)


def map_rows(function: Callable, placement: Placement, tree: Any, *, rows: int) -> Any:
  """`function` of chunk after chunk of rows until all in use are done; zeros for the others.

  Args:
    function: arrays [n, W] -> arrays [n, W], of as many rows as a chunk has at that width.
    placement: which rows are in use.
    tree: arrays [B, L].
    rows: as `first_fit` got it.
  """
  shapes = jax.eval_shape(function, _chunk(tree, 0, rows, 0))
  num_rows = placement.cell_BL.shape[0]
  out = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), shapes)
  for level, (start, end) in enumerate(_spans(placement)):

    def one(index, out, level=level):
      new = function(_chunk(tree, index, rows, level))
      new = jax.tree.map(lambda x, old: x.reshape(rows, *old.shape[1:]), new, out)
      write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, index * rows, 0)  # noqa: E731
      return jax.tree.map(write, out, new)

    out = jax.lax.fori_loop(start, end, one, out)
  return out


def mean_gradient(
  loss_fn: Callable, params: Params, placement: Placement, tree: Any, over: str, *, rows: int
) -> tuple[tuple[Array, dict[str, Array]], Params]:
  """((loss, metrics), gradient) of a loss that is a mean over tokens, from chunk after chunk of rows.

  Args:
    loss_fn: (params, arrays [n, W]) -> (loss, metrics), means over the tokens that the field `over` of the arrays
      marks; a metric NAME_max is a maximum.
    placement, tree, rows: as for `map_rows`.
  """
  total = jnp.maximum(jnp.sum(getattr(tree, over)), 1)

  def chunk_loss(params, chunk):
    loss, metrics = loss_fn(params, chunk)
    share = jnp.sum(getattr(chunk, over)) / total  # a chunk's means weigh by its tokens
    return share * loss, {n: x if n.endswith("_max") else share * x for n, x in metrics.items()}

  def gradient(index, level):
    chunk = _chunk(tree, index, rows, level)
    return jax.value_and_grad(chunk_loss, has_aux=True)(params, chunk)

  means, _ = jax.eval_shape(lambda: gradient(0, 0))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), means)
  result = zeros, jax.tree.map(jnp.zeros_like, params)
  for level, (start, end) in enumerate(_spans(placement)):

    def add(index, so_far, level=level):
      new = gradient(index, level)
      result = jax.tree.map(jnp.add, so_far, new)
      (_, old), (_, metrics), (_, latest) = so_far[0], result[0], new[0]
      metrics.update({n: jnp.maximum(old[n], latest[n]) for n in metrics if n.endswith("_max")})
      return result

    result = jax.lax.fori_loop(start, end, add, result)
  return result


def num_cells(placement: Placement, *, rows: int) -> Array:
  """How many cells, those without a token included, `map_rows` and `mean_gradient` work on."""
  return placement.end_K[-1] * rows * placement.cell_BL.shape[1]


def _spans(placement: Placement) -> list[tuple[Array, Array]]:
  """(first, last + 1) of the chunks of each width."""
  ends = list(placement.end_K)
  return list(zip([jnp.int32(0), *ends[:-1]], ends, strict=True))


def _chunk(tree: Any, index, rows: int, level: int) -> Any:
  """The cells of rows index * rows to (index + 1) * rows, as rows of their own width, split over the devices."""

  def part(x):
    x = jax.lax.dynamic_slice_in_dim(x, index * rows, rows)
    return x.reshape(rows * NARROWING**level, -1)

  return constraints.shard_rows(jax.tree.map(part, tree))
