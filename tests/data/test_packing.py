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


def test_equal_rows_and_sequences_are_taken_in_order():
  # Rooms after 6, 6, 6: 2, 2, 2. Each 2 goes to the first row of those that are equally full.
  assert packing.pack([2, 6, 6, 2, 6, 2, 2], 8) == [[1, 0], [2, 3], [4, 5], [6]]


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


def pack_rows(sequences, num_unweighted=None, splits=False, **kwargs):
  ids = np.array([i for sequence in sequences for i in sequence], "<u2")
  return packing.pack_rows(
    lambda start, stop: ids[start:stop].tobytes(),
    ids.dtype,
    np.cumsum([len(sequence) for sequence in sequences]),
    None if num_unweighted is None else np.array(num_unweighted),
    splits=splits,
    **kwargs,
  )


def test_packed_rows_by_hand():
  rows = pack_rows([[1, 2], [3, 4, 5]], [0, 2], length=6, vocab_size=9)
  batch = rows.gather([0])
  np.testing.assert_array_equal(batch.token_BL, [[3, 4, 5, 1, 2, 9]])
  np.testing.assert_array_equal(batch.segment_BL, [[1, 1, 1, 2, 2, 0]])
  np.testing.assert_array_equal(batch.position_BL, [[0, 1, 2, 0, 1, 0]])
  # The prompt 3, 4 has no weight; neither has 1, which nothing precedes; nor the pad.
  np.testing.assert_array_equal(batch.weight_BL, [[0, 0, 1, 0, 1, 0]])
  assert batch.token_BL.dtype == batch.segment_BL.dtype == batch.position_BL.dtype == np.int32
  assert batch.weight_BL.dtype == np.float32


def test_long_sequences_are_split_over_rows():
  batch = pack_rows([[1, 2, 3, 4, 5], [6, 7]], length=3, vocab_size=9, splits=True).gather(
    [0, 1, 2]
  )
  # Pieces of 3, 2 and 2 tokens; each is alone, and its first token has nothing before it.
  np.testing.assert_array_equal(batch.token_BL, [[1, 2, 3], [4, 5, 9], [6, 7, 9]])
  np.testing.assert_array_equal(batch.weight_BL, [[0, 1, 1], [0, 1, 0], [0, 1, 0]])
  np.testing.assert_array_equal(batch.position_BL, [[0, 1, 2], [0, 1, 0], [0, 1, 0]])
  # A multiple of the length leaves no empty piece.
  assert pack_rows([[1] * 6], length=3, vocab_size=9, splits=True).num_rows == 2


def test_batches_of_packed_rows_equal_a_loop():
  rng = np.random.default_rng(0)
  sequences = [rng.integers(0, 50, size=size).tolist() for size in rng.integers(1, 30, size=200)]
  num_unweighted = [int(rng.integers(0, len(one) + 1)) for one in sequences]
  rows = pack_rows(sequences, num_unweighted, length=32, vocab_size=50)
  members = packing.pack([len(one) for one in sequences], 32)
  assert rows.num_rows == len(members)
  chosen = rng.permutation(len(members))[:40]
  batch = rows.gather(chosen)
  for b, row in enumerate(chosen):
    expected = np.array([[50, 0, 0, 0]] * 32)  # token, segment, position, weight
    column = 0
    for segment, index in enumerate(members[row], start=1):
      for position, token in enumerate(sequences[index]):
        weight = position >= max(1, num_unweighted[index])
        expected[column] = token, segment, position, weight
        column += 1
    found = [batch.token_BL[b], batch.segment_BL[b], batch.position_BL[b], batch.weight_BL[b]]
    np.testing.assert_array_equal(np.stack(found, axis=1), expected)


def test_a_batch_without_rows_has_the_shape_of_rows():
  batch = pack_rows([[1, 2]], length=4, vocab_size=9).gather(np.zeros(0, int))
  assert batch.token_BL.shape == batch.weight_BL.shape == (0, 4)


def test_rows_are_recognised_by_tokens_order_weights_and_shape():
  pack = lambda *args, length=6, vocab_size=9: (
    pack_rows(*args, length=length, vocab_size=vocab_size).checksum
  )
  base = [[1, 2], [3, 4, 5]]
  others = [
    pack(base, length=7),
    pack(base, vocab_size=10),
    pack([[1, 2], [3, 4, 6]]),
    pack([[1, 2, 3], [4, 5]]),  # the same tokens end to end
    pack(base[::-1]),
    pack(base, [0, 1]),
  ]
  assert pack(base) == pack(base)
  # Of equal rows in another order of the data only the order of the tokens on disk differs.
  assert [other != pack(base) for other in others] == [True, True, True, True, False, True]
