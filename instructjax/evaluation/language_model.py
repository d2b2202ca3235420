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
from typing import Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax.core.errors import UserError
from instructjax.core.stages import Head
from instructjax.core.structs import Params
from instructjax.data.tokenizer import Tokenizer, prompt_ids
from instructjax.evaluation import encoding, generation, scoring
from instructjax.evaluation.generation import Draw, Prompt
from instructjax.evaluation.planning import Text
from instructjax.models import execution, transformer
from instructjax.parallel import sharding
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

  @property
  def network(self) -> scoring.Network:
    return scoring.Network(self.model, self.params, self.mesh)


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
    top_p: tokens are drawn from the likeliest ones with this probability; 1 for all.
    seed: answers to one prompt with different seeds are different samples.
  """

  prompt: str
  stops: tuple[str, ...]
  max_new_tokens: int
  temperature: float = 0.0
  seed: int = 0
  top_p: float = 1.0


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
    UserError: it cannot be opened, is a reward model, dtype is none of these, or max_length is more than the network
      has.
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
  if dtype not in get_args(Dtype):
    raise UserError(f"dtype={dtype} must be one of {', '.join(get_args(Dtype))}")
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


def with_first_id(model: LanguageModel, first_id: int) -> LanguageModel:
  """The model with another token before a text that has nothing before it.

  Raises:
    UserError: the vocabulary has no such token.
  """
  if not 0 <= first_id < model.tokenizer.vocab_size:
    raise UserError(f"{model.name}: there is no token {first_id} to stand before a text")
  return dataclasses.replace(model, first_id=first_id)


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
    UserError: a continuation is empty, or longer than what the model reads at once; or the model gives no number.
  """
  return _scored(model, _pair_ids(model, pairs), told)


def texts_of(model: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[Text]:
  """What `log_probs` reads for pairs, for whoever plans or counts.

  Raises:
    UserError: as `log_probs`.
  """
  return [_text(model, *ids) for ids in _pair_ids(model, pairs)]


def _pair_ids(
  model: LanguageModel, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
  return [encoding.pair_ids(model.tokenizer, *pair, model.first_id) for pair in pairs]


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
  parts, owner, starts = [], [], []
  for number, text in enumerate(texts):
    ids = model.tokenizer.encode(text)
    if not ids:
      raise UserError(f"text {number + 1} of {len(texts)} to be scored is empty")
    starts.append(len(parts))
    parts += encoding.windows(ids, model.first_id, model.max_length)
    owner += [number] * (len(parts) - starts[-1])
  left = np.bincount(owner, minlength=len(texts))
  found: dict[int, Scored] = {}
  results: dict[int, Scored] = {}

  def part_told(index: int, result: Scored):
    found[index] = result
    number = owner[index]
    left[number] -= 1
    if left[number] == 0:
      stop = starts[number + 1] if number + 1 < len(starts) else len(parts)
      results[number] = _joined([found.pop(part) for part in range(starts[number], stop)])
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


def _scored(
  model: LanguageModel,
  pairs: Sequence[tuple[list[int], list[int]]],
  told: Callable[[int, Scored], None],
) -> list[Scored]:
  """Scores what comes after, given what comes before, both as ids."""
  texts = [_text(model, *pair) for pair in pairs]
  is_cut = [
    len(text.ids) + 1 < len(before) + len(after) for text, (before, after) in zip(texts, pairs)
  ]
  _say_cut(model, sum(is_cut), len(texts))
  results: dict[int, Scored] = {}
  for index, (logprob_T, likeliest_T) in scoring.read(model.network, texts):
    if np.isnan(logprob_T).any():
      raise UserError(
        f"{model.name}: the log-probability of a token is not a number: the model's weights may be damaged"
      )
    results[index] = Scored(
      log_prob=float(np.sum(logprob_T, dtype=np.float64)),
      log_probs=tuple(map(float, logprob_T)),
      tokens=pieces(model.tokenizer, texts[index].targets),
      is_greedy=bool(likeliest_T.all()),
      is_cut=is_cut[index],
    )
    told(index, results[index])
  return [results[index] for index in range(len(texts))]


def _text(model: LanguageModel, before: list[int], after: list[int]) -> Text:
  if len(after) > model.max_length:
    raise UserError(
      f"{model.name}: a continuation of {len(after)} tokens must not exceed the context of {model.max_length}"
    )
  # The last token is not read: nothing after it is asked for.
  ids = (before + after)[-(model.max_length + 1) : -1]
  return Text(tuple(ids), len(ids) - len(after), tuple(after))


def _say_cut(model: LanguageModel, count: int, total: int):
  if count:
    logger.warning(
      "%s: %d of %d texts are longer than the %d tokens that it reads at once, and lost their beginning",
      model.name,
      count,
      total,
      model.max_length,
    )


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
  """The text of each token alone; a control token has its name."""
  controls = tokenizer.chats.control_texts
  return tuple(controls[i] if i in controls else tokenizer.decode([i]) for i in ids)


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
    UserError: max_new_tokens leaves no room for a prompt.
  """
  results: dict[int, str] = {}
  alike: dict[Draw, list[int]] = {}
  prompts, num_cut = [], 0
  for index, request in enumerate(requests):
    room = model.max_length - request.max_new_tokens
    if not 1 <= request.max_new_tokens <= model.max_length - 1:
      raise UserError(
        f"{model.name}: max_new_tokens={request.max_new_tokens} must leave room for a prompt in the context of"
        f" {model.max_length} tokens, and be at least 1"
      )
    ids = prompt_ids(model.tokenizer, request.prompt) or [model.first_id]
    num_cut += len(ids) > room
    prompts.append(Prompt(tuple(ids[-room:]), request.stops, _row_number(request)))
    draw = Draw(request.max_new_tokens, float(request.temperature), float(request.top_p))
    alike.setdefault(draw, []).append(index)
  _say_cut(model, num_cut, len(prompts))
  for draw, own in alike.items():
    chosen = [prompts[index] for index in own]
    for number, answer in generation.answers(model.network, model.tokenizer, chosen, draw):
      results[own[number]] = answer
      told(own[number], answer)
  return [results[index] for index in range(len(requests))]


def _row_number(request: Request) -> int:
  """The number that a sampled answer's random numbers are drawn with, made of the prompt and the seed."""
  digest = hashlib.sha256(f"{request.seed}\n{request.prompt}".encode()).digest()
  return int.from_bytes(digest[:4], "big") >> 1


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
  texts, num_cut = [], 0
  for prompt, answer in pairs:
    after = [*model.tokenizer.encode(answer), model.tokenizer.eos_id]
    if len(after) > model.max_length:
      raise UserError(
        f"{model.name}: an answer of {len(after)} tokens must not exceed the context of {model.max_length}"
      )
    ids = prompt_ids(model.tokenizer, prompt) + after
    num_cut += len(ids) > model.max_length
    ids = ids[-model.max_length :]
    texts.append(Text(tuple(ids), _last_read(ids, model.score_skips), (0,)))
  _say_cut(model, num_cut, len(texts))
  results: dict[int, float] = {}
  for index, (score_T, _) in scoring.read(model.network, texts):
    results[index] = float(score_T[0])
    told(index, results[index])
  return [results[index] for index in range(len(texts))]


def _last_read(ids: Sequence[int], skips: int | None) -> int:
  """The column that the score is read at: the last one, or the last without a token that it skips."""
  read = [column for column, token in enumerate(ids) if token != skips]
  return read[-1] if read else 0
