"""A model that is evaluated: log-probabilities of continuations and texts, answers to prompts, rewards of answers.

Called by the tasks of the evaluation, the scorers and the adapter of lm-evaluation-harness. Results are handed to
`told` as they come, in any order, so that a caller can keep them and leave out what it has when it starts again: no
result depends on the requests beside it, but for rounding.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax.core.errors import UserError
from instructjax.core.stages import Head
from instructjax.core.structs import Params, PromptBatch, tree_of
from instructjax.data.tokenizer import Tokenizer, prompt_ids
from instructjax.evaluation import encoding
from instructjax.models import execution, transformer
from instructjax.parallel import sharding
from instructjax.rl import sampling, scoring
from instructjax.train import weights

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A network with its weights and its tokenizer.

  Attributes:
    name: the path, as the user gave it.
    tokenizer: the one that belongs to the weights.
    model: the network; its layers are scanned, which compiles in a fraction of the time of unrolled ones.
    params: weights in the compute dtype where every use would cast them, see `transformer.frozen_weights`.
    mesh: where they lie; rows are split over it.
    max_length: most tokens that the network reads at once.
    first_id: the token before a text that has nothing before it.
    score_skips: of a reward model, see `scoring.is_read`; else None.
  """

  name: str
  tokenizer: Tokenizer
  model: transformer.Model
  params: Params
  mesh: Mesh
  max_length: int
  first_id: int
  score_skips: int | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
  """What a model says of a continuation.

  Attributes:
    log_prob: sum over its tokens, in nats.
    log_probs: of each token, in nats.
    tokens: the text of each token.
    is_greedy: whether each token is the likeliest at its place, so that greedy decoding would give the continuation.
    is_cut: whether the context lost its beginning, because both are longer than what the model reads at once.
  """

  log_prob: float
  log_probs: tuple[float, ...]
  tokens: tuple[str, ...]
  is_greedy: bool
  is_cut: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt that a model answers.

  Attributes:
    prompt: text; control tokens in it are recognised if a chat template made it.
    stops: the answer ends before the first of these texts.
    max_new_tokens: the most tokens of the answer.
    temperature: 0 takes the likeliest token each time.
    seed: answers to one prompt with different seeds are different samples.
  """

  prompt: str
  stops: tuple[str, ...]
  max_new_tokens: int
  temperature: float = 0.0
  seed: int = 0


Dtype = Literal["auto", "float32", "bfloat16"]


def open_model(
  spec: str, mesh: Mesh, *, dtype: Dtype = "auto", max_length: int = 0, base: str = ""
) -> LanguageModel:
  """Opens a language model.

  Args:
    spec: folder of a finished stage, a Hugging Face folder, a GGUF file, or hf://ORG/NAME; see `weights.locate`.
    mesh: devices.
    dtype: of activations and products; 'auto' is float32 on a CPU and bfloat16 elsewhere.
    max_length: most tokens read at once; 0 for the network's own limit.
    base: of an adapter, where its base lies; '' for the place that it names itself.
  Raises:
    UserError: it cannot be opened, is a reward model, or max_length is more than the network has.
  """
  return _open(spec, mesh, "lm", dtype, max_length, base)


def open_reward_model(
  spec: str, mesh: Mesh, *, dtype: Dtype = "auto", max_length: int = 0, base: str = ""
) -> LanguageModel:
  """Opens a reward model: a finished stage of kind `rm`, or a Hugging Face sequence classifier with one label.

  Args, raises: as for `open_model`.
  """
  return _open(spec, mesh, "scalar", dtype, max_length, base)


def _open(
  spec: str, mesh: Mesh, head: Head, dtype: Dtype, max_length: int, base: str
) -> LanguageModel:
  found = weights.locate(spec, base=base)
  if found.head != head or found.item == "value_params":
    is_wanted = {"lm": "a language model", "scalar": "a reward model"}
    raise UserError(f"{spec} must be {is_wanted[head]}, and it is {is_wanted[found.head]}")
  found.require_rows()
  limit = found.network.max_length
  if not 0 <= max_length <= limit:
    raise UserError(f"{spec}: max_length={max_length} must be at most the network's {limit}")
  chosen = execution.for_inference(sharding.platform_of(mesh))
  chosen = dataclasses.replace(chosen, layers="scan", attention="plain")
  if dtype != "auto":
    chosen = dataclasses.replace(chosen, dtype=dtype)
  model = execution.model_on(mesh, found.network, chosen, found.tokenizer.vocab_size, head)
  with jax.set_mesh(mesh):
    params = jax.jit(functools.partial(transformer.frozen_weights, model))(found.load(mesh, model))
  return LanguageModel(
    name=spec,
    tokenizer=found.tokenizer,
    model=model,
    params=params,
    mesh=mesh,
    max_length=max_length or limit,
    first_id=encoding.prefix_id(found.tokenizer),
    score_skips=found.score_skips,
  )


def log_probs(
  model: LanguageModel,
  pairs: Sequence[tuple[str, str]],
  told: Callable[[int, Scored], None] = lambda index, result: None,
) -> list[Scored]:
  """The log-probability of each continuation after its context.

  A pair that is too long loses the beginning of its context.

  Args:
    model: a language model.
    pairs: (context, continuation). The context may be empty.
    told: called with the number of a pair and its result, as soon as it is known.
  Raises:
    UserError: a continuation is empty, or longer than what the model reads at once.
  """
  ids = [encoding.pair_ids(model.tokenizer, *pair, model.first_id) for pair in pairs]
  return _scored(model, ids, told)


def rolling(
  model: LanguageModel,
  texts: Sequence[str],
  told: Callable[[int, Scored], None] = lambda index, result: None,
) -> list[Scored]:
  """The log-probability of each text from its first token on; long ones in windows, see `encoding.windows`.

  Args:
    model: a language model.
    texts: none is empty.
    told: called with the number of a text and its result, as soon as it is known.
  Raises:
    UserError: a text is empty.
  """
  parts, owner = [], []
  for number, text in enumerate(texts):
    ids = model.tokenizer.encode(text)
    if not ids:
      raise UserError(f"text {number + 1} of {len(texts)} to be scored is empty")
    cut = encoding.windows(ids, model.first_id, model.max_length)
    parts += cut
    owner += [number] * len(cut)
  left = np.bincount(owner, minlength=len(texts))
  found: dict[int, Scored] = {}
  results: dict[int, Scored] = {}

  def part_told(index, result):
    found[index] = result
    number = owner[index]
    left[number] -= 1
    if left[number] == 0:
      own = [found.pop(i) for i in range(owner.index(number), len(owner)) if owner[i] == number]
      results[number] = _joined(own)
      told(number, results[number])

  _scored(model, parts, part_told)
  return [results[number] for number in range(len(texts))]


def _joined(parts: Sequence[Scored]) -> Scored:
  return Scored(
    log_prob=float(sum(part.log_prob for part in parts)),
    log_probs=tuple(value for part in parts for value in part.log_probs),
    tokens=tuple(token for part in parts for token in part.tokens),
    is_greedy=all(part.is_greedy for part in parts),
  )


@functools.partial(jax.jit, static_argnames="model")
def _log_probs(model, params, token_BL, is_token_BL):
  segment_BL = is_token_BL.astype(jnp.int32)
  position_BL = transformer.positions_from_segments(segment_BL)
  logits_BLV = transformer.apply(
    model, params, token_BL, segment_BL=segment_BL, position_BL=position_BL
  )[:, :-1]
  next_BL = jnp.where(is_token_BL, token_BL, 0)[:, 1:]
  logprob_BLV = jax.nn.log_softmax(logits_BLV)
  logprob_BL = jnp.take_along_axis(logprob_BLV, next_BL[..., None], axis=-1)[..., 0]
  return logprob_BL, jnp.argmax(logits_BLV, axis=-1) == next_BL


def _scored(model: LanguageModel, ids, told) -> list[Scored]:
  results = {}
  for index, (before, after) in enumerate(ids):
    if len(after) > model.max_length:
      raise UserError(
        f"{model.name}: a continuation of {len(after)} tokens must not exceed the context of {model.max_length}"
      )
    tokens = (before + after)[-(model.max_length + 1) :]
    length = _bucket(len(tokens))
    token_L = np.asarray(tokens + [model.tokenizer.pad_id] * (length - len(tokens)), np.int32)
    with jax.set_mesh(model.mesh):
      rows = sharding.place_rows(
        model.mesh, (token_L[None], (np.arange(length) < len(tokens))[None])
      )
      logprob_L, greedy_L = (
        x[0] for x in sharding.to_host(_log_probs(model.model, model.params, *rows))
      )
    span = slice(len(tokens) - len(after) - 1, len(tokens) - 1)
    results[index] = Scored(
      log_prob=float(np.sum(logprob_L[span], dtype=np.float64)),
      log_probs=tuple(map(float, logprob_L[span])),
      tokens=pieces(model.tokenizer, after),
      is_greedy=bool(greedy_L[span].all()),
      is_cut=len(tokens) < len(before) + len(after),
    )
    told(index, results[index])
  return [results[index] for index in range(len(ids))]


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
  """The text of each token alone; a control token has its name."""
  controls = tokenizer.chats.control_texts
  return tuple(controls[i] if i in controls else tokenizer.decode([i]) for i in ids)


def _bucket(length: int) -> int:
  return max(32, 1 << (length - 1).bit_length())


def generate(
  model: LanguageModel,
  requests: Sequence[Request],
  told: Callable[[int, str], None] = lambda index, result: None,
) -> list[str]:
  """The answer to each request, without the stop text at its end.

  An answer ends at a stop token of the tokenizer, before a stop text, or at its most tokens. A prompt that is too long
  to leave room for the answer loses its beginning. A sampled answer depends on its request alone.

  Args:
    model: a language model.
    requests: what to answer.
    told: called with the number of a request and its answer, as soon as it is known.
  Raises:
    UserError: a prompt is empty, or max_new_tokens leaves no room for it.
  """
  results = []
  for index, request in enumerate(requests):
    results.append(_answer(model, request))
    told(index, results[index])
  return results


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "temperature"))
def _generate(model, params, prompts, stop_ids, max_new_tokens, temperature):
  return sampling.generate(
    model,
    params,
    prompts,
    jax.random.key(0),
    max_new_tokens=max_new_tokens,
    stop_ids=stop_ids,
    temperature=temperature,
  )


def _answer(model: LanguageModel, request: Request) -> str:
  room = model.max_length - request.max_new_tokens
  ids = prompt_ids(model.tokenizer, request.prompt)[-room:] or [model.first_id]
  length = _bucket(len(ids))
  token_P = np.asarray([model.tokenizer.pad_id] * (length - len(ids)) + ids, np.int32)
  batch = tree_of(
    PromptBatch,
    token_BP=token_P[None],
    is_prompt_BP=token_P[None] != model.tokenizer.pad_id,
    index_B=np.asarray([row_number(request)], np.int32),
  )
  with jax.set_mesh(model.mesh):
    rollout = _generate(
      model.model,
      model.params,
      sharding.place_rows(model.mesh, batch),
      tuple(map(np.int32, model.tokenizer.stop_ids)),
      request.max_new_tokens,
      request.temperature,
    )
    tokens = sharding.to_host(rollout.token_BL)[0, length:].tolist()
  found = [i for i in tokens if i != model.tokenizer.pad_id]
  if found and found[-1] in model.tokenizer.stop_ids:
    found.pop()
  return cut(model.tokenizer.decode(found), request.stops)


def cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first of the stop texts."""
  places = [text.find(stop) for stop in stops if stop]
  return text[: min([place for place in places if place >= 0], default=len(text))]


