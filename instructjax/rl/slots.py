"""Continuous batching: fewer slots than prompts. When a row ends, its slot takes the next prompt, on the device.

Called by sampling.py, which gives the weights, the noise and the function that draws a token. Imports no config and no
stage.

A data shard has its own slots and its own queue of rows, so no row ever moves to another device. The state's first
dimension X is the shards, and functions that see one shard run under vmap. S counts the slots of a shard, Q its rows.

  cache columns 0 .. P - 1      a slot's prompt, left-padded, as `prefill` leaves it
  cache columns P .. P + R - 1  its response, as a ring: step g writes column P + g % R of every slot, whenever the
                                slot's row began. All slots write the same column, so one slice updates the whole cache
                                in place.
  staged rows                   the next S rows of a queue. They are prefilled together and wait for a slot.

When no row waits any more and half of the slots are free, the busy ones go on in a loop of half the width, and so on.
It is not known beforehand which rows are the longest, and the last few should not keep all slots computing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from instructjax.core.errors import UserError
from instructjax.core.structs import Array, Params, PromptBatch, Rollout, pytree
from instructjax.models import decoding, positions, transformer
from instructjax.ops import masked
from instructjax.parallel import constraints, sharding


@pytree
class SlotRows:
  """The rows in a shard's slots, or those that are staged for them.

  Attributes:
    row_S: int32 number of the row in the shard's queue.
    is_prompt_SP: True on the prompt's real tokens.
    token_S: int32 newest token of the response, which is not in the cache yet.
    length_S: int32 length of the response so far, including that token.
    is_live_S: False if the row has ended, if a slot has taken it, or if there is no row.
  """

  row_S: Array
  is_prompt_SP: Array
  token_S: Array
  length_S: Array
  is_live_S: Array


@pytree
class Queue:
  """Rows that no slot has taken yet.

  Attributes:
    next: int32 number of the shard's first row that has not been staged.
    staged: rows that are prefilled, with their first token drawn.
    cache: keys and values of the staged rows' prompts, P columns.
  """

  next: Array
  staged: SlotRows
  cache: Any


@pytree
class Output:
  """The responses of a shard's rows so far; pads and zeros past their lengths."""

  token_QR: Array
  logprob_QR: Array
  length_Q: Array


@pytree
class Run:
  """What every decode step changes.

  Attributes:
    step: number of decode steps so far.
    slot_steps: sum over the steps of the number of slots, free ones included.
    rows: the rows in the slots.
    cache: keys and values of the slots.
    output: the responses.
  """

  step: Array
  slot_steps: Array
  rows: SlotRows
  cache: Any
  output: Output


@dataclasses.dataclass(frozen=True)
class Task:
  """What no step changes; see `generate` for the fields."""

  model: transformer.Model
  weights: Params
  token_XQP: Array
  is_prompt_XQP: Array
  uniform_XQR: Array
  draw: Callable[[Array, Array], tuple[Array, Array]]
  stop_ids: Sequence[int | Array]


