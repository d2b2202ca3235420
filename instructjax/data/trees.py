"""Answers to one prompt as a tree: one copy of the prompt, and each answer after it as a branch.

A reward model then reads a prompt once for all of its answers. Called by batching.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import Trees, tree_of
from instructjax.data.packing import ScoredRows
from instructjax.data.tokenize import RankingTokens


@dataclasses.dataclass(frozen=True)
class Tree:
  """A prompt and some of its answers, as token ids."""

  prompt: Sequence[int]
  answers: Sequence[Sequence[int]]

  @property
  def size(self) -> int:
    """Columns that it takes."""
    return len(self.prompt) + sum(map(len, self.answers))


def grow(ranking: RankingTokens, length: int) -> list[Tree]:
  """The answers of a ranking in their order, in as many trees as it takes for each to fit in a row of `length`.

  Raises:
    UserError: an answer does not fit in a row with its prompt.
  """
  trees: list[Tree] = []
  for answer in ranking.responses:
    if len(ranking.prompt) + len(answer) > length:
      raise UserError(
        f"a sequence of {len(ranking.prompt) + len(answer)} tokens does not fit rows of length={length}"
      )
    if not trees or trees[-1].size + len(answer) > length:
      trees.append(Tree(ranking.prompt, []))
    trees[-1] = Tree(ranking.prompt, [*trees[-1].answers, answer])
  return trees


def lay_out(
  trees: Sequence[Tree], rows: Sequence[Sequence[int]], *, length: int, vocab_size: int
) -> ScoredRows:
  """Lays trees in rows, each with its prompt first; `last_N` is of their answers, in the order of the trees.

  Args:
    trees: the trees.
    rows: for each row, the indices of its trees, as `packing.pack` returns them. A row may be empty.
    length: columns of a row.
    vocab_size: also the id of padding.
  """
  token_SL = np.full((len(rows), length), vocab_size, np.int32)
  segment_SL, position_SL = np.zeros_like(token_SL), np.zeros_like(token_SL)
  last_SL = np.full_like(token_SL, -1)
  first_N = np.cumsum([0, *(len(tree.answers) for tree in trees)])
  last_N = np.zeros(first_N[-1], np.int32)
  for row, members in enumerate(rows):
    start = 0
    for segment, index in enumerate(members, start=1):
      tree = trees[index]
      stop, branch = start + tree.size, start + len(tree.prompt)
      segment_SL[row, start:stop] = segment
      token_SL[row, start:branch] = tree.prompt
      position_SL[row, start:branch] = np.arange(len(tree.prompt))
      last_SL[row, start:branch] = stop - 1
      for number, answer in enumerate(tree.answers, start=first_N[index]):
        end = branch + len(answer)
        token_SL[row, branch:end] = answer
        position_SL[row, branch:end] = len(tree.prompt) + np.arange(len(answer))
        last_SL[row, branch:end] = end - 1
        last_N[number] = row * length + end - 1
        branch = end
      start = stop
  columns = tree_of(Trees, segment_BL=segment_SL, position_BL=position_SL, last_BL=last_SL)
  return ScoredRows(token_SL, columns, last_N)