def row_number(request: Request) -> int:
  """The number that a sampled answer's random numbers are drawn with, made of the prompt and the seed."""
  digest = hashlib.sha256(f"{request.seed}\n{request.prompt}".encode()).digest()
  return int.from_bytes(digest[:4], "big") >> 1


@functools.partial(jax.jit, static_argnames=("model", "skips"))
def _rewards(model, params, token_BL, is_token_BL, skips):
  return scoring.sequence_score(model, params, token_BL, is_token_BL, skips)


def rewards(
  model: LanguageModel,
  pairs: Sequence[tuple[str, str]],
  told: Callable[[int, float], None] = lambda index, result: None,
) -> list[float]:
  """A reward model's score of each answer, which is taken to have ended by itself.

  A pair that is too long loses the beginning of its prompt.

  Args:
    model: a reward model.
    pairs: (prompt, answer).
    told: called with the number of a pair and its score, as soon as it is known.
  Raises:
    UserError: an answer is longer than what the model reads at once.
  """
  results = []
  for index, (prompt, answer) in enumerate(pairs):
    ids = prompt_ids(model.tokenizer, prompt) + model.tokenizer.encode(answer)
    ids = [*ids, model.tokenizer.eos_id][-model.max_length :]
    length = _bucket(len(ids))
    token_L = np.asarray(ids + [model.tokenizer.pad_id] * (length - len(ids)), np.int32)
    with jax.set_mesh(model.mesh):
      rows = sharding.place_rows(model.mesh, (token_L[None], (np.arange(length) < len(ids))[None]))
      score = _rewards(model.model, model.params, *rows, model.score_skips)
      results.append(float(sharding.to_host(score)[0]))
    told(index, results[index])
  return results