def generate(
  model: transformer.Model,
  weights: Params,
  prompts: PromptBatch,
  uniform_BR: Array,
  draw: Callable[[Array, Array], tuple[Array, Array]],
  *,
  slots: int,
  stop_ids: Sequence[int | Array],
) -> Rollout:
  """Samples one response for each prompt, decoding at most `slots` rows at a time. Traceable: call it inside jit.

  Args:
    model: with an 'lm' head.
    weights: from `decoding.decode_weights`.
    prompts: left-padded; every row has at least one token.
    uniform_BR: noise for each token of each row; R is the length limit.
    draw: (logits_BV, uniform_B) -> (token_B, logprob_B).
    slots: rows decoded at once, in all data shards together.
    stop_ids: any of these tokens ends a row, and is kept as its last token.
  Returns:
    A Rollout, with rows in the order of the prompts.
  Raises:
    UserError: slots or rows are not divisible by the mesh's data shards.
  """
  num_rows = len(prompts.token_BP)
  shards = sharding.num_row_shards(jax.sharding.get_abstract_mesh())
  if slots % shards or num_rows % shards:
    raise UserError(
      f"slots={slots} and rows={num_rows} must be divisible by mesh slice * data * fsdp = {shards}"
    )
  split = lambda x: constraints.shard_rows(x.reshape(shards, -1, *x.shape[1:]))
  arrays = (split(x) for x in (prompts.token_BP, prompts.is_prompt_BP, uniform_BR))
  task = Task(model, weights, *arrays, draw=draw, stop_ids=stop_ids)
  widths = _widths(slots // shards)
  floors = [*widths[1:], 0]
  # 1. As long as rows wait, or more rows are busy than the next narrower loop has slots.
  with jax.named_scope("slots"):  # the names of the loops tell launch's planner which is which
    run, _ = jax.lax.while_loop(
      lambda carry: jnp.any(_is_waiting(task, carry[1])) | _is_busy(carry[0], floors[0]),
      lambda carry: _refill_and_decode(task, floors[0], carry),
      _start(task, widths[0]),
    )
  # 2. No row waits. The busy rows go on in ever narrower loops; the last one ends when every row has ended.
  for width, floor in zip(widths[1:], floors[1:]):
    with jax.named_scope(f"decode_{width}"):
      run = jax.lax.while_loop(
        lambda run, floor=floor: _is_busy(run, floor),
        lambda run: _decode(task, run),
        _narrow(run, width),
      )
  output = jax.tree.map(_flat, run.output)
  is_response_BR = jnp.arange(uniform_BR.shape[1])[None] < output.length_Q[:, None]
  return Rollout(
    token_BL=jnp.concatenate([prompts.token_BP, output.token_QR], axis=1),
    is_token_BL=jnp.concatenate([prompts.is_prompt_BP, is_response_BR], axis=1),
    is_response_BR=is_response_BR,
    behaviour_logprob_BR=output.logprob_QR,
    num_steps=1 + run.step,  # the draw after a prefill counts as one, as it does without slots
    slot_steps=num_rows + run.slot_steps,
  )


def _widths(width: int) -> list[int]:
  """The numbers of slots of a shard, from the start of the rollout to its end."""
  # Halves, because each number is one more decode loop to compile. Down to 2 or 3 and not to 1: one row takes as long
  # as two (see `decoding.init_cache`).
  widths = [width]
  while widths[-1] >= 4:
    widths.append(widths[-1] // 2)
  return widths


def _flat(x_XS: Array):
  """Joins the shards' slots (or rows) to one batch dimension, for the model."""
  return x_XS.reshape(-1, *x_XS.shape[2:])


def _start(task: Task, width: int) -> tuple[Run, Queue]:
  """The state before the first step: empty slots, and queues with nothing staged."""
  shards, _, prompt_length = task.token_XQP.shape
  none_XS = jnp.zeros((shards, width), jnp.int32)
  no_prompt_XSP = jnp.zeros((shards, width, prompt_length), bool)
  rows = constraints.shard_rows(SlotRows(none_XS, no_prompt_XSP, none_XS, none_XS, none_XS > 0))
  output = Output(
    jnp.full(task.uniform_XQR.shape, task.model.vocab_size, jnp.int32),  # pads
    jnp.zeros(task.uniform_XQR.shape, jnp.float32),
    jnp.zeros(task.uniform_XQR.shape[:2], jnp.int32),
  )
  length = prompt_length + task.uniform_XQR.shape[2]
  cache = decoding.init_cache(task.model, shards * width, length, _ring_length(task))
  staged_cache = _prompt_cache(task, shards * width)
  zero = jnp.int32(0)
  run = Run(zero, zero, rows, cache, constraints.shard_rows(output))
  return run, Queue(none_XS[:, 0], rows, staged_cache)


def _ring_length(task: Task) -> int | None:
  """See `decoding.ring_length`; of the slots' cache."""
  return decoding.ring_length(task.model, task.token_XQP.shape[2] + task.uniform_XQR.shape[2])


def _prompt_cache(task: Task, num_rows: int):
  """An empty cache for prompts: as that of the slots, but all layers have the prompts' columns."""
  prompt_length = task.token_XQP.shape[2]
  band_length = prompt_length if _ring_length(task) else None
  return decoding.init_cache(task.model, num_rows, prompt_length, band_length)


def _is_busy(run: Run, floor: int) -> Array:
  """Whether some shard has more than `floor` live rows in its slots."""
  return jnp.any(jnp.sum(run.rows.is_live_S, axis=1) > floor)


def _is_unstaged(task: Task, queue: Queue) -> Array:
  """For each shard, whether it has rows that have not been staged."""
  return queue.next < task.token_XQP.shape[1]


def _is_waiting(task: Task, queue: Queue) -> Array:
  """For each shard, whether it has rows that no slot has taken, staged or not."""
  return _is_unstaged(task, queue) | jnp.any(queue.staged.is_live_S, axis=1)


def _can_take(run: Run, waiting_X: Array) -> Array:
  """Whether some shard has a free slot and a row that waits for one."""
  return jnp.any(~jnp.all(run.rows.is_live_S, axis=1) & waiting_X)


def _refill_and_decode(task: Task, floor: int, carry: tuple[Run, Queue]) -> tuple[Run, Queue]:
  """Fills all free slots as long as rows wait, then decodes until a slot becomes free for a row that waits."""
  # Two loops instead of one that does both: on a TPU the cache has another layout inside the loop that decodes, and is
  # copied on the way in and out. So the loop is entered only after every free slot is filled.
  with jax.named_scope("refill"):
    run, queue = jax.lax.while_loop(
      lambda carry: _can_take(carry[0], _is_waiting(task, carry[1])),
      lambda carry: _refill(task, *carry),
      carry,
    )
  waiting_X = _is_waiting(task, queue)

  def goes_on(run):
    return ~_can_take(run, waiting_X) & (jnp.any(waiting_X) | _is_busy(run, floor))

  with jax.named_scope("decode"):
    return jax.lax.while_loop(goes_on, lambda run: _decode(task, run), run), queue


def _refill(task: Task, run: Run, queue: Queue) -> tuple[Run, Queue]:
  """Gives one free slot of each shard a row, after staging more rows if a shard has none left."""
  is_free_X = ~jnp.all(run.rows.is_live_S, axis=1)

  def must_stage(inner):
    _, queue = inner
    is_used_up_X = ~jnp.any(queue.staged.is_live_S, axis=1)
    return jnp.any(is_free_X & is_used_up_X & _is_unstaged(task, queue))

  stage = lambda inner: _stage(task, *inner)
  with jax.named_scope("stage"):
    output, queue = jax.lax.while_loop(must_stage, stage, (run.output, queue))
  return _take(task, dataclasses.replace(run, output=output), queue)


def _stage(task: Task, output: Output, queue: Queue) -> tuple[Output, Queue]:
  """Prefills the next S rows of every shard and draws their first tokens."""

  # All shards run the same program, so all of them stage. A shard that still has staged rows begins with the oldest of
  # these and prefills them again; the noise is fixed, so their first tokens come out the same.
  def next_rows(queue: Queue):
    staged = queue.staged
    oldest = staged.row_S[jnp.argmax(staged.is_live_S)]
    first = jnp.where(jnp.any(staged.is_live_S), oldest, queue.next)
    return first + jnp.arange(len(staged.row_S))

  row_XS = jax.vmap(next_rows)(dataclasses.replace(queue, cache=None))
  # Past the end of the queue the last row is read again ('clip'); `is_live_S` below marks these rows as none.
  take = jax.vmap(lambda x_Q, row_S: x_Q.at[row_S].get(mode="clip"))
  is_prompt_XSP = take(task.is_prompt_XQP, row_XS)
  token_BP, is_prompt_BP = constraints.shard_rows(
    (_flat(take(task.token_XQP, row_XS)), _flat(is_prompt_XSP))
  )
  cache = _prompt_cache(task, len(token_BP))
  logits_BV, cache = decoding.prefill(task.model, task.weights, token_BP, is_prompt_BP, cache)
  drawn = task.draw(logits_BV, _flat(take(task.uniform_XQR[:, :, 0], row_XS)))
  rows = SlotRows(
    row_S=row_XS,
    is_prompt_SP=is_prompt_XSP,
    token_S=queue.staged.token_S,
    length_S=jnp.zeros_like(row_XS),
    is_live_S=row_XS < task.token_XQP.shape[1],
  )
  output, staged = _append(task, output, rows, *drawn)
  return output, Queue(row_XS[:, -1] + 1, staged, cache)


def _append(
  task: Task, output: Output, rows: SlotRows, token_B: Array, logprob_B: Array
) -> tuple[Output, SlotRows]:
  """Adds the drawn tokens to the live rows, and ends rows that drew a stop token or reached the length limit."""
  _, num_rows, max_new_tokens = task.uniform_XQR.shape
  token_XS, logprob_XS = (x.reshape(rows.row_S.shape) for x in (token_B, logprob_B))
  length_XS = rows.length_S + rows.is_live_S

  def write(output: Output, row_S, length_S, token_S, logprob_S):
    at = row_S, length_S - 1
    return Output(
      output.token_QR.at[at].set(token_S, mode="drop"),
      output.logprob_QR.at[at].set(logprob_S, mode="drop"),
      output.length_Q.at[row_S].set(length_S, mode="drop"),
    )

  # A row that is not live writes past the last row, which 'drop' ignores.
  row_XS = jnp.where(rows.is_live_S, rows.row_S, num_rows)
  output = jax.vmap(write)(output, row_XS, length_XS, token_XS, logprob_XS)
  is_live_XS = (
    rows.is_live_S & ~masked.is_any(token_XS, task.stop_ids) & (length_XS < max_new_tokens)
  )
  rows = dataclasses.replace(rows, token_S=token_XS, length_S=length_XS, is_live_S=is_live_XS)
  return constraints.shard_rows((output, rows))


def _take(task: Task, run: Run, queue: Queue) -> tuple[Run, Queue]:
  """Moves one staged row of each shard to a free slot, if the shard has both."""
  _, width, prompt_length = run.rows.is_prompt_SP.shape

  def move(rows: SlotRows, staged: SlotRows):
    slot, which = jnp.argmin(rows.is_live_S), jnp.argmax(staged.is_live_S)
    moves = staged.is_live_S[which] & ~rows.is_live_S[slot]
    # Without a move, the slot is past the last one, and 'drop' ignores what is written, here and to the cache.
    slot = jnp.where(moves, slot, width)
    rows = jax.tree.map(lambda old, new: old.at[slot].set(new[which], mode="drop"), rows, staged)
    is_left_S = staged.is_live_S.at[which].min(~moves)
    return rows, dataclasses.replace(staged, is_live_S=is_left_S), slot, which

  rows, staged, slot_X, which_X = jax.vmap(move)(run.rows, queue.staged)
  ring = _ring_length(task)

  def move_cache(old, new, slot, which):
    prompt = new[..., which, :, :, :]
    if old.shape[-2] == ring:
      # As if the prompt's tokens had been fed in the steps before.
      prompt = decoding.in_ring(prompt, old.shape[-2], run.step)
      return old.at[..., slot, :, :, :].set(prompt, mode="drop")
    # Only prompt columns are written. What the slot's last row left in the ring stays, and `_decode` masks it by age.
    return old.at[..., slot, :, :prompt_length, :].set(prompt, mode="drop")

  cache = _map_cache(move_cache, (run.cache, queue.cache), slot_X, which_X)
  run = dataclasses.replace(run, rows=rows, cache=cache)
  return run, dataclasses.replace(queue, staged=staged)


def _map_cache(function, caches: tuple, *args):
  """Applies a function of one shard's part of the caches, and of its part of `args`, to all shards.

  The caches have shards and slots joined in one dimension of rows, which is taken apart here and joined again.
  """
  shards = len(args[0])

  def one(*leaves):
    # The rows' dimension: heads, columns and width follow it, and in a stack the layers come before it.
    dim = leaves[0].ndim - 4
    parts = [x.reshape(*x.shape[:dim], shards, -1, *x.shape[dim + 1 :]) for x in leaves]
    axes = (dim,) * len(parts) + (0,) * len(args)
    x = jax.vmap(function, axes, dim)(*parts, *args)
    x = x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])
    return constraints.shard_rows(x, row_dim=dim, tensor_dim=dim + 1)

  return jax.tree.map(one, *caches)


