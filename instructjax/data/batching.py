"""Shuffled, sharded and resumable batches of numpy arrays, made from token ids.

Called by the stages. Imports structs and the rest of `data`, but no model and no config.

Every `*_batches` function returns an endless `Batches` over one list of rows:
  - Each pass visits every row exactly once, in an order that depends only on (seed, pass).
  - Passes follow each other without a gap. A batch at the end of a pass is filled up from the next pass, so no row is
    dropped, and a batch may be larger than the data.
  - Each process asks for its own rows of the global batch. All processes together get the batch that a single process
    would get.
"""

import dataclasses
import functools
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import PromptBatch, RankedBatch, tree_of
from instructjax.data import packing, trees
from instructjax.data.packing import PackedRows
from instructjax.data.token_cache import CachedRows
from instructjax.data.tokenize import RankingTokens

Places = Sequence[int] | np.ndarray  # rows of a global batch


class Batches:
  """An endless iterator of batches whose position can be saved and restored exactly.

  Attributes:
    steps_per_epoch: number of batches after which every row has been seen at least once: the number of rows divided by
      batch_size, rounded up.
  """

  def __init__(
    self,
    checksum: int,
    gather: Callable[[np.ndarray, np.ndarray], Any],
    *,
    num_rows: int,
    batch_size: int,
    seed: int,
    places: Places | None,
  ):
    """Called by the `*_batches` functions only.

    Args:
      checksum: of all rows, by which `set_state` recognises the data.
      gather: makes a batch from (row numbers, their places in the global batch).
      num_rows: number of rows in the data.
      batch_size: number of rows in the global batch, over all processes.
      seed: any non-negative integer.
      places: the rows of the global batch that belong to this process, ascending; None for all of them.
    Raises:
      UserError: there is no data.
      ValueError: batch_size is not positive.
    """
    if not num_rows:
      raise UserError("cannot make batches: there is no data")
    if batch_size <= 0:
      raise ValueError(f"batch_size={batch_size} must be positive")
    self.steps_per_epoch = -(-num_rows // batch_size)
    # With other data, a saved position would silently lead to the wrong rows. Everything that determines the order is
    # therefore saved with the position.
    self._identity = {
      "batch_size": batch_size,
      "seed": seed,
      "rows": num_rows,
      "checksum": checksum,
    }
    place_b = np.asarray(range(batch_size) if places is None else places, np.int32)
    source = _BatchSource(num_rows, batch_size, seed, place_b, gather)
    # No threads: for small models, handing a batch from one thread to another takes longer than making it.
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._iterator = iter(grain.MapDataset.source(source).to_iter_dataset(read_options))

  def __iter__(self):
    return self

  def __next__(self):
    return next(self._iterator)

  def get_state(self) -> dict:
    """The iterator's position as JSON values. It is the same in every process."""
    return {"iterator": self._iterator.get_state(), **self._identity}

  def set_state(self, state: dict):
    """Continues from the position at which `get_state` was called.

    Raises:
      UserError: the state was saved with other data, or with another batch size or seed.
    """
    for name, value in self._identity.items():
      if state.get(name) != value:
        raise UserError(
          f"cannot resume the data: {name} was {state.get(name)} when saved and is {value} now"
        )
    self._iterator.set_state(state["iterator"])


class _BatchSource:
  """A grain data source whose items are whole batches.

  grain could also shuffle, repeat and batch single rows. It would then run Python once per row, which takes 1.6 ms
  instead of 0.04 ms for 64 rows.
  """

  def __init__(
    self, num_rows: int, batch_size: int, seed: int, place_b: np.ndarray, gather: Callable
  ):
    self._num_rows, self._batch_size, self._seed, self._gather = num_rows, batch_size, seed, gather
    self._place_b = place_b
    # A batch rarely spans more than two passes.
    self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

  def __len__(self) -> int:
    # Endless in practice. `__getitem__` multiplies by the batch size, which must not overflow.
    return sys.maxsize // self._batch_size

  def __getitem__(self, index: int) -> Any:
    # All passes, one after the other, form one long sequence of rows. A batch is a slice of it, so its content is a
    # function of its number, and resuming needs no more state than that number.
    epoch_b, index_b = np.divmod(
      index * self._batch_size + self._place_b.astype(np.int64), self._num_rows
    )
    row_b = np.empty_like(index_b)
    for epoch in np.unique(epoch_b):
      here = epoch_b == epoch
      row_b[here] = self._permutation(int(epoch))[index_b[here]]
    return self._gather(row_b, self._place_b)

  def _draw_permutation(self, epoch: int) -> np.ndarray:
    return np.random.default_rng((self._seed, epoch)).permutation(self._num_rows)


class ZippedBatches:
  """Advances several `Batches` together. Batches and states are dicts by name."""

  def __init__(self, parts: dict[str, Batches]):
    self._parts = dict(parts)

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, Any]:
    return {name: next(part) for name, part in self._parts.items()}

  def get_state(self) -> dict:
    """The positions of all parts, as JSON values."""
    return {name: part.get_state() for name, part in self._parts.items()}

  def set_state(self, state: dict):
    """Continues from the positions at which `get_state` was called.

    Raises:
      UserError: the state has other parts, or was saved with other data, or with another batch size or seed.
    """
    if state.keys() != self._parts.keys():
      raise UserError(
        f"cannot resume the data: saved for {sorted(state)}, now {sorted(self._parts)}"
      )
    for name, part in self._parts.items():
      part.set_state(state[name])


