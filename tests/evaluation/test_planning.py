"""Groups, trees, rows and batches, by hand and by what must hold for any texts."""

import numpy as np
import pytest

from instructjax.evaluation import planning
from instructjax.evaluation.planning import Text


def text(ids, count=1):
  """A text whose last `count` columns are read off."""
  return Text(tuple(ids), len(ids) - count, tuple(range(90, 90 + count)))


def test_a_tree_by_hand():
  """Three texts of which two share four tokens and all share two, in depth-first order."""
  texts = [text([5, 6, 7, 8, 1]), text([5, 6, 9], 2), text([5, 6, 7, 8, 2, 3], 2)]
  tree = planning._tree([texts[0], texts[2], texts[1]], [0, 2, 1], 0)
  assert tree.token_L == (5, 6, 7, 8, 1, 2, 3, 9)
  assert tree.depth_L == (0, 1, 2, 3, 4, 4, 5, 2)
  assert tree.last_L == (7, 7, 6, 6, 4, 6, 6, 7)
  assert tree.texts == (0, 2, 1)
  assert tree.reads == ((4,), (5, 6), (1, 7))
  assert tree.size == 8


def test_a_tree_with_more_targets_than_columns_takes_their_room():
  same = [Text((1, 2, 3), 2, (n,)) for n in range(9)]
  (group,) = planning.groups(same, least=1)
  assert sum(len(tree.token_L) for tree in group.trees) >= 3
  tree = planning._tree(same, range(9), 0)
  assert (len(tree.token_L), tree.size) == (3, 9)


def path(tree, column):
  """Tokens that a column sees, by the span of each column before it."""
  return [t for s, t in enumerate(tree.token_L[: column + 1]) if s <= column <= tree.last_L[s]]


@pytest.mark.parametrize("is_tree", [True, False])
def test_every_text_is_read_with_its_own_tokens_before_it(monkeypatch, is_tree):
  monkeypatch.setattr(planning, "ROW", 40)
  monkeypatch.setattr(planning, "SAVED", 40)
  rng = np.random.default_rng(0)
  shots, texts = rng.integers(0, 9, 50).tolist(), []
  for question in range(30):
    start = (shots if question % 3 else []) + rng.integers(0, 9, rng.integers(1, 20)).tolist()
    texts += [text(start + rng.integers(0, 9, 4).tolist(), 3) for _ in range(3)]
  texts.append(texts[0])  # twice the same
  found = planning.groups(texts, is_tree=is_tree)
  seen = []
  for group in found:
    for tree in group.trees:
      for number, columns in zip(tree.texts, tree.reads):
        seen.append(number)
        ids, first = texts[number].ids, texts[number].first
        assert len(columns) == len(texts[number].targets)
        for place, column in enumerate(columns):
          assert [*group.past, *path(tree, column)] == list(ids[: first + place + 1])
          assert tree.depth_L[column] == first + place
  assert sorted(seen) == list(range(len(texts)))
  assert tuple(shots) in [group.past[:50] for group in found]
  assert planning.num_tokens(found) < sum(len(one.ids) for one in texts) / 2


def test_a_past_is_kept_only_where_enough_texts_share_it():
  shots = list(range(100))
  texts = [text([*shots, n, n + 1]) for n in range(12)]
  assert planning.groups(texts, is_tree=False, least=12)[0].past == tuple(shots)
  assert planning.groups(texts, is_tree=False, least=13)[0].past == ()
  # As a tree, all of them fit one row.
  (group,) = planning.groups(texts)
  assert group.past == () and len(group.trees) == 1
  # What is read off must not lie in the past.
  texts = [Text((*shots, n), 60, (n,) * 41) for n in range(30)]
  assert {len(group.past) for group in planning.groups(texts)} == {60}


def test_batches_begin_with_the_largest_and_fill_rows():
  trees = [planning._tree([text(range(size))], [n], 0) for n, size in enumerate((10, 200, 90, 50))]
  first, second = planning.batches(trees, tokens=192, shards=1)
  # 200 fits rows of 256, where 50 fits too; then 90 and 10 share a row of 96 no more.
  assert first.length == 256
  assert [[tree.size for tree in row] for row in first.rows] == [[200, 50]]
  assert second.length == 96
  assert [[tree.size for tree in row] for row in second.rows] == [[90], [10]]
  (batch,) = planning.batches(trees[:1], tokens=192, shards=4)
  assert [len(row) for row in batch.rows] == [1, 0, 0, 0]


def test_buckets():
  assert [planning.bucket(n) for n in (1, 64, 65, 97, 129, 300)] == [64, 64, 96, 128, 192, 384]
