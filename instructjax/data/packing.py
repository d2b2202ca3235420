"""Packs token sequences of different lengths into rows of equal length, with segment ids that keep them apart.

Called by batching.py, and by code that scores answers. Imports structs and errors only.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import PackedBatch, tree_of


def pack(sequence_lengths: Sequence[int], length: int) -> list[list[int]]:
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
  rows: list[list[int]] = []
  # (free tokens, row), sorted, so the first entry with enough room is the fullest such row
  room: list[tuple[int, int]] = []
  for index in sorted(range(len(sequence_lengths)), key=lambda i: -sequence_lengths[i]):
    needed = sequence_lengths[index]
    if not 0 < needed <= length:
      raise UserError(f"a sequence of {needed} tokens does not fit rows of length={length}")
    found = bisect.bisect_left(room, (needed, 0))
    if found < len(room):
      left, row = room.pop(found)
    else:
      left, row = length, len(rows)
      rows.append([])
    rows[row].append(index)
    if left > needed:
      bisect.insort(room, (left - needed, row))
  return rows


def pack_rows(
  sequences: Sequence[Sequence[int]], num_unweighted: Sequence[int], *, length: int, vocab_size: int
) -> PackedBatch:
  """Packs all sequences into rows for language modelling.

  Args:
    sequences: token ids.
    num_unweighted: number of leading tokens of each sequence that carry no loss, which are its prompt. The first token
      never carries a loss, because no token precedes it.
    length: tokens per row.
    vocab_size: also the id of padding.
  Raises:
    UserError: a sequence is empty or longer than a row.
  """
  rows = pack([len(sequence) for sequence in sequences], length)
  token_BL = np.full((len(rows), length), vocab_size, np.int32)
  segment_BL = np.zeros_like(token_BL)
  position_BL = np.zeros_like(token_BL)
  weight_BL = np.zeros(token_BL.shape, np.float32)
  position_L = np.arange(length, dtype=np.int32)
  for row, members in enumerate(rows):
    start = 0
    for segment, index in enumerate(members, start=1):
      stop = start + len(sequences[index])
      token_BL[row, start:stop] = sequences[index]
      segment_BL[row, start:stop] = segment
      position_BL[row, start:stop] = position_L[: stop - start]
      # From the second token on at the earliest: nothing precedes the first.
      weight_BL[row, start + max(1, num_unweighted[index]) : stop] = 1
      start = stop
  return tree_of(
    PackedBatch,
    token_BL=token_BL,
    segment_BL=segment_BL,
    position_BL=position_BL,
    weight_BL=weight_BL,
  )


@dataclasses.dataclass(frozen=True)
class ScoredRows:
  """Sequences packed into rows, with the position of each sequence's end.

  Attributes:
    token_SL, segment_SL: as in RankedBatch.
    last_N: int32 index of each sequence's last token in the flattened rows (row * L + column). N counts sequences.
  """

  token_SL: np.ndarray
  segment_SL: np.ndarray
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


def split_long(sequence: Sequence[int], length: int) -> list[Sequence[int]]:
  """Splits a sequence into consecutive pieces of at most `length` tokens."""
  return [sequence[start : start + length] for start in range(0, len(sequence), length)]
