"""Puts the answers to a prompt into one row with a single copy of it, as a tree: ppo.share_prompts.

Called by rows.py, inside the compiled PPO step, in place of `shared_rows.first_fit`. An episode's prompt lies in the
tree's trunk, all but its last token. Each answer is a branch that begins with that token, from whose column its first
token is predicted. So a response token is read at the column before it, as in any other row. Imports no model.
"""

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Trees
from instructjax.parallel import constraints, sharding
from instructjax.rl import shared_rows
from instructjax.rl.shared_rows import Placement


def row_width(
  length: int, prompt_length: int, group: int, rows: int, shards: int | None = None
) -> int | None:
  """The width of all rows: a multiple of L that holds any tree, and of which there are enough for all of them.

  None if a device's rows of a chunk cannot be joined so. `group` rows a device always can.

  Args:
    length: L, the columns of an episode.
    prompt_length: columns of a prompt among them.
    group: answers to a prompt.
    rows: rows of L columns in a chunk.
    shards: parts that rows are split into; None for those of the mesh in use.
  """
  longest = prompt_length - 1 + group * (length - prompt_length + 1)
  each = rows // (shards or sharding.num_row_shards(jax.sharding.get_abstract_mesh()))

  def fits_all(n: int) -> bool:
    # A row that n rows were joined to has room for so many of the longest trees. If none is longer, first-fit leaves no
    # row with fewer trees but the last. There are 1 / n as many rows as episodes, and 1 / group as many trees.
    trees = n * length // longest
    return each % n == 0 and n <= group * trees

  fits = [n * length for n in range(1, each + 1) if fits_all(n)]
  # In a row that holds a tree or two, much would be left over: see `shared_rows.JOINED`.
  return next((width for width in fits if width >= shared_rows.JOINED), fits[-1] if fits else None)


def place(
  is_token_BL: Array, *, prompt_length: int, group: int, rows: int, shards: int | None = None
) -> tuple[Placement, Trees, int]:
  """Places trees by first-fit decreasing, as `shared_rows.first_fit` does episodes.

  Args:
    is_token_BL: True on an episode's tokens, which are contiguous: a prompt of one token at least, which ends in column
      prompt_length - 1, and an answer. Each `group` episodes in a row have the same prompt.
    prompt_length, group, rows, shards: as for `row_width`.
  Returns:
    (placement, the shared rows' trees, the rows' width). Tokens of a common prompt have one cell.
  Raises:
    ValueError: no row holds every tree: `row_width` is None.
  """
  is_token_BL = constraints.whole(is_token_BL)
  num_episodes, length = is_token_BL.shape
  width = row_width(length, prompt_length, group, rows, shards)
  if width is None:
    raise ValueError(f"place: rows={rows} of {length} columns hold no trees of group={group}")
  prompt_B = jnp.sum(is_token_BL[:, :prompt_length], axis=1, dtype=jnp.int32)
  branch_B = 1 + jnp.sum(is_token_BL[:, prompt_length:], axis=1, dtype=jnp.int32)
  trunk_B = prompt_B - 1
  branch_GK = branch_B.reshape(-1, group)
  size_G = trunk_B[::group] + jnp.sum(branch_GK, axis=1)
  # As many rows are open as there are trees. First-fit fills the first ones, and these have cells: see `row_width`.
  first_1G = jnp.arange(len(size_G), dtype=jnp.int32)[None] * width
  everyone = jnp.ones_like(size_G, bool)
  room_1G, cell_G = shared_rows.place_each(
    size_G, everyone, jnp.array([width]), first_1G, jnp.full_like(first_1G, width), size_G
  )
  of_chunk = rows * length // width
  chunks = -(-jnp.sum(room_1G < width, dtype=jnp.int32) // of_chunk)
  # Where each episode's tree and branch begin, in cells.
  tree_B = jnp.repeat(cell_G, group, total_repeat_length=num_episodes)
  before_B = (jnp.cumsum(branch_GK, axis=1) - branch_GK).reshape(-1)
  start_B = tree_B + trunk_B + before_B
  column_L = jnp.arange(length, dtype=jnp.int32)
  position_BL = column_L[None] - jnp.argmax(is_token_BL, axis=1).astype(jnp.int32)[:, None]
  is_trunk_BL = position_BL < trunk_B[:, None]
  cell_BL = jnp.where(
    is_trunk_BL, tree_B[:, None] + position_BL, (start_B - trunk_B)[:, None] + position_BL
  )
  tree_end_B = tree_B + jnp.repeat(size_G, group, total_repeat_length=num_episodes) - 1
  last_BL = jnp.where(is_trunk_BL, tree_end_B[:, None], (start_B + branch_B - 1)[:, None]) % width
  none = num_episodes * length
  placement = Placement(cell_BL=jnp.where(is_token_BL, cell_BL, none), end_K=chunks[None])
  number_B = 1 + jnp.arange(num_episodes, dtype=jnp.int32) // group
  trees = Trees(
    segment_BL=shared_rows.to_shared(
      placement, jnp.broadcast_to(number_B[:, None], is_token_BL.shape), 0
    ),
    position_BL=shared_rows.to_shared(placement, position_BL, 0),
    last_BL=shared_rows.to_shared(placement, last_BL, -1),
  )
  return placement, trees, width
