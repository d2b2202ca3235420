"""Samples responses inside one XLA program: prefill, then a decode loop that ends when every row has ended.

Called by step.py (rollouts), stages/answers.py and serve/speaker.py. First come `generate` and its loop, then the draw
of one token. slots.py has the loop for decoding fewer rows at a time than there are prompts. Imports no data and no
stage.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Params, PromptBatch, Rollout, pytree
from instructjax.models import decoding, transformer
from instructjax.ops import masked
from instructjax.parallel import constraints
from instructjax.rl.slots import generate as generate_in_slots

_LOOPS, _LEAST_STEPS = 4, 128  # decode loops of a rollout, and steps of a loop: see `decode_loops`
_BLOCK = constraints.VOCAB_BLOCK  # in `sample_token`: about the square root of a vocabulary of 50k


def generate(
  model: transformer.Model,
  params: Params,
  prompts: PromptBatch,
  key: Array,
  *,
  max_new_tokens: int,
  stop_ids: Sequence[int | Array],
  temperature: float,
  slots: int = 0,
) -> Rollout:
  """Samples one response for each prompt. Traceable: call it inside jit.

  Weights are cast and laid out for decoding once, before the loop. The loop stops as soon as every row has ended, so it
  is as long as the longest answer. If lengths differ much, decode in fewer slots than there are rows.

  Args:
    model: a Model with an LM head.
    params: its float32 weights.
    prompts: left-padded; every row has at least one token.
    key: typed key of this rollout; each row folds its index into it.
    max_new_tokens: R, the most tokens of a response, EOS included.
    stop_ids: any of these tokens ends a row, and is kept as its last token (details item 4).
    temperature: 1 in the paper's rollouts; 0 is greedy.
    slots: rows decoded at once; when a row ends, its slot takes the next prompt. 0 decodes all rows at once. The tokens
      do not depend on it.
  Returns:
    A Rollout with L = P + R columns.
  Raises:
    UserError: slots or rows are not divisible by the mesh's data shards.
  """
  # All noise is drawn before the loop, a number for each row and step. So a row's tokens depend neither on the rows
  # beside it nor on the step at which it is decoded, and slots cannot change them.
  uniform_BR = row_uniforms(key, prompts.index_B, max_new_tokens)
  weights = decoding.decode_weights(model, params)
  draw = functools.partial(sample_token, temperature=temperature)
  task = (model, weights, prompts, uniform_BR, draw)
  if slots not in (0, len(prompts.token_BP)):
    return generate_in_slots(*task, slots=slots, stop_ids=stop_ids)
  return _generate_all_rows(*task, stop_ids=stop_ids)


@pytree
class _Rows:
  """What a decode step changes beside the cache.

  Attributes:
    token_BL, is_token_BL, logprob_BR: as in Rollout, up to the current step.
    ended_B: True once a row has its stop token; after that it gets pads.
  """

  token_BL: Array
  is_token_BL: Array
  logprob_BR: Array
  ended_B: Array


def _only_prompts(prompts: PromptBatch, max_new_tokens: int, pad_id: int) -> _Rows:
  """The prompts, with empty columns for the responses."""
  num_rows, room = len(prompts.token_BP), ((0, 0), (0, max_new_tokens))
  return _Rows(
    token_BL=jnp.pad(prompts.token_BP, room, constant_values=pad_id),
    is_token_BL=jnp.pad(prompts.is_prompt_BP, room),
    logprob_BR=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
    ended_B=jnp.zeros((num_rows,), bool),
  )


def _generate_all_rows(
  model: transformer.Model,
  weights: Params,
  prompts: PromptBatch,
  uniform_BR: Array,
  draw: Callable[[Array, Array], tuple[Array, Array]],
  *,
  stop_ids: Sequence[int | Array],
) -> Rollout:
  """The plain loop: all rows at once, step by step. Arguments as for `slots.generate`."""
  num_rows, prompt_length = prompts.token_BP.shape
  max_new_tokens = uniform_BR.shape[1]
  pad_id = model.vocab_size

  def append(rows: _Rows, t, logits_BV) -> _Rows:
    """Draws response token t of every row."""
    set_column = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=1)
    token_B, logprob_B = draw(logits_BV, uniform_BR[:, t])
    # Shapes are static, so rows that have ended are decoded too; what they draw is replaced by pads.
    new_token_B = jnp.where(rows.ended_B, pad_id, token_B)
    new_logprob_B = jnp.where(rows.ended_B, 0.0, logprob_B)
    rows = _Rows(
      token_BL=set_column(rows.token_BL, new_token_B, prompt_length + t),
      is_token_BL=set_column(rows.is_token_BL, ~rows.ended_B, prompt_length + t),
      logprob_BR=set_column(rows.logprob_BR, new_logprob_B, t),
      ended_B=rows.ended_B | masked.is_any(token_B, stop_ids),
    )
    return constraints.shard_rows(rows)

  # 1. Read the prompts, which fills the cache and predicts every row's first token.
  length = prompt_length + max_new_tokens
  ring = decoding.ring_length(model, length)
  cache = decoding.init_cache(model, num_rows, length, ring)
  logits_BV, cache = decoding.prefill(model, weights, prompts.token_BP, prompts.is_prompt_BP, cache)
  prompt_tokens_B = jnp.sum(prompts.is_prompt_BP, axis=-1, dtype=jnp.int32)
  rows = append(_only_prompts(prompts, max_new_tokens, pad_id), jnp.int32(0), logits_BV)

  # 2. Token after token, until every row has ended or is full. Each loop's attention reads the columns that its last
  #    step can see.
  def goes_on(stop: int, carry):
    t, _, rows = carry
    return (t < stop) & ~jnp.all(rows.ended_B)

  def step(stop: int, carry):
    t, cache, rows = carry
    # Token t - 1 is drawn but not in the cache yet: feeding it fills its column and predicts token t.
    newest = prompt_length + t - 1
    token_B = jax.lax.dynamic_index_in_dim(rows.token_BL, newest, axis=1, keepdims=False)
    logits_BV, cache = decoding.decode_step(
      *(model, weights, token_B, prompt_tokens_B + t - 1, newest, rows.is_token_BL, cache),
      num_columns=None if stop == max_new_tokens else prompt_length + stop,
      ring_step=newest if ring else None,
    )
    return t + 1, cache, append(rows, t, logits_BV)

  start, num_steps = 1, jnp.int32(1)
  for name, stop in decode_loops(model.execution.layers, max_new_tokens):
    # If all rows have ended before `start`, the loop does not run.
    carry = jnp.int32(start), cache, rows
    with jax.named_scope(name):
      t, cache, rows = jax.lax.while_loop(
        functools.partial(goes_on, stop), functools.partial(step, stop), carry
      )
    start, num_steps = stop, t if start == 1 else num_steps + t - start
  return Rollout(
    token_BL=rows.token_BL,
    is_token_BL=rows.is_token_BL,
    is_response_BR=rows.is_token_BL[:, prompt_length:],
    behaviour_logprob_BR=rows.logprob_BR,
    num_steps=num_steps,
    slot_steps=num_rows * num_steps,
  )


def decode_loops(layers: str, max_new_tokens: int) -> list[tuple[str, int]]:
  """The decode loops of a rollout without slots: the name of each, and the number of tokens at which it ends.

  A loop's shapes are static, so it reads the columns of its last step at every step. Four loops read a quarter of the
  answer's columns too many at most, and each is compiled. Unrolled layers, which take longer to compile, have one loop.

  Args:
    layers: ExecutionConfig.layers.
    max_new_tokens: the most tokens of a response.
  """
  loops = 1 if layers == "unroll" else max(1, min(_LOOPS, max_new_tokens // _LEAST_STEPS))
  if loops == 1:
    return [("decode", max_new_tokens)]
  stops = [max_new_tokens * (n + 1) // loops for n in range(loops)]
  return [(f"decode_{stop}", stop) for stop in stops]


def row_uniforms(key: Array, index_B: Array, num_steps: int) -> Array:
  """Uniforms in [0, 1), [B, num_steps]. Row i's depend on (key, i) only, not on the batch or its layout on devices."""
  return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (num_steps,)))(index_B)


