"""Samples and scores a policy's answers to a list of prompts, with results on the host.

Called by the stages that need answers outside of PPO: `collect`, `rm`, `sft_select`, `best_of_n` and `evaluate`; `ppo`
decodes with it.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import Params, PromptBatch, Rollout
from instructjax.data import packing
from instructjax.data.tokenizer import Tokenizer, prompt_ids
from instructjax.models import transformer
from instructjax.parallel import distributed, sharding
from instructjax.rl import sampling, scoring
from instructjax.stages.context import Context

_ROWS = 256  # most rows in one compiled call when each answer has a row of its own
# Rows in one compiled call when answers share rows. A call always has so many, so that one compiled program does for
# lists of any length.
_SHARED_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers in the order of their prompts.

  Attributes:
    text: the answers, decoded.
    token_NL: prompt and answer as token ids, with pads.
    is_token_NL: True on tokens of prompt and answer, False on pads.
    is_response_NR: True on tokens of the answer.
    ended_N: whether the answer ended by itself, not at the length limit.
  """

  text: list[str]
  token_NL: np.ndarray
  is_token_NL: np.ndarray
  is_response_NR: np.ndarray
  ended_N: np.ndarray

  @property
  def sequences(self) -> list[list[int]]:
    """The tokens of each prompt with its answer, without pads."""
    pairs = zip(self.token_NL, self.is_token_NL)
    return [token_L[is_token_L].tolist() for token_L, is_token_L in pairs]


