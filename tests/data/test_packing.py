import numpy as np
import pytest

from instructjax.data import packing


def test_rows_by_hand():
  # Longest first: 5 opens row 0, 4 row 1, 3 fills row 0, 2 goes to the fuller row that has room.
  assert packing.pack([2, 5, 4, 3], 8) == [[1, 3], [2, 0]]


def test_the_fullest_row_with_room_is_chosen():
  # Rooms after 7, 6, 5: 1, 2, 3. A 2 fits rows 1 and 2; row 1 is fuller.
  assert packing.pack([7, 6, 5, 2], 8) == [[0], [1, 3], [2]]


def test_every_sequence_is_in_one_row_and_rows_are_full():
  lengths = np.random.default_rng(0).integers(1, 40, size=2000).tolist()
  rows = packing.pack(lengths, 64)
  assert sorted(index for row in rows for index in row) == list(range(2000))
  assert max(sum(lengths[index] for index in row) for row in rows) <= 64
  assert len(rows) <= 1 + -(-sum(lengths) // 64)


@pytest.mark.parametrize("needed", [0, 9])
def test_what_does_not_fit_is_refused(needed):
  with pytest.raises(ValueError, match=f"a sequence of {needed} tokens does not fit rows of leng"):
    packing.pack([3, needed], 8)


def test_scored_rows_by_hand():
  rows = packing.scored_rows([[1, 2], [3, 4, 5], [6]], [[1, 0], [], [2]], length=6, vocab_size=9)
  np.testing.assert_array_equal(rows.token_SL, [[3, 4, 5, 1, 2, 9], [9] * 6, [6] + [9] * 5])
  np.testing.assert_array_equal(rows.segment_SL, [[1, 1, 1, 2, 2, 0], [0] * 6, [1] + [0] * 5])
  np.testing.assert_array_equal(rows.last_N, [4, 2, 12])
  np.testing.assert_array_equal(rows.token_SL.reshape(-1)[rows.last_N], [2, 5, 6])


def test_packed_rows_by_hand():
  batch = packing.pack_rows([[1, 2], [3, 4, 5]], [0, 2], length=6, vocab_size=9)
  np.testing.assert_array_equal(batch.token_BL, [[3, 4, 5, 1, 2, 9]])
  np.testing.assert_array_equal(batch.segment_BL, [[1, 1, 1, 2, 2, 0]])
  np.testing.assert_array_equal(batch.position_BL, [[0, 1, 2, 0, 1, 0]])
  # The prompt 3, 4 has no weight; neither has 1, which nothing precedes; nor the pad.
  np.testing.assert_array_equal(batch.weight_BL, [[0, 0, 1, 0, 1, 0]])
  assert batch.token_BL.dtype == batch.segment_BL.dtype == batch.position_BL.dtype == np.int32
  assert batch.weight_BL.dtype == np.float32


def test_split_long():
  assert packing.split_long([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
  assert packing.split_long([1, 2], 2) == [[1, 2]]