def sample_token(
  logits_BV: Array, uniform_B: Array, temperature: float, top_p: float = 1.0
) -> tuple[Array, Array]:
  """Draws one token for each row from softmax(logits / temperature).

  It inverts the cumulative distribution in two levels, which is exact: first it draws a block of 256 tokens by the
  blocks' mass, then a token inside the block. This needs one uniform a row, no sort, and no noise array of the
  vocabulary's size. (`jax.random.categorical` needs one: a fifth of a decode step on a CPU with 50k tokens.)

  Args:
    logits_BV: float32.
    uniform_B: in [0, 1).
    temperature: static; 0 takes the argmax, and its log-probability is that at temperature 1.
    top_p: static; below 1, only tokens of the nucleus are drawn. PPO's rollouts must not use it, because the ratio and
      the KL are computed for the whole distribution.
  Returns:
    (token_B int32, logprob_B float32 under the distribution drawn from).
  """
  logits_BV = logits_BV.astype(jnp.float32)
  if temperature > 0:
    logits_BV = logits_BV / temperature
    if top_p == 1 and constraints.splits_vocab():
      return _sample_split(logits_BV, uniform_B)
  max_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  mass_BV = jnp.exp(logits_BV - max_B1)
  if temperature > 0 and top_p < 1:
    mass_BV = _nucleus(mass_BV, top_p)
  log_total_B = jnp.log(jnp.sum(mass_BV, axis=-1)) + max_B1[:, 0]
  if temperature == 0:
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  else:
    num_rows, vocab_size = mass_BV.shape
    num_blocks = -(-vocab_size // _BLOCK)
    padded = jnp.pad(mass_BV, ((0, 0), (0, num_blocks * _BLOCK - vocab_size)))
    blocks = padded.reshape(num_rows, num_blocks, _BLOCK)
    block_mass_BT = jnp.sum(blocks, axis=-1)
    # The uniform, scaled to the total mass, picks the block. What is left of it inside the block is uniform again, and
    # picks the token.
    block_B, left_B = _pick(block_mass_BT, uniform_B * jnp.sum(block_mass_BT, axis=-1))
    inside_BT = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    column_B, _ = _pick(inside_BT, left_B)
    token_B = block_B * _BLOCK + column_B
  logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
  return token_B, logit_B - log_total_B


def _sample_split(logits_BV: Array, uniform_B: Array) -> tuple[Array, Array]:
  """`sample_token` at temperature 1, of logits that are split by vocabulary.

  The devices send each other two numbers for each block, and the logits of the blocks that were drawn.
  """
  logits_BV = constraints.pad_vocab(logits_BV, 1, -jnp.inf)
  blocks = constraints.shard_rows(logits_BV.reshape(len(logits_BV), -1, _BLOCK), tensor_dim=1)
  # Each block's maximum is subtracted in it, so that nothing need be known of other blocks. It is finite, because in a
  # block past the vocabulary -inf less -inf would be NaN.
  top_BT = jnp.maximum(jnp.max(blocks, axis=-1), jnp.finfo(jnp.float32).min)
  sum_BT = jnp.sum(jnp.exp(blocks - top_BT[:, :, None]), axis=-1)
  top_BT, sum_BT = jnp.unstack(constraints.shard_rows(jnp.stack([top_BT, sum_BT], -1)), axis=-1)
  max_B1 = jnp.max(top_BT, axis=-1, keepdims=True)
  mass_BT = sum_BT * jnp.exp(top_BT - max_B1)
  total_B = jnp.sum(mass_BT, axis=-1)
  block_B, left_B = _pick(mass_BT, uniform_B * total_B)
  inside_BT = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
  inside_BT = constraints.shard_rows(inside_BT)
  column_B, _ = _pick(jnp.exp(inside_BT - max_B1), left_B)
  logit_B = jnp.take_along_axis(inside_BT, column_B[:, None], axis=-1)[:, 0]
  return block_B * _BLOCK + column_B, logit_B - max_B1[:, 0] - jnp.log(total_B)


def _pick(mass_BT: Array, target_B: Array) -> tuple[Array, Array]:
  """The first index whose cumulative mass exceeds the target, and the target less the mass before that index."""
  cumulative_BT = jnp.cumsum(mass_BT, axis=-1)
  # Held just below the total: by rounding, the target could reach it, and pick an entry without mass at the end.
  target_B = jnp.minimum(target_B, cumulative_BT[:, -1] * (1 - 1e-6))
  index_B = jnp.sum(cumulative_BT <= target_B[:, None], axis=-1, dtype=jnp.int32)
  chosen = functools.partial(jnp.take_along_axis, indices=index_B[:, None], axis=-1)
  before_B = (chosen(cumulative_BT) - chosen(mass_BT))[:, 0]
  return index_B, jnp.maximum(target_B - before_B, 0.0)


def _last_where(is_true, stop_B: Array) -> Array:
  """The last of the integers 0 .. stop_B - 1 for which `is_true` holds, by bisection.

  Args:
    is_true: integers [B] -> booleans [B]. It must hold at 0, which is not checked, and once false it must stay false.
    stop_B: exclusive upper bound of each row.
  """

  def halve(bounds):
    low_B, high_B = bounds
    middle_B = low_B + (high_B - low_B) // 2
    holds_B = is_true(middle_B)
    return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B)

  is_open = lambda bounds: jnp.any(bounds[1] - bounds[0] > 1)
  return jax.lax.while_loop(is_open, halve, (jnp.zeros_like(stop_B), stop_B))[0]