def pad_left(sequences: list[list[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the left: (token_NP int32, is_prompt_NP). No sequence may be longer than `length`."""
  token_NP = np.full((len(sequences), length), pad_id, np.int32)
  for row, sequence in zip(token_NP, sequences):
    row[length - len(sequence) :] = sequence
  return token_NP, token_NP != pad_id


# `end_ids` is an argument, not static: base models end at a newline and the others at EOS, in one compiled program.
@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "temperature"))
def _generate(model, params, prompts, key, end_ids, max_new_tokens, temperature) -> Rollout:
  return sampling.generate(
    model,
    params,
    prompts,
    key,
    max_new_tokens=max_new_tokens,
    stop_ids=end_ids,
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
  """Calls `function(start, *rows of the arrays)` on chunks of equal size, and joins the results on the host.

  The last chunk is filled up with repeats, whose results are dropped. A chunk has `rows` rows; if that is 0, all
  `num_rows`, but at most _ROWS.

  Raises:
    Preempted: the run was told to stop.
  """
  rows = rows or min(_ROWS, num_rows)
  outputs = []
  for start in range(0, num_rows, rows):
    # Between chunks a run can be told to stop. What is sampled or scored here has no checkpoint and is done again.
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
  """Samples one answer to each prompt; for several answers to a prompt, repeat it in the list.

  Args:
    ctx: the run.
    model, params: the policy.
    prompts: token lists.
    key: key of all these answers; each row draws with its own place in the list.
    temperature: 0 is greedy.
    prompt_length: columns for the prompt; None for the limit in the data config.
    to_newline: whether an answer ends at its first newline rather than at a stop token, as a base model's does. It has
      no effect if the tokenizer has no piece for the newline.
  Raises:
    UserError: a prompt is longer than prompt_length.
    Preempted: the run was told to stop.
  """
  length = prompt_length or ctx.config.data.max_prompt_length
  longest = max(map(len, prompts), default=0)
  if longest > length:
    raise UserError(f"prompt of {longest} tokens must not exceed {length} tokens")
  tokenizer = ctx.tokenizer
  max_new = ctx.config.data.max_response_length
  end_ids = tokenizer.stop_ids
  if to_newline and tokenizer.newline_id is not None:
    end_ids = (tokenizer.newline_id,)

  def one(start, token_BP, is_prompt_BP):
    # Random numbers follow a row's place in the whole list, so the size of chunks does not change the answers.
    index_B = start + np.arange(len(token_BP), dtype=np.int32)
    batch = sharding.place_rows(ctx.mesh, PromptBatch(token_BP, is_prompt_BP, index_B))
    ends = tuple(map(np.int32, end_ids))
    rollout = _generate(model, params, batch, key, ends, max_new, float(temperature))
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
    ended_N=np.any(np.isin(response_NR, end_ids), axis=1),
  )


def from_tokens(ctx: Context, prompts: list[list[int]], responses: list[list[int]]) -> Answers:
  """Makes Answers of given token ids, padded on the right; a response includes its EOS if it has one."""
  data, pad_id = ctx.config.data, ctx.tokenizer.pad_id
  length = data.max_prompt_length + data.max_response_length
  token_NL = np.full((len(prompts), length), pad_id, np.int32)
  is_response_NR = np.zeros(token_NL.shape, bool)
  for row, is_response_R, prompt, response in zip(token_NL, is_response_NR, prompts, responses):
    end = len(prompt) + len(response)
    row[:end] = prompt + response
    is_response_R[len(prompt) : end] = True
  stops = set(ctx.tokenizer.stop_ids)
  return Answers(
    text=[ctx.tokenizer.decode(response) for response in responses],
    token_NL=token_NL,
    is_token_NL=token_NL != pad_id,
    is_response_NR=is_response_NR,
    ended_N=np.array([not stops.isdisjoint(response) for response in responses]),
  )


def from_text(ctx: Context, prompts: list[str], text: list[str], ended_N: np.ndarray) -> Answers:
  """Makes Answers of texts, tokenized as the reward model's training data are, with EOS if the answer ended by itself.

  The reward model has to read tokens as in its training: a policy can spell a text in other pieces than the tokenizer
  does. Spelt anew, a text that was sampled up to the length limit may need more pieces; it is then cut to the limit.
  """
  tokenizer, limit = ctx.tokenizer, ctx.config.data.max_response_length
  responses = [
    (tokenizer.encode(answer) + [tokenizer.eos_id] * bool(ended))[:limit]
    for answer, ended in zip(text, ended_N)
  ]
  return from_tokens(ctx, [prompt_ids(tokenizer, prompt) for prompt in prompts], responses)


def decode(tokenizer: Tokenizer, response_NR: np.ndarray) -> list[str]:
  """The texts of rows, without pads, the stop token at the end, and surrounding blanks."""
  texts = []
  for row in response_NR:
    ids = [int(token) for token in row if token != tokenizer.pad_id]
    if ids and ids[-1] in tokenizer.stop_ids:  # it may be a word elsewhere
      ids.pop()
    texts.append(tokenizer.decode(ids).strip())
  return texts


def score(ctx: Context, model: transformer.Model, params: Params, answers: Answers) -> np.ndarray:
  """The reward model's score of each answer, float32 [N].

  Raises:
    Preempted: the run was told to stop.
  """
  return score_tokens(ctx, model, params, answers.sequences)


def score_tokens(
  ctx: Context, model: transformer.Model, params: Params, sequences: Sequence[Sequence[int]]
) -> np.ndarray:
  """The reward model's score of each sequence (a prompt with its answer), read at the last token, float32 [N].

  A given reward model may skip a token there: see `scoring.is_read`.

  Sequences share rows if `rm.row_length` says so, as they do in the reward model's training. With a row for each
  answer, 47% of a training batch was padding in the default preset.

  Raises:
    Preempted: the run was told to stop.
  """
  scored, chunk = _rows(ctx, sequences)

  def one(_, token_SL, segment_SL):
    return _score(model, params, *sharding.place_rows(ctx.mesh, (token_SL, segment_SL)))

  score_SL = _in_chunks(one, len(scored.token_SL), scored.token_SL, scored.segment_SL, rows=chunk)
  given = ctx.given.get("rm")
  skipped_N = [
    num_skipped(sequence, given.score_skips if given else None) for sequence in sequences
  ]
  return score_SL.reshape(-1)[scored.last_N - np.array(skipped_N, np.int32)]


def _rows(ctx: Context, sequences: Sequence[Sequence[int]]) -> tuple[packing.ScoredRows, int]:
  """Where sequences lie in rows, and how many rows to read in one call (0: as `_in_chunks` has it)."""
  data, length = ctx.config.data, ctx.config.rm.row_length
  if length:
    rows = packing.pack([len(sequence) for sequence in sequences], length)
    shards = sharding.num_row_shards(ctx.mesh)
    chunk = -(-_SHARED_ROWS // shards) * shards
  else:
    rows, chunk = [[index] for index in range(len(sequences))], 0
    length = data.max_prompt_length + data.max_response_length
  vocab_size = ctx.tokenizer.vocab_size
  return packing.scored_rows(sequences, rows, length=length, vocab_size=vocab_size), chunk


def num_skipped(sequence: Sequence[int], skips: int | None) -> int:
  """The number of tokens at the end of a sequence at which no score is read; the first token is never among them."""
  trailing = itertools.takewhile(lambda token: token == skips, reversed(sequence[1:]))
  return sum(1 for _ in trailing)


def demonstration_mean(ctx: Context, model: transformer.Model, params: Params) -> float:
  """The mean score of the labelers' demonstrations, which a reward model's bias takes away (C.2).

  Eq. 1 fixes scores only up to a constant. With this bias, 0 means as good as an average demonstration.
  """
  prompts, responses = zip(*ctx.data.demonstration_tokens("train"))
  # With EOS, as the reward model sees complete answers.
  demonstrations = from_tokens(ctx, list(prompts), list(responses))
  return float(np.mean(score(ctx, model, params, demonstrations)))


def mean_logprob(
  ctx: Context,
  model: transformer.Model,
  params: Params,
  prompts: Sequence[str],
  texts: Sequence[str],
) -> np.ndarray:
  """The mean log-probability of a text's tokens after its prompt, without the end of the text, float32 [N], in nats.

  A text of no token has the log-probability of a guess among all tokens. One longer than an answer is cut.

  Raises:
    Preempted: the run was told to stop.
  """
  data, tokenizer = ctx.config.data, ctx.tokenizer
  tokens = [tokenizer.encode(text)[: data.max_response_length] for text in texts]
  read = [prompt_ids(tokenizer, prompt) for prompt in prompts]
  count_N = np.array([len(ids) for ids in tokens])
  total_N = sequence_logprob(ctx, model, params, [*map(operator.add, read, tokens)], count_N, 1.0)
  guess = -np.log(tokenizer.vocab_size)
  return np.where(count_N > 0, total_N / np.maximum(count_N, 1), guess)


def logprob(
  ctx: Context, model: transformer.Model, params: Params, answers: Answers, temperature: float
) -> np.ndarray:
  """The log-probability of each answer, summed over its tokens, float32 [N], in nats.

  Args, raises: as for `sequence_logprob`.
  """
  count_N = answers.is_response_NR.sum(axis=1)
  return sequence_logprob(ctx, model, params, answers.sequences, count_N, temperature)


def sequence_logprob(
  ctx: Context,
  model: transformer.Model,
  params: Params,
  sequences: Sequence[Sequence[int]],
  count_N: np.ndarray,
  temperature: float,
) -> np.ndarray:
  """The log-probability of the end of each sequence after what stands before it, float32 [N], in nats.

  Sequences share rows where those of the reward model do, see `score_tokens`.

  Args:
    ctx: the run.
    model, params: the policy.
    sequences: prompts, of a token at least, with their answers.
    count_N: the number of an answer's tokens.
    temperature: that of the sampling, by which logits are divided here too (details item 19).
  Raises:
    Preempted: the run was told to stop.
  """
  laid, chunk = _rows(ctx, sequences)

  def one(_, token_SL, segment_SL):
    batch = sharding.place_rows(ctx.mesh, (token_SL, segment_SL))
    # Of every column but the first, which no answer begins in.
    logprob_SL = _logprob(model, params, *batch, 1, float(temperature))
    return jnp.pad(logprob_SL, ((0, 0), (1, 0)))

  cells = _in_chunks(one, len(laid.token_SL), laid.token_SL, laid.segment_SL, rows=chunk)
  cells = cells.reshape(-1)
  ends = [slice(last - count + 1, last + 1) for last, count in zip(laid.last_N, count_N)]
  return np.array([cells[end].sum() for end in ends], np.float32)
