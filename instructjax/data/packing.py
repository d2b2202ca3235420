"""Packing token sequences of unequal length into rows of one length, with segment ids.

Called by `pipeline` and, to score answers, by `answers`. Imports structs only.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import PackedBatch, tree_of


def pack(sequence_lengths: Sequence[int], length: int) -> list[list[int]]:
  """Groups sequences into rows: longest first, each into the fullest row that has room for it.

  Best-fit decreasing, ties in the order given: O(n log n), and close to the fewest rows possible.

  Args:
    sequence_lengths: tokens in each sequence.
    length: tokens a row holds.
  Returns:
    Rows of indices into `sequence_lengths`; every index is in exactly one row.
  """
  rows: list[list[int]] = []
  room: list[
    tuple[int, int]
  ] = []  # (tokens left, row), sorted: the first that is large enough is the fullest
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
  """All sequences packed into rows.

  Args:
    sequences: token ids.
    num_unweighted: how many leading tokens of each sequence carry no loss (its prompt); a
      sequence's first token never does, for nothing precedes it.
    length: tokens a row holds.
    vocab_size: the id of pads.
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
  """Sequences in rows, and where each of them ends.

  Attributes:
    token_SL, segment_SL: as in RankedBatch.
    last_N: int32 cell of each sequence's last token, the rows taken as one; N counts the sequences.
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
  """Sequences that are to be scored at their last token.

  Args:
    sequences: token ids.
    rows: indices of each row's sequences, as from `pack`; a row may be empty.
    length: tokens a row holds.
    vocab_size: the id of pads.
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
  """A sequence as pieces of at most `length` tokens, in order."""
  return [sequence[start : start + length] for start in range(0, len(sequence), length)]