def _nucleus(mass_BV: Array, top_p: float) -> Array:
  """Sets the mass outside the nucleus to 0.

  The nucleus is the smallest set of the likeliest tokens that holds a share top_p of the mass (Holtzman et al. 2020,
  arXiv:1904.09751). If several tokens have the mass at its edge, those with the lowest ids belong to it, as many as are
  needed. The result is exact, without a sort, which takes 25 times as long on a CPU with 50k tokens.
  """
  # Floats that are not negative have the same order as their bits, read as integers. So a bisection over the bits finds
  # the exact mass at the edge in about 30 steps.
  target_B = top_p * jnp.sum(mass_BV, axis=-1)
  bits_BV = jax.lax.bitcast_convert_type(mass_BV, jnp.int32)
  id_1V = jnp.arange(mass_BV.shape[-1], dtype=jnp.int32)[None]

  def reaches(edge_B):
    is_in_BV = bits_BV >= edge_B[:, None]
    return jnp.sum(jnp.where(is_in_BV, mass_BV, 0.0), axis=-1) >= target_B

  edge_B = _last_where(reaches, jnp.max(bits_BV, axis=-1) + 1)
  # Every token above the edge is in. Of the tokens with just the edge's mass, a second bisection, over ids, takes as
  # many as are missing.
  is_above_BV, is_edge_BV = bits_BV > edge_B[:, None], bits_BV == edge_B[:, None]
  missing_B = target_B - jnp.sum(jnp.where(is_above_BV, mass_BV, 0.0), axis=-1)
  edge_mass_B = jax.lax.bitcast_convert_type(edge_B, jnp.float32)

  def is_needed(id_B):
    num_before_B = jnp.sum(is_edge_BV & (id_1V < id_B[:, None]), axis=-1)
    return num_before_B * edge_mass_B < missing_B

  last_B = _last_where(is_needed, jnp.full_like(edge_B, mass_BV.shape[-1]))
  return jnp.where(is_above_BV | (is_edge_BV & (id_1V <= last_B[:, None])), mass_BV, 0.0)
