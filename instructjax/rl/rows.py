"""Hides from PPO whether a row holds one episode, padded (`padded`), or several short ones (`shared`).

PPO needs two operations. Both kinds of rows give the same results, up to rounding:

  score     forward passes over a rollout
  gradient  the gradient of a loss over a minibatch; the loss is a mean over tokens

Called by step.py, which chooses the kind once, and by experience.py. shared_rows.py decides where an episode lies in
shared rows. Imports no model and no config.

Both operations call a function of the caller with rows of tokens, which have the same form for either kind. The first P
of a row's L columns hold no response. An array whose name ends in `_BL` has an entry for each column. One that ends in
`_BR` has an entry for each of the last R = L - P columns. In padded rows P is the width of the prompts. In shared rows
P is 1: an episode may begin in any column, and begins with its prompt, so only the first column is sure to hold none.
Shared rows may also hold trees (shared_prompts.py), where answers to a prompt have one copy of it; what is called with
rows gets a `Trees` in place of segments then.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from instructjax.core.structs import Array, Params, Rollout, Trees, token_mask
from instructjax.rl import shared_prompts, shared_rows
from instructjax.train import accumulation


@dataclasses.dataclass(frozen=True)
class Gradient:
  """The result of `RowLayout.gradient`.

  Attributes:
    loss, metrics: means over the tokens that count; a metric named `..._max` is a maximum.
    grads: gradient of the loss, in a tree like the parameters.
    waste: share of the columns of all rows that were computed and hold no token.
  """

  loss: Array
  metrics: dict[str, Array]
  grads: Params
  waste: Array


@dataclasses.dataclass(frozen=True)
class RowLayout:
  """The two operations.

  Attributes:
    score: (read, rollout) -> (arrays, waste as of Gradient). `read` takes (token_BL, segment_BL, prompt_length=P) and
      returns {name: array}, with names that end in _BL or _BR. `score` returns these arrays with a row for each episode
      of the rollout, and with the rollout's columns.
    gradient: (loss_fn, params, batch, over) -> Gradient. `batch` is an `experience.Experience`, and `over` the name of
      its field that marks the tokens that count. `loss_fn` takes (params, batch) and returns (loss, metrics), means
      over these tokens.
  """

  score: Callable[[Callable, Rollout], tuple[dict[str, Array], Array]]
  gradient: Callable[[Callable, Params, Any, str], Gradient]


def padded(score_chunks: int = 1, chunks: int = 1) -> RowLayout:
  """One episode a row, as in the rollout.

  Args:
    score_chunks: parts of a rollout that are scored one after the other; divides its rows.
    chunks: parts of a minibatch whose gradients are taken one after the other; divides its rows.
  """
  return RowLayout(
    score=functools.partial(_score_padded, score_chunks),
    gradient=functools.partial(_gradient_padded, chunks),
  )


def shared(num_rows: int, pad_id: int, group: int = 1) -> RowLayout:
  """Several episodes a row.

  Args:
    num_rows: rows of L columns that are computed at a time; divides the rows of a minibatch.
    pad_id: token id at pads.
    group: as many episodes after each other have the same prompt, and share it in a row.
  """
  place = functools.partial(_place, num_rows, group)
  return RowLayout(
    score=functools.partial(_score_shared, num_rows, pad_id, place),
    gradient=functools.partial(_gradient_shared, num_rows, pad_id, place),
  )


def _place(num_rows: int, group: int, is_token_BL: Array, prompt_length: int):
  """Where episodes lie in shared rows: (placement, segments of the rows, widths of the rows)."""
  if group == 1:
    placement = shared_rows.first_fit(is_token_BL, rows=num_rows)
    widths = shared_rows.row_widths(is_token_BL.shape[1], num_rows)
    return placement, shared_rows.segments(placement), widths
  placement, trees, width = shared_prompts.place(
    is_token_BL, prompt_length=prompt_length, group=group, rows=num_rows
  )
  return placement, trees, [width]


def _score_padded(num_chunks: int, read, rollout: Rollout):
  """`RowLayout.score` of padded rows."""
  read_rows = lambda tokens: read(*tokens, prompt_length=rollout.prompt_length)
  tokens = (rollout.token_BL, rollout.is_token_BL)
  arrays = accumulation.map_rows(read_rows, tokens, num_chunks)
  return arrays, _waste(rollout.is_token_BL, rollout.token_BL.size)


def _gradient_padded(num_chunks: int, loss_fn, params: Params, batch: Any, over: str) -> Gradient:
  """`RowLayout.gradient` of padded rows."""
  count = lambda rows: {"loss": jnp.sum(getattr(rows, over))}
  (loss, metrics), grads = accumulation.mean_gradient(loss_fn, params, batch, num_chunks, count)
  return Gradient(loss, metrics, grads, _waste(batch.segment_BL, batch.token_BL.size))


def _waste(segment_BL: Array | Trees, num_cells: Array | int) -> Array:
  """The share of the cells that were computed and hold no token; one that several episodes share counts once."""
  return 1 - jnp.sum(token_mask(segment_BL)) / num_cells


def _score_shared(num_rows: int, pad_id: int, place: Callable, read, rollout: Rollout):
  """`RowLayout.score` of shared rows: moves tokens there, reads them chunk by chunk, and moves the results back."""
  placement, segments, widths = place(rollout.is_token_BL, rollout.prompt_length)
  token_BL = shared_rows.to_shared(placement, rollout.token_BL, pad_id)

  # Results are moved back by the cell of their token, so they need an entry for every column, the first included.
  def every_column(tokens):
    arrays = read(*tokens, prompt_length=1)
    return {name: _widen(x, 1) if name.endswith("_BR") else x for name, x in arrays.items()}

  tokens = (token_BL, segments)
  arrays = shared_rows.map_rows(every_column, placement, tokens, rows=num_rows, widths=widths)
  arrays = {name: shared_rows.to_padded(placement, x) for name, x in arrays.items()}
  arrays = {
    name: x[:, rollout.prompt_length :] if name.endswith("_BR") else x for name, x in arrays.items()
  }
  return arrays, _waste(segments, shared_rows.num_cells(placement, rows=num_rows))


def _gradient_shared(
  num_rows: int, pad_id: int, place: Callable, loss_fn, params: Params, batch: Any, over: str
) -> Gradient:
  """`RowLayout.gradient` of shared rows. Each minibatch has other episodes, so each gets a placement of its own."""
  placement, segments, widths = place(batch.segment_BL > 0, batch.prompt_length)

  # In shared rows P is 1, so R = L - 1. The arrays have all L columns up to here, because cells are rows times columns.
  def chunk_loss(params, chunk):
    return loss_fn(params, _map_responses(lambda x_BL: x_BL[:, 1:], chunk))

  (loss, metrics), grads = shared_rows.mean_gradient(
    chunk_loss,
    params,
    placement,
    _in_shared_rows(batch, placement, segments, pad_id),
    over,
    rows=num_rows,
    widths=widths,
  )
  waste = _waste(segments, shared_rows.num_cells(placement, rows=num_rows))
  return Gradient(loss, metrics, grads, waste)


def _in_shared_rows(
  batch: Any, placement: shared_rows.Placement, segments: Array | Trees, pad_id: int
):
  """A minibatch with its episodes in shared rows. Arrays named _BR are widened to all L columns."""
  move = lambda x_BR: shared_rows.to_shared(placement, _widen(x_BR, batch.prompt_length), 0)
  return dataclasses.replace(
    _map_responses(move, batch),
    token_BL=shared_rows.to_shared(placement, batch.token_BL, pad_id),
    segment_BL=segments,
  )


def _map_responses(function: Callable, batch: Any):
  """Applies `function` to each array of a minibatch whose name ends in _BR."""
  arrays = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
  return dataclasses.replace(
    batch,
    **{name: function(x) for name, x in arrays.items() if name.endswith("_BR") and x is not None},
  )


def _widen(x_BR: Array, prompt_length: int) -> Array:
  """[B, R] -> [B, L], with zeros in the first P columns."""
  return jnp.pad(x_BR, ((0, 0), (prompt_length, 0)))
