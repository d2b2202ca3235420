"""Trees of a prompt and its answers, by hand."""

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.core.structs import Trees
from instructjax.data import trees
from instructjax.data.tokenize import RankingTokens
from instructjax.data.trees import Tree

PAD = 9


def ranking(prompt, *answers):
  return RankingTokens(prompt, list(answers), [1] * len(answers), None)


def test_answers_go_into_as_many_trees_as_rows_are_long():
  """A prompt of two; answers of 1, 2, 3 and 1 in rows of 6: 2 + 1 + 2 = 5, then 2 + 3 + 1 = 6."""
  item = ranking([1, 2], [3], [4, 5], [6, 7, 8], [3])
  assert trees.grow(item, 6) == [Tree([1, 2], [[3], [4, 5]]), Tree([1, 2], [[6, 7, 8], [3]])]
  assert [tree.size for tree in trees.grow(item, 6)] == [5, 6]
  assert trees.grow(item, 9) == [Tree([1, 2], item.responses)]
  assert len(trees.grow(item, 5)) == 3
  with pytest.raises(UserError, match="5 tokens does not fit rows of length=4"):
    trees.grow(item, 4)


def test_rows_by_hand():
  """Row 0 holds the second tree and a pad, row 1 nothing, row 2 the first tree and the third."""
  grown = [Tree([1, 2], [[3], [4]]), Tree([5], [[6, 7], [8, 6], [7]]), Tree([8], [[1]])]
  found = trees.lay_out(grown, [[1], [], [0, 2]], length=7, vocab_size=PAD)
  pads = [PAD] * 7
  assert found.token_SL.tolist() == [[5, 6, 7, 8, 6, 7, PAD], pads, [1, 2, 3, 4, 8, 1, PAD]]
  segments = found.segment_SL
  assert isinstance(segments, Trees)
  assert segments.segment_BL.tolist() == [[1] * 6 + [0], [0] * 7, [1] * 4 + [2, 2, 0]]
  assert segments.position_BL.tolist() == [[0, 1, 2, 1, 2, 1, 0], [0] * 7, [0, 1, 2, 2, 0, 1, 0]]
  assert segments.last_BL.tolist() == [[5, 2, 2, 4, 4, 5, -1], [-1] * 7, [3, 3, 2, 3, 5, 5, -1]]
  # In the order of trees and answers, not of rows.
  assert found.last_N.tolist() == [14 + 2, 14 + 3, 2, 4, 5, 14 + 5]
  arrays = [found.token_SL, found.last_N, *vars(segments).values()]
  assert all(x.dtype == np.int32 for x in arrays)
