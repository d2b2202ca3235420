"""Compiled scoring of planned texts: log-probabilities of targets, or a reward model's scores.

Called by language_model.py. The logits of a batch never exist whole: they are computed for some targets at a time, and
for the columns of targets only.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax.core.structs import Array, Params, pytree, tree_of
from instructjax.evaluation import planning
from instructjax.evaluation.planning import Batch, Group, Text
from instructjax.models import branches, transformer
from instructjax.ops import lm
from instructjax.parallel import distributed, sharding

# Columns of a batch on each of the mesh's row shards. A CPU is at its best with few, whose activations stay in its
# caches, and results come sooner; other devices need many to be busy.
_TOKENS = {"cpu": 2048}
_TOKENS_ELSEWHERE = 16384


@pytree
class TextRows:
  """A batch of rows of trees; see `branches.run`.

  Attributes:
    token_BL, position_BL, last_BL: as there.
    column_BM: columns that something is read off, those of a row's targets in their order.
    target_BM: the tokens that they are asked for.
  """

  token_BL: Array
  position_BL: Array
  last_BL: Array
  column_BM: Array
  target_BM: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """What computes: a model with weights on a mesh."""

  model: transformer.Model
  params: Params
  mesh: Mesh

  @property
  def tokens(self) -> int:
    """Columns of a batch."""
    of_a_shard = _TOKENS.get(sharding.platform_of(self.mesh), _TOKENS_ELSEWHERE)
    return of_a_shard * self.shards

  @property
  def shards(self) -> int:
    return sharding.num_row_shards(self.mesh)


Read = tuple[
  np.ndarray, np.ndarray
]  # what is read off at each target of a text, and whether it is the likeliest


def read(network: Network, texts: Sequence[Text]) -> Iterator[tuple[int, Read]]:
  """Computes what is asked for each text: (its number, what was read), in the order of the computation.

  With an 'lm' head, the log-probability of each target, in nats, and whether it is the likeliest token. With a scalar
  head, the score in each of its columns; the targets play no part then.

  Raises:
    Preempted: the program was told to stop.
  """
  for group in planning.groups(texts):
    past, past_length = prefix(network, group)
    for batch in planning.batches(group.trees, tokens=network.tokens, shards=network.shards):
      distributed.require_going_on()
      rows, most = _rows(batch, texts, network.model.vocab_size)
      with jax.set_mesh(network.mesh):
        placed = sharding.place_rows(network.mesh, rows)
        found = _read(network.model, network.params, placed, most, past, past_length)
        value_BM, likeliest_BM = sharding.to_host(found)
      yield from _of_texts(batch, value_BM, likeliest_BM)


def prefix(network: Network, group: Group):
  """Keys and values of what a group's texts share, and its length; (None, 0) if they share nothing."""
  if not group.past:
    return None, np.int32(0)
  length = planning.bucket(len(group.past))
  column_L = np.arange(length, dtype=np.int32)
  is_token_L = column_L < len(group.past)
  token_L = np.zeros(length, np.int32)
  token_L[: len(group.past)] = group.past
  last_L = np.where(is_token_L, len(group.past) - 1, -1).astype(np.int32)
  with jax.set_mesh(network.mesh):
    rows = sharding.place_rows(network.mesh, (token_L[None], column_L[None], last_L[None]))
    return _keep(network.model, network.params, *rows), np.int32(len(group.past))


@functools.partial(jax.jit, static_argnames="model")
def _keep(model, params, token_BL, position_BL, last_BL):
  return branches.run(model, params, token_BL, position_BL, last_BL)[1]


def _rows(batch: Batch, texts: Sequence[Text], pad_id: int) -> tuple[TextRows, np.int32]:
  """The arrays of a batch, and the most targets of a row."""
  shape = (len(batch.rows), batch.length)
  pads = np.full(shape, pad_id, np.int32)
  token_BL, target_BM = pads.copy(), np.zeros(shape, np.int32)
  position_BL, column_BM = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  last_BL = np.full(shape, -1, np.int32)
  most = 0
  for row, trees in enumerate(batch.rows):
    start = place = 0
    for tree in trees:
      stop = start + len(tree.token_L)
      token_BL[row, start:stop] = tree.token_L
      position_BL[row, start:stop] = tree.depth_L
      last_BL[row, start:stop] = np.asarray(tree.last_L) + start
      for number, columns in zip(tree.texts, tree.reads):
        end = place + len(columns)
        column_BM[row, place:end] = np.asarray(columns) + start
        target_BM[row, place:end] = texts[number].targets
        place = end
      # A tree may have more targets than columns, so the next begins where both have ended.
      start = stop
    most = max(most, place)
  rows = tree_of(
    TextRows,
    token_BL=token_BL,
    position_BL=position_BL,
    last_BL=last_BL,
    column_BM=column_BM,
    target_BM=target_BM,
  )
  return rows, np.int32(most)


def _of_texts(batch: Batch, value_BM, likeliest_BM) -> Iterator[tuple[int, Read]]:
  for row, trees in enumerate(batch.rows):
    place = 0
    for tree in trees:
      for number, columns in zip(tree.texts, tree.reads):
        span = slice(place, place + len(columns))
        yield number, (value_BM[row, span], likeliest_BM[row, span])
        place += len(columns)


@functools.partial(jax.jit, static_argnames="model")
def _read(model: transformer.Model, params: Params, rows: TextRows, most: Array, past, past_length):
  """What is read off at each target: (value_BM, is_likeliest_BM); no row has more targets than `most`."""
  columns = (rows.token_BL, rows.position_BL, rows.last_BL)
  h_BLD, _ = branches.run(model, params, *columns, past, past_length)
  h_BLD = transformer.final_norm(model, params, h_BLD)
  if model.head == "scalar":
    score_BL = transformer.apply_head(model, params, h_BLD)
    value_BM = jnp.take_along_axis(score_BL, rows.column_BM, axis=1)
    return value_BM, jnp.ones_like(value_BM, bool)
  num_rows, length = rows.column_BM.shape
  some = _block(num_rows, length, model.vocab_size)

  def one(number, found):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, number * some, some, axis=1)
    column_BT, target_BT = cut(rows.column_BM), cut(rows.target_BM)
    h_BTD = jnp.take_along_axis(h_BLD, column_BT[:, :, None], axis=1)
    logits_BTV = transformer.apply_head(model, params, h_BTD)
    parts = lm.token_logprob(logits_BTV, target_BT), jnp.argmax(logits_BTV, axis=-1) == target_BT
    put = lambda all, part: jax.lax.dynamic_update_slice_in_dim(all, part, number * some, axis=1)
    return jax.tree.map(put, found, parts)

  shape = rows.column_BM.shape
  empty = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
  return jax.lax.fori_loop(0, -(-most // some), one, empty)


def _block(num_rows: int, length: int, vocab_size: int) -> int:
  """Targets of each row whose logits exist at once: the largest divisor of the length that keeps them in bounds."""
  most = max(1, lm.LOGITS_BYTES // (4 * vocab_size * num_rows))
  return max(size for size in range(1, min(most, length) + 1) if length % size == 0)
