"""What is computed together: texts that begin alike as trees, trees in rows, rows in batches of few shapes.

Called by scoring.py and generation.py. Plain NumPy; imports no model. What decides is the tokens alone, so a text is
computed with the same tokens before it whatever else is asked for.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

SHARED = 8  # a tree is made of texts that share at least so many tokens
CACHED = 32  # a text before a batch is kept apart from so many tokens on,
SAVED = 1024  # and if so many tokens need not be read again
ROW = 1024  # most columns of a row, unless one text alone is longer


@dataclasses.dataclass(frozen=True)
class Text:
  """Tokens that a network reads, and where something is read off.

  Attributes:
    ids: the tokens.
    first: the first column that something is read off; it is followed by others.
    targets: the token that each of these columns is asked for.
  """

  ids: tuple[int, ...]
  first: int
  targets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
  """Texts that begin alike, in depth-first order.

  Attributes:
    texts: their numbers.
    token_L, depth_L, last_L: a column's token, the number of tokens before it, and the last column below it.
    reads: of each text, the columns that its targets are asked for.
  """

  texts: tuple[int, ...]
  token_L: tuple[int, ...]
  depth_L: tuple[int, ...]
  last_L: tuple[int, ...]
  reads: tuple[tuple[int, ...], ...]

  @property
  def size(self) -> int:
    """Columns that it takes of a row, which has as many places for targets."""
    return max(len(self.token_L), sum(map(len, self.reads)))


@dataclasses.dataclass(frozen=True)
class Group:
  """Trees that come after the same tokens, which are computed once."""

  past: tuple[int, ...]
  trees: tuple[Tree, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of trees, all of one length."""

  length: int
  rows: tuple[tuple[Tree, ...], ...]


def num_tokens(groups: Sequence[Group]) -> int:
  """Tokens that the network reads."""
  return sum(len(g.past) + sum(len(tree.token_L) for tree in g.trees) for g in groups)


def bucket(size: int, least: int = 64) -> int:
  """The next of 64, 96, 128, 192, 256 and so on: at most a third of a row is empty, and there are few lengths."""
  power = least
  while power < size:
    if power * 3 // 2 >= size:
      return power * 3 // 2
    power *= 2
  return power


def groups(texts: Sequence[Text], *, is_tree: bool = True, least: int = 1) -> list[Group]:
  """Divides texts into groups that share what comes before, and each into trees.

  Args:
    texts: in any order.
    is_tree: whether texts may share columns of a row; if not, every text is a tree by itself.
    least: fewest texts that a past is kept for.
  """
  ids = [np.asarray(text.ids, ">u4") for text in texts]
  order = sorted(range(len(texts)), key=lambda index: ids[index].tobytes())
  length_N = np.array([len(ids[index]) for index in order], np.int64)
  lcp_N = np.array([_common(ids[a], ids[b]) for a, b in zip(order, order[1:])], np.int64)
  first_N = np.array([texts[index].first for index in order], np.int64)
  targets_N = np.array([len(texts[index].targets) for index in order], np.int64)
  found: dict[tuple[int, ...], list[Tree]] = {}
  waiting = [(0, len(order), 0)] if order else []
  while waiting:
    start, stop, past = waiting.pop()
    common = int(lcp_N[start : stop - 1].min()) if stop - start > 1 else 0
    grown = length_N[start] - past + np.sum(length_N[start + 1 : stop] - lcp_N[start : stop - 1])
    size = max(int(grown), int(targets_N[start:stop].sum()))
    if stop - start == 1 or (is_tree and size <= ROW and common - past >= SHARED):
      own = order[start:stop]
      tree = _tree([texts[index] for index in own], own, past)
      found.setdefault(texts[own[0]].ids[:past], []).append(tree)
      continue
    cuts = [start, *(start + 1 + np.flatnonzero(lcp_N[start : stop - 1] == common)), stop]
    # The column of a past is not computed again, so nothing can be read off it.
    cached = min(common, int(first_N[start:stop].min()))
    saved = (len(cuts) - 2) * (cached - past)
    if cached - past >= CACHED and saved >= SAVED and stop - start >= least:
      past = cached
    waiting += [(int(a), int(b), past) for a, b in zip(cuts, cuts[1:])]
  return [Group(past, tuple(trees)) for past, trees in sorted(found.items())]


def _common(a: np.ndarray, b: np.ndarray) -> int:
  size = min(len(a), len(b))
  differs = a[:size] != b[:size]
  return int(differs.argmax()) if differs.any() else size


def _tree(texts: Sequence[Text], numbers: Sequence[int], past: int) -> Tree:
  """Makes a tree of texts in the order of their tokens."""
  token_L: list[int] = []
  depth_L: list[int] = []
  last_L: list[int] = []
  reads = []
  path: list[int] = []  # columns of the newest text
  before: tuple[int, ...] = ()
  for text in texts:
    own = text.ids[past:]
    shared = _common(np.asarray(before, np.int64), np.asarray(own, np.int64))
    for column in path[shared:]:
      last_L[column] = len(token_L) - 1
    path = path[:shared]
    for depth in range(shared, len(own)):
      path.append(len(token_L))
      token_L.append(own[depth])
      depth_L.append(past + depth)
      last_L.append(0)
    start = text.first - past
    reads.append(tuple(path[start : start + len(text.targets)]))
    before = own
  for column in path:
    last_L[column] = len(token_L) - 1
  return Tree(tuple(numbers), tuple(token_L), tuple(depth_L), tuple(last_L), tuple(reads))


def batches(trees: Sequence[Tree], *, tokens: int, shards: int) -> list[Batch]:
  """Puts trees into rows, and rows into batches, the largest first.

  A row begins with the largest tree that is left, and is filled with the largest that fit.

  Args:
    trees: of one group.
    tokens: columns of a batch, or those of as many rows as the mesh has shards if that is more.
    shards: a batch has a multiple of so many rows, the last one empty ones too.
  """
  left = sorted(range(len(trees)), key=lambda index: trees[index].size)
  size = [trees[index].size for index in left]
  result = []
  while left:
    length = bucket(size[-1])
    rows: list[tuple[Tree, ...]] = []
    of_a_shard = max(tokens // length // shards, 1)
    most = shards << (of_a_shard.bit_length() - 1)
    while left and len(rows) < most:
      row, room = [], length
      while left and (place := bisect.bisect_right(size, room)):
        row.append(trees[left.pop(place - 1)])
        room -= size.pop(place - 1)
      rows.append(tuple(row))
    count = _power(-(-len(rows) // shards)) * shards
    rows += [()] * (count - len(rows))
    result.append(Batch(length, tuple(rows)))
  return result


def _power(number: int) -> int:
  """The next power of two."""
  return 1 << max(number - 1, 0).bit_length()
