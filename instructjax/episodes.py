"""Several short episodes in a row, so that scoring and training cost what the tokens cost and padding nothing.

Called by ppo.py, inside its compiled step. Lengths are known on the device only, so rows are filled there and worked
off in chunks until none is left: there is no budget that a batch of long episodes could exceed. Imports no model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instructjax import layouts
from instructjax.structs import Array, Params, pytree


@pytree
class Layout:
  """Where the tokens of B episodes, each padded to L columns, lie in at most B shared rows of L columns.

  Attributes:
    cell_BL: int32 index into the shared rows, flattened; B * L where there is no token.
    num_rows: int32 scalar, rows in use; they come first.
  """

  cell_BL: Array
  num_rows: Array


def first_fit(is_token_BL: Array) -> Layout:
  """First-fit decreasing: the longest episode first, each into the first row that has room for it.

  At most 11/9 of the fewest possible rows, and 6/9 (Dosa 2007).

  Args:
    is_token_BL: True on an episode's tokens, which are contiguous.
  """
  # Small, and needed whole: split over devices, every step of the scan below would send it around.
  is_token_BL = layouts.whole(is_token_BL)
  num_episodes, width = is_token_BL.shape
  length_B = jnp.sum(is_token_BL, axis=1, dtype=jnp.int32)

  def place(room_B, episode):
    row = jnp.argmax(room_B >= length_B[episode]).astype(jnp.int32)
    return room_B.at[row].add(-length_B[episode]), (row, width - room_B[row])

  order_B = jnp.argsort(-length_B, stable=True)
  _, placed = jax.lax.scan(place, jnp.full((num_episodes,), width, jnp.int32), order_B)
  row_B, start_B = (jnp.zeros((num_episodes,), jnp.int32).at[order_B].set(x) for x in placed)
  shift_B = row_B * width + start_B - jnp.argmax(is_token_BL, axis=1).astype(jnp.int32)
  cell_BL = shift_B[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
  return Layout(
    cell_BL=jnp.where(is_token_BL, cell_BL, num_episodes * width),
    num_rows=jnp.max(row_B) + 1,
  )


def pack(layout: Layout, x_BL: Array, fill) -> Array:
  """Values of the episodes' tokens in the shared rows, `fill` where there is no token."""
  x_BL = layouts.whole(x_BL)
  empty = jnp.full((x_BL.size,), fill, x_BL.dtype)
  return empty.at[layout.cell_BL].set(x_BL, mode="drop").reshape(x_BL.shape)


def segments(layout: Layout) -> Array:
  """int32 number of the episode that each cell of the shared rows belongs to, from 1; 0 where there is no token."""
  number_B = jnp.arange(1, layout.cell_BL.shape[0] + 1, dtype=jnp.int32)
  return pack(layout, jnp.broadcast_to(number_B[:, None], layout.cell_BL.shape), 0)


def unpack(layout: Layout, x_BL: Array) -> Array:
  """Undoes `pack`: from the shared rows back to one episode a row, 0 where there is no token."""
  x_BL = layouts.whole(x_BL)
  return x_BL.reshape(-1).at[layout.cell_BL].get(mode="fill", fill_value=0)


def map_rows(function: Callable, layout: Layout, tree: Any, *, rows: int) -> Any:
  """`function` of chunk after chunk of rows until all in use are done; zeros for the others.

  Args:
    function: arrays of `rows` rows -> arrays of `rows` rows.
    layout: how many rows are in use.
    tree: arrays of B rows.
    rows: of a chunk; divides B.
  """
  num_rows = layout.cell_BL.shape[0]
  shapes = jax.eval_shape(function, _chunk(tree, 0, rows))
  empty = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), shapes)

  def one(index, out):
    write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index * rows, 0)  # noqa: E731
    return jax.tree.map(write, out, function(_chunk(tree, index, rows)))

  return jax.lax.fori_loop(0, -(-layout.num_rows // rows), one, empty)


def mean_gradient(
  loss_fn: Callable, params: Params, layout: Layout, tree: Any, over: str, *, rows: int
):
  """((loss, metrics), gradient) of a loss that is a mean over tokens, from chunk after chunk of rows.

  Args:
    loss_fn: (params, arrays of `rows` rows) -> (loss, metrics), means over the tokens that the field `over` of the
      arrays marks; a metric NAME_max is a maximum.
    layout, tree, rows: as for `map_rows`.
  """
  total = jnp.maximum(jnp.sum(getattr(tree, over)), 1)

  def chunk_loss(params, chunk):
    loss, metrics = loss_fn(params, chunk)
    share = jnp.sum(getattr(chunk, over)) / total  # a chunk's means weigh by its tokens
    return share * loss, {n: x if n.endswith("_max") else share * x for n, x in metrics.items()}

  def gradient(index):
    return jax.value_and_grad(chunk_loss, has_aux=True)(params, _chunk(tree, index, rows))

  def add(index, so_far):
    new = gradient(index)
    result = jax.tree.map(jnp.add, so_far, new)
    (_, old), (_, metrics), (_, latest) = so_far[0], result[0], new[0]
    metrics.update({n: jnp.maximum(old[n], latest[n]) for n in metrics if n.endswith("_max")})
    return result

  means, _ = jax.eval_shape(gradient, 0)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), means)
  zeros = zeros, jax.tree.map(jnp.zeros_like, params)
  return jax.lax.fori_loop(0, -(-layout.num_rows // rows), add, zeros)


def _chunk(tree: Any, index, rows: int) -> Any:
  """Rows index * rows to (index + 1) * rows of every array, split over the devices."""
  part = lambda x: jax.lax.dynamic_slice_in_dim(x, index * rows, rows)  # noqa: E731
  return layouts.shard_rows(jax.tree.map(part, tree))
