"""Packs token sequences of different lengths into rows of equal length, with segment ids that keep them apart.

Called by batching.py, and by code that scores answers. Imports structs and errors only.
"""

import bisect
import dataclasses
import heapq
import itertools
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import PackedBatch, Trees, tree_of

Read = Callable[[int, int], bytes]


def pack(sequence_lengths: Sequence[int] | np.ndarray, length: int) -> list[list[int]]:
  """Assigns sequences to rows so that few rows are needed.

  The algorithm is best-fit decreasing: it takes the longest sequence first, and puts each into the fullest row that has
  room for it. Sequences of equal length keep their order. It takes O(n log n) time, and comes close to the smallest
  possible number of rows.

  Args:
    sequence_lengths: number of tokens in each sequence.
    length: tokens per row.
  Returns:
    For each row, the indices of its sequences. Every index is in exactly one row.
  Raises:
    UserError: a sequence is empty or longer than a row.
  """
  size_N = np.asarray(sequence_lengths, np.int64)
  if size_N.size and not 0 < (worst := _worst(size_N, length)) <= length:
    raise UserError(f"a sequence of {worst} tokens does not fit rows of length={length}")
  rows: list[list[int]] = []
  # Rows with room by their free tokens: a heap for each number of them, and those numbers in order. The first entry
  # with enough room is the fullest such row.
  room: dict[int, list[int]] = {}
  free: list[int] = []
  order_N = np.argsort(-size_N, kind="stable")
  for index, needed in zip(order_N.tolist(), size_N[order_N].tolist()):
    found = bisect.bisect_left(free, needed)
    if found < len(free):
      left = free[found]
      row = heapq.heappop(room[left])
      if not room[left]:
        del free[found]
    else:
      left, row = length, len(rows)
      rows.append([])
    rows[row].append(index)
    left -= needed
    if left:
      if not room.setdefault(left, []):
        bisect.insort(free, left)
      heapq.heappush(room[left], row)
  return rows


def _worst(size_N: np.ndarray, length: int) -> int:
  """The first size that is no size of a sequence in a row, or any that is."""
  return int(size_N[np.argmax((size_N <= 0) | (size_N > length))])


_BLOCK = 1024  # rows read at a time to be checked


class Damaged(Exception):
  """A file of tokens or rows does not hold what was written."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
  """Rows of packed sequences, of which only those of a batch are read.

  A piece is what lies in a row without a break: a sequence, or a part of one that is longer than a row.

  Attributes:
    length: tokens per row.
    vocab_size: also the id of padding.
    read: (start, stop) -> the bytes of those tokens of all sequences, which lie end to end.
    dtype: type of the tokens there.
    start_N, size_N: where each piece begins among these tokens, and how many tokens it has; in the order of the rows.
    num_unweighted_N: the number of leading tokens of each piece that carry no loss; None for 0.
    first_R: the first piece of each row, and at last the number of pieces.
    crc_R: CRC-32 of each row as `_read` computes it.
    checksum: CRC-32 of all rows and their shape.
  """

  length: int
  vocab_size: int
  read: Read
  dtype: np.dtype
  start_N: np.ndarray
  size_N: np.ndarray
  num_unweighted_N: np.ndarray | None
  first_R: np.ndarray
  crc_R: np.ndarray
  checksum: int

  @property
  def num_rows(self) -> int:
    return len(self.crc_R)

  @property
  def num_bytes(self) -> int:
    """Bytes of the arrays."""
    arrays = (self.start_N, self.size_N, self.num_unweighted_N, self.first_R, self.crc_R)
    return sum(array.nbytes for array in arrays if array is not None)

  def gather(self, row_B: np.ndarray) -> PackedBatch:
    """Makes a batch of these rows.

    Raises:
      Damaged: a row is not what was packed.
    """
    row_B = np.asarray(row_B)
    parts, size_N, num_unweighted_N, count_B, crc_B = _read(self, row_B)
    wrong = np.flatnonzero(crc_B != self.crc_R[row_B])
    if wrong.size:
      raise Damaged(f"row {row_B[wrong[0]]}")
    begin_N = np.cumsum(size_N) - size_N  # among the tokens of the batch
    # The batch's row of each piece, and the first piece of that row.
    row_N = np.repeat(np.arange(len(count_B)), count_B)
    first_N = np.repeat(np.cumsum(count_B) - count_B, count_B)
    # Of each token: its place in its piece, and in the flattened batch.
    position_T = np.arange(size_N.sum()) - np.repeat(begin_N, size_N)
    column_N = begin_N - begin_N[first_N]
    place_T = np.repeat(row_N * self.length + column_N, size_N) + position_T
    shape = (len(count_B), self.length)
    token_BL = np.full(shape, self.vocab_size, np.int32)
    segment_BL, position_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weight_BL = np.zeros(shape, np.float32)
    token_BL.reshape(-1)[place_T] = np.frombuffer(b"".join(parts), self.dtype)
    segment_BL.reshape(-1)[place_T] = np.repeat(np.arange(len(size_N)) - first_N + 1, size_N)
    position_BL.reshape(-1)[place_T] = position_T
    # From the second token on at the earliest: nothing precedes the first.
    is_weighted_T = position_T >= np.repeat(np.maximum(1, num_unweighted_N), size_N)
    weight_BL.reshape(-1)[place_T] = is_weighted_T
    return tree_of(
      PackedBatch,
      token_BL=token_BL,
      segment_BL=segment_BL,
      position_BL=position_BL,
      weight_BL=weight_BL,
    )


def _read(
  rows: PackedRows, row_B: np.ndarray
) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Reads rows: (ids of their pieces, sizes, tokens without loss, pieces of each row, CRC-32 of each row).

  The CRC is of everything that a batch takes from a row.

  Raises:
    Damaged: the index points to nothing.
  """
  first_B = rows.first_R[row_B].astype(np.int64)
  count_B = rows.first_R[row_B + 1].astype(np.int64) - first_B
  # No row is empty, and a damaged index may say anything.
  if len(row_B) and (count_B.min() < 1 or count_B.max() > rows.length):
    raise Damaged("its index")
  end_B = np.cumsum(count_B)
  piece_N = np.arange(count_B.sum()) + np.repeat(first_B - (end_B - count_B), count_B)
  if len(row_B) and piece_N.max() >= len(rows.size_N):
    raise Damaged("its index")
  unweighted_N = rows.num_unweighted_N
  shape_N2 = np.zeros((len(piece_N), 2), "<i8")
  shape_N2[:, 0] = rows.size_N[piece_N]
  if unweighted_N is not None:
    shape_N2[:, 1] = unweighted_N[piece_N]
  if shape_N2[:, 0].max(initial=0) > rows.length:
    raise Damaged("its index")
  starts, sizes = rows.start_N[piece_N].tolist(), shape_N2[:, 0].tolist()
  shapes, parts, crcs = shape_N2.tobytes(), [], []
  for stop, count in zip(end_B.tolist(), count_B.tolist()):
    crc = zlib.crc32(shapes[16 * (stop - count) : 16 * stop])
    for piece in range(stop - count, stop):
      part = rows.read(starts[piece], starts[piece] + sizes[piece])
      crc = zlib.crc32(part, crc)
      parts.append(part)
    crcs.append(crc)
  return parts, shape_N2[:, 0], shape_N2[:, 1], count_B, np.array(crcs, np.uint32)