def _decode(task: Task, run: Run) -> Run:
  """One decode step of all slots. Free slots are computed too, and their results dropped."""
  rows, max_new_tokens = run.rows, task.uniform_XQR.shape[2]
  is_prompt_BP, length_B = _flat(rows.is_prompt_SP), _flat(rows.length_S)
  position_B = jnp.sum(is_prompt_BP, axis=1, dtype=jnp.int32) + length_B - 1
  # Age of a ring column: steps since it was last written, 0 for the one that this step writes. A row with n tokens has
  # written, or is writing, the n youngest columns. Older ones belong to an earlier row of the slot.
  age_1R = ((run.step - jnp.arange(max_new_tokens)) % max_new_tokens)[None]
  is_column_BT = jnp.concatenate([is_prompt_BP, age_1R < length_B[:, None]], axis=1)
  prompt_position_BP = positions.from_mask(is_prompt_BP)
  # The ring does not hold tokens in the order of their positions, so the band of GPT-3's layers needs them spelt out.
  column_position_BT = jnp.concatenate([prompt_position_BP, position_B[:, None] - age_1R], axis=1)
  logits_BV, cache = decoding.decode_step(
    task.model,
    task.weights,
    _flat(rows.token_S),
    position_B,
    is_prompt_BP.shape[1] + run.step % max_new_tokens,
    is_column_BT,
    run.cache,
    column_position_BT,
    ring_step=run.step if _ring_length(task) else None,
  )
  # The row's own noise for its next token: 'clip' is for rows that have ended at the limit, whose draw is dropped.
  noise = jax.vmap(lambda uniform_QR, row_S, t_S: uniform_QR.at[row_S, t_S].get(mode="clip"))
  uniform_B = _flat(noise(task.uniform_XQR, rows.row_S, rows.length_S))
  output, rows = _append(task, run.output, rows, *task.draw(logits_BV, uniform_B))
  return Run(
    step=run.step + 1,
    slot_steps=run.slot_steps + len(length_B),
    rows=rows,
    cache=cache,
    output=output,
  )


def _narrow(run: Run, width: int) -> Run:
  """Keeps `width` slots of each shard, among them all busy ones: a stable sort puts these first."""
  order_XS = jnp.argsort(~run.rows.is_live_S, axis=1, stable=True)[:, :width]
  keep = lambda rows, order_S: jax.tree.map(lambda x: x[order_S], rows)
  rows = constraints.shard_rows(jax.vmap(keep)(run.rows, order_XS))
  cache = _map_cache(lambda x, order_S: x[..., order_S, :, :, :], (run.cache,), order_XS)
  return dataclasses.replace(run, rows=rows, cache=cache)