def packed_batches(
  rows: PackedRows | CachedRows, *, batch_size: int, seed: int, places: Places | None = None
) -> Batches:
  """Batches of packed rows, as PackedBatch, for language modelling.

  Args:
    rows: all of them; a batch reads its own.
    batch_size, seed, places: see `Batches`.
  Raises:
    UserError: there are no rows.
    ValueError: batch_size is not positive.
  """
  return Batches(
    rows.checksum,
    lambda row_b, place_b: rows.gather(row_b),
    num_rows=rows.num_rows,
    batch_size=batch_size,
    seed=seed,
    places=places,
  )


def ranking_batches(
  rankings: Sequence[RankingTokens],
  *,
  max_responses: int,
  length: int,
  batch_size: int,
  seed: int,
  vocab_size: int,
  num_rows: int | None = None,
  num_groups: int = 1,
  share_prompts: bool = False,
  places: tuple[Places, Places] | None = None,
) -> Batches:
  """Batches of ranked answers as RankedBatch. batch_size counts prompts, as in C.2.

  Args:
    rankings: prompts with at most max_responses ranked answers each.
    max_responses: C, the number of answers to which each prompt is padded.
    length: tokens per row.
    batch_size, seed: see `Batches`.
    vocab_size: also the id of padding.
    num_rows: number of rows into which the answers of a batch are packed, see `rows_needed`; None gives each answer a
      row of its own.
    num_groups: groups of consecutive prompts, equally many in each, that share no rows: the first group has the first
      rows, and so on, equally many each. Divides batch_size and num_rows.
    share_prompts: whether answers to a prompt stand after one copy of it, as trees; needs num_rows.
    places: the rows and the prompts of the global batch that belong to this process; None for all of them.
  Raises:
    UserError: a prompt has more than max_responses answers, or there are no rankings.
    ValueError: batch_size is not positive. The iterator raises it too, if the answers of a batch do not fit in
      num_rows.
  """
  rankings = list(rankings)
  for item in rankings:
    if len(item.responses) > max_responses:
      raise UserError(
        f"a prompt has {len(item.responses)} ranked responses;"
        f" raise rm.max_responses={max_responses}"
      )

  def gather(row_b, place_b):
    batch = ranked_batch(
      [rankings[row] for row in row_b],
      max_responses=max_responses,
      length=length,
      vocab_size=vocab_size,
      num_rows=num_rows,
      num_groups=num_groups,
      share_prompts=share_prompts,
    )
    if places is None:
      return batch
    # Packing may put an answer into any row, so every process builds the whole batch and keeps its own part.
    row_places, prompt_places = places
    return RankedBatch(
      token_SL=batch.token_SL[row_places],
      segment_SL=jax.tree.map(lambda x_SL: x_SL[row_places], batch.segment_SL),
      last_BC=batch.last_BC[prompt_places],
      rank_BC=batch.rank_BC[prompt_places],
      is_answer_BC=batch.is_answer_BC[prompt_places],
    )

  return Batches(
    _checksum(rankings),
    gather,
    num_rows=len(rankings),
    batch_size=batch_size,
    seed=seed,
    places=None,
  )


def rows_needed(
  rankings: Sequence[RankingTokens],
  *,
  length: int,
  batch_size: int,
  seed: int,
  num_epochs: int,
  num_groups: int = 1,
  share_prompts: bool = False,
) -> int:
  """The number of rows of `length` tokens that suffices for the packed answers of every batch.

  A compiled step needs a fixed number of rows. The order of the data is known in advance, so this function packs all
  batches of `ranking_batches` and returns the largest number of rows that one of them needs.

  Raises:
    UserError: an answer does not fit in a row, or there are no rankings.
    ValueError: batch_size is not positive.
  """
  lengths = [_sizes(item, length, share_prompts) for item in rankings]

  def gather(row_b, place_b):
    groups = np.split(row_b, num_groups)
    return num_groups * max(
      len(packing.pack([n for row in group for n in lengths[row]], length)) for group in groups
    )

  needs = Batches(0, gather, num_rows=len(lengths), batch_size=batch_size, seed=seed, places=None)
  return max(next(needs) for _ in range(num_epochs * needs.steps_per_epoch))