def pack_rows(
  read: Read,
  dtype: np.dtype,
  end_S: np.ndarray,
  num_unweighted_S: np.ndarray | None,
  *,
  length: int,
  vocab_size: int,
  splits: bool,
) -> PackedRows:
  """Packs all sequences into rows for language modelling.

  Args:
    read: (start, stop) -> the bytes of those tokens of all sequences, which lie end to end.
    dtype: type of the tokens there.
    end_S: where each sequence ends among these tokens.
    num_unweighted_S: number of leading tokens of each sequence that carry no loss, which are its prompt; None for 0.
      The first token never carries a loss, because no token precedes it.
    length: tokens per row.
    vocab_size: also the id of padding.
    splits: whether a sequence that is longer than a row is split into pieces of `length` tokens. Attention does not
      reach from one piece to another. Then num_unweighted_S is None.
  Raises:
    UserError: a sequence is empty, or longer than a row and not to be split.
  """
  size_N = np.diff(end_S, prepend=0).astype(np.int64)
  start_N = end_S - size_N
  if splits:
    count_S = -(-size_N // length)
    number_N = np.arange(count_S.sum()) - np.repeat(np.cumsum(count_S) - count_S, count_S)
    start_N = np.repeat(start_N, count_S) + number_N * length
    size_N = np.minimum(np.repeat(size_N, count_S) - number_N * length, length)
  members = pack(size_N, length)
  order_N = np.fromiter(itertools.chain.from_iterable(members), np.int64, len(size_N))
  first_R = np.concatenate([[0], np.cumsum([len(row) for row in members], dtype=np.int64)])
  rows = PackedRows(
    length=length,
    vocab_size=vocab_size,
    read=read,
    dtype=dtype,
    start_N=smallest(start_N[order_N]),
    size_N=smallest(size_N[order_N]),
    num_unweighted_N=None if num_unweighted_S is None else smallest(num_unweighted_S[order_N]),
    first_R=smallest(first_R),
    crc_R=np.zeros(len(members), np.uint32),
    checksum=0,
  )
  blocks = np.array_split(np.arange(rows.num_rows), -(-rows.num_rows // _BLOCK) or 1)
  crc_R = np.concatenate([_read(rows, row_B)[-1] for row_B in blocks]).astype("<u4")
  checksum = zlib.crc32(crc_R.tobytes(), zlib.crc32(f"{length} {vocab_size} {len(crc_R)}".encode()))
  return dataclasses.replace(rows, crc_R=crc_R, checksum=checksum)


def smallest(number_N: np.ndarray) -> np.ndarray:
  """These numbers, none of them negative, in the smallest type that holds them."""
  return number_N.astype(np.min_scalar_type(number_N.max(initial=0)))


@dataclasses.dataclass(frozen=True)
class ScoredRows:
  """Sequences packed into rows, with the position of each sequence's end.

  Attributes:
    token_SL, segment_SL: as in RankedBatch.
    last_N: int32 index of each sequence's last token in the flattened rows (row * L + column). N counts sequences.
  """

  token_SL: np.ndarray
  segment_SL: np.ndarray | Trees
  last_N: np.ndarray


def scored_rows(
  sequences: Sequence[Sequence[int]],
  rows: Sequence[Sequence[int]],
  *,
  length: int,
  vocab_size: int,
) -> ScoredRows:
  """Lays out sequences that a reward model scores at their last token.

  Args:
    sequences: token ids.
    rows: for each row, the indices of its sequences, as `pack` returns them. A row may be empty.
    length: tokens per row.
    vocab_size: also the id of padding.
  """
  token_SL = np.full((len(rows), length), vocab_size, np.int32)
  segment_SL = np.zeros_like(token_SL)
  last_N = np.zeros(len(sequences), np.int32)
  for row, members in enumerate(rows):
    start = 0
    for segment, index in enumerate(members, start=1):
      stop = start + len(sequences[index])
      token_SL[row, start:stop] = sequences[index]
      segment_SL[row, start:stop] = segment
      last_N[index] = row * length + stop - 1
      start = stop
  return ScoredRows(token_SL, segment_SL, last_N)
