"""Answers of a policy to a list of prompts, on the host: for collecting, choosing an SFT epoch, evaluation."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import Params, PromptBatch, Rollout
from instructjax.data import packing
from instructjax.data.tokenizer import Tokenizer
from instructjax.models import transformer
from instructjax.parallel import distributed, sharding
from instructjax.rl import sampling, scoring
from instructjax.stages.context import Context

_ROWS = 256  # rows of one compiled call, one answer a row
_SHARED_ROWS = 16  # rows of one compiled call that several answers share; always filled up, so that one program does


@dataclasses.dataclass(frozen=True)
class Answers:
  """Sampled answers, in the order of the prompts given; arrays hold one row an answer."""

  text: list[str]
  token_NL: np.ndarray
  is_token_NL: np.ndarray
  is_response_NR: np.ndarray
  ended_N: np.ndarray


def pad_left(sequences: list[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """(token_NP int32, is_prompt_NP); every sequence must fit."""
  token_NP = np.full((len(sequences), length), pad_id, np.int32)
  for row, sequence in zip(token_NP, sequences):
    row[length - len(sequence) :] = sequence
  return token_NP, token_NP != pad_id


# What ends a row is no part of the program: base models end at a newline, the others at EOS.
@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "temperature"))
def _generate(model, params, prompts, key, end_id, max_new_tokens, temperature) -> Rollout:
  return sampling.generate(
    model,
    params,
    prompts,
    key,
    max_new_tokens=max_new_tokens,
    eos_id=end_id,
    temperature=temperature,
  )


@functools.partial(jax.jit, static_argnames="model")
def _score(model, params, token_SL, segment_SL):
  return scoring.column_score(model, params, token_SL, segment_SL)


@functools.partial(jax.jit, static_argnames=("model", "prompt_length", "temperature"))
def _logprob(model, params, token_BL, is_token_BL, prompt_length, temperature):
  return scoring.response_logprob(
    model, params, token_BL, is_token_BL, prompt_length=prompt_length, temperature=temperature
  )


def _in_chunks(function, num_rows: int, *arrays, rows: int = 0):
  """Calls `function` on equal chunks of rows, the last one filled up with repeats that are dropped.

  Chunks have `rows` rows; if 0, all that there are, up to a limit.
  """
  rows = rows or min(_ROWS, num_rows)
  outputs = []
  for start in range(0, num_rows, rows):
    distributed.require_going_on()
    index = np.minimum(np.arange(start, start + rows), num_rows - 1)
    outputs.append(sharding.to_host(function(start, *(a[index] for a in arrays))))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_rows], *outputs)


def sample(
  ctx: Context,
  model: transformer.Model,
  params: Params,
  prompts: list[list[int]],
  key: jax.Array,
  *,
  temperature: float,
  prompt_length: int | None = None,
  to_newline: bool = False,
) -> Answers:
  """One answer a prompt (repeat a prompt in the list for several).

  Args:
    prompts: token lists.
    prompt_length: columns for the prompt; the data config's limit if None.
    to_newline: an answer ends at its first newline instead of EOS, as a base model's does; at EOS
      where the tokenizer has no piece for the newline.
    temperature: 0 is greedy.
  Raises:
    UserError: a prompt is longer than prompt_length.
  """
  length = prompt_length or ctx.config.data.max_prompt_length
  longest = max(map(len, prompts), default=0)
  if longest > length:
    raise UserError(f"prompt of {longest} tokens must not exceed {length} tokens")
  tokenizer = ctx.tokenizer
  max_new = ctx.config.data.max_response_length
  end_id = tokenizer.eos_id
  if to_newline and tokenizer.newline_id is not None:
    end_id = tokenizer.newline_id

  def one(start, token_BP, is_prompt_BP):
    index_B = start + np.arange(len(token_BP), dtype=np.int32)
    batch = sharding.place_rows(ctx.mesh, PromptBatch(token_BP, is_prompt_BP, index_B))
    rollout = _generate(model, params, batch, key, np.int32(end_id), max_new, float(temperature))
    return rollout.token_BL, rollout.is_token_BL, rollout.is_response_BR

  token_NL, is_token_NL, is_response_NR = _in_chunks(
    one, len(prompts), *pad_left(prompts, length, tokenizer.pad_id)
  )
  response_NR = np.where(is_response_NR, token_NL[:, length:], tokenizer.pad_id)
  return Answers(
    text=decode(tokenizer, response_NR),
    token_NL=token_NL,
    is_token_NL=is_token_NL,
    is_response_NR=is_response_NR,
    ended_N=np.any(response_NR == end_id, axis=1),
  )


def from_tokens(ctx: Context, prompts: list[list[int]], responses: list[list[int]]) -> Answers:
  """Answers given as token ids, EOS included where there is one; right-padded."""
  data, pad_id = ctx.config.data, ctx.tokenizer.pad_id
  length = data.max_prompt_length + data.max_response_length
  token_NL = np.full((len(prompts), length), pad_id, np.int32)
  is_response_NR = np.zeros(token_NL.shape, bool)
  for row, is_response_R, prompt, response in zip(token_NL, is_response_NR, prompts, responses):
    end = len(prompt) + len(response)
    row[:end] = prompt + response
    is_response_R[len(prompt) : end] = True
  return Answers(
    text=[ctx.tokenizer.decode(response) for response in responses],
    token_NL=token_NL,
    is_token_NL=token_NL != pad_id,
    is_response_NR=is_response_NR,
    ended_N=np.array([ctx.tokenizer.eos_id in response for response in responses]),
  )


def from_text(ctx: Context, prompts: list[str], text: list[str], ended_N: np.ndarray) -> Answers:
  """Answers given as text, tokenized anew as reward-model data is, with EOS where the sampled answer ended.

  Text sampled at the length limit may need more pieces when it is tokenized anew: it is cut to fit.
  """
  tokenizer, limit = ctx.tokenizer, ctx.config.data.max_response_length
  responses = [
    (tokenizer.encode(answer) + [tokenizer.eos_id] * bool(ended))[:limit]
    for answer, ended in zip(text, ended_N)
  ]
  return from_tokens(ctx, [tokenizer.encode_prompt(prompt) for prompt in prompts], responses)


def decode(tokenizer: Tokenizer, response_NR: np.ndarray) -> list[str]:
  """Texts of response rows: EOS and pads dropped, surrounding blanks stripped."""
  stop = (tokenizer.eos_id, tokenizer.pad_id)
  return [tokenizer.decode([int(t) for t in row if t not in stop]).strip() for row in response_NR]


def score(ctx: Context, model: transformer.Model, params: Params, answers: Answers) -> np.ndarray:
  """Reward-model score of each answer, float32 [N]."""
  tokens = [
    token_L[is_token_L] for token_L, is_token_L in zip(answers.token_NL, answers.is_token_NL)
  ]
  return score_tokens(ctx, model, params, tokens)


def score_tokens(
  ctx: Context, model: transformer.Model, params: Params, sequences: Sequence[Sequence[int]]
) -> np.ndarray:
  """Reward-model score of each prompt with its answer, read at the last token, float32 [N].

  Rows are shared as in the reward model's training.
  """
  data, length = ctx.config.data, ctx.config.rm.row_length
  if length:
    rows = packing.pack([len(sequence) for sequence in sequences], length)
    shards = sharding.num_row_shards(ctx.mesh)
    chunk = -(-_SHARED_ROWS // shards) * shards
  else:
    rows, chunk = [[index] for index in range(len(sequences))], 0
    length = data.max_prompt_length + data.max_response_length
  scored = packing.scored_rows(sequences, rows, length=length, vocab_size=ctx.tokenizer.vocab_size)

  def one(_, token_SL, segment_SL):
    return _score(model, params, *sharding.place_rows(ctx.mesh, (token_SL, segment_SL)))

  score_SL = _in_chunks(one, len(rows), scored.token_SL, scored.segment_SL, rows=chunk)
  return score_SL.reshape(-1)[scored.last_N]


def logprob(
  ctx: Context, model: transformer.Model, params: Params, answers: Answers, temperature: float
) -> np.ndarray:
  """Log-probability of each answer, its tokens summed, float32 [N], in nats."""
  prompt_length = answers.token_NL.shape[1] - answers.is_response_NR.shape[1]

  def one(_, token_BL, is_token_BL):
    batch = sharding.place_rows(ctx.mesh, (token_BL, is_token_BL))
    return jnp.sum(_logprob(model, params, *batch, prompt_length, float(temperature)), axis=1)

  return _in_chunks(one, len(answers.text), answers.token_NL, answers.is_token_NL)