def _sizes(ranking: RankingTokens, length: int, share_prompts: bool) -> list[int]:
  """Columns of each part of a ranking that lies in one row: a tree, or an answer with its prompt.

  Raises:
    UserError: see `trees.grow`.
  """
  if share_prompts:
    return [tree.size for tree in trees.grow(ranking, length)]
  return [len(ranking.prompt) + len(response) for response in ranking.responses]


def ranked_batch(
  rankings: Sequence[RankingTokens],
  *,
  max_responses: int,
  length: int,
  vocab_size: int,
  num_rows: int | None = None,
  num_groups: int = 1,
  share_prompts: bool = False,
) -> RankedBatch:
  """Makes one RankedBatch of the rankings, in order. Arguments as in `ranking_batches`.

  Raises:
    UserError: an answer does not fit in a row.
    ValueError: the answers do not fit in num_rows rows.
  """
  shape = (len(rankings), max_responses)
  rank_BC = np.zeros(shape, np.int32)
  for row, item in enumerate(rankings):
    rank_BC[row, : len(item.ranks)] = item.ranks
  is_answer_BC = rank_BC > 0
  sequences = [item.prompt + response for item in rankings for response in item.responses]
  if num_rows is None:
    # One row for each of the B * C places. Rows of missing answers stay empty, so the shape is always the same.
    rows = [[] for _ in range(rank_BC.size)]
    for index, row in enumerate(np.flatnonzero(is_answer_BC)):
      rows[row] = [index]
  else:
    rows, first = [], 0
    for group in np.split(np.arange(len(rankings)), num_groups):
      lengths = [n for i in group for n in _sizes(rankings[i], length, share_prompts)]
      own = [[first + index for index in row] for row in packing.pack(lengths, length)]
      room = num_rows // num_groups
      if len(own) > room:
        raise ValueError(
          f"a batch of rankings needs {len(own) * num_groups} rows, and num_rows={num_rows}"
        )
      rows += own + [[]] * (room - len(own))
      first += len(lengths)
  kwargs = dict(length=length, vocab_size=vocab_size)
  if share_prompts:
    grown = [tree for item in rankings for tree in trees.grow(item, length)]
    scored = trees.lay_out(grown, rows, **kwargs)
  else:
    scored = packing.scored_rows(sequences, rows, **kwargs)
  last_BC = np.zeros(shape, np.int32)
  last_BC[is_answer_BC] = scored.last_N
  return tree_of(
    RankedBatch,
    token_SL=scored.token_SL,
    segment_SL=scored.segment_SL,
    last_BC=last_BC,
    rank_BC=rank_BC,
    is_answer_BC=is_answer_BC,
  )


def prompt_batches(
  prompts: Sequence[Sequence[int]],
  *,
  length: int,
  batch_size: int,
  seed: int,
  vocab_size: int,
  places: Places | None = None,
  repeats: int = 1,
) -> Batches:
  """Batches of prompts, left-padded to `length`, as PromptBatch.

  Args:
    prompts: token ids.
    length: P, tokens to which prompts are padded.
    batch_size, seed, places: see `Batches`.
    vocab_size: also the id of padding.
    repeats: rows in which each prompt of a batch stands, one after the other; divides batch_size.
  Raises:
    UserError: a prompt is empty or longer than `length`, or there are none.
    ValueError: batch_size is not positive.
  """
  prompts = [list(prompt) for prompt in prompts]
  for prompt in prompts:
    if not 0 < len(prompt) <= length:
      raise UserError(
        f"a prompt of {len(prompt)} tokens does not fit length={length}; see tokenize_prompts"
      )
  index_B = np.arange(batch_size) if places is None else np.asarray(places)
  return Batches(
    _checksum(prompts),
    lambda row_b, place_b: prompt_batch(
      [prompts[row] for row in row_b], index_B, length, vocab_size
    ),
    num_rows=len(prompts),
    batch_size=batch_size // repeats,
    seed=seed,
    # A row's prompt: a batch has a place for each, and rows that repeat it share this place.
    places=index_B // repeats,
  )


def prompt_batch(
  prompts: Sequence[Sequence[int]], index_B: np.ndarray, length: int, vocab_size: int
) -> PromptBatch:
  """Makes one PromptBatch of the prompts, in order; `index_B` holds their places in the global batch."""
  token_BP = np.full((len(prompts), length), vocab_size, np.int32)
  is_prompt_BP = np.zeros(token_BP.shape, bool)
  for row, prompt in enumerate(prompts):
    token_BP[row, length - len(prompt) :] = prompt
    is_prompt_BP[row, length - len(prompt) :] = True
  return tree_of(
    PromptBatch,
    token_BP=token_BP,
    is_prompt_BP=is_prompt_BP,
    index_B=np.asarray(index_B, np.int32),
  )


def _checksum(rows: list) -> int:
  """CRC-32 of the data. A saved position in the shuffled order is only valid for the same data."""
  checksum = 0
  for row in rows:
    plain = dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row
    checksum = zlib.crc32(json.dumps(plain).encode(), checksum)
  return checksum
