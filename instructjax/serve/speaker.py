"""A checkpoint loaded on one device, which answers prompts token by token or scores answers.

Called by dialogue.py. Imports no stage and no config of a run, and prints nothing.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax.core.errors import UserError
from instructjax.core.stages import Head
from instructjax.core.structs import Array, Params, pytree
from instructjax.data.tokenizer import Tokenizer, prompt_ids
from instructjax.models import decoding, transformer
from instructjax.rl import sampling, scoring
from instructjax.train.weights import Weights

_SHORTEST = 32  # prompt columns of the smallest compiled program
_UNFINISHED = "\ufffd"  # the character that bytes decode to while they are no whole character yet


@dataclasses.dataclass(frozen=True)
class Draw:
  """How the tokens of an answer are drawn."""

  temperature: float  # 0 is greedy
  top_p: float  # in (0, 1]; 1 is the whole distribution
  max_new_tokens: int  # EOS included


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer, and the time that it took."""

  text: str
  num_prompt_tokens: int
  num_tokens: int  # the stop token included
  ended: bool  # by a stop token, not by a limit
  prefill_seconds: float  # to the first token; no compilation
  decode_seconds: float  # for all the others


@pytree
class _State:
  """The state between two tokens of an answer, as a batch of one row."""

  token_B: Array  # the newest token, not yet fed
  step: Array  # number of the answer's tokens fed so far
  position_B: Array  # of token_B
  is_slot_BT: Array  # True on columns of the cache that hold a token
  cache: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Speaker:
  """A network with its weights and its tokenizer.

  Attributes:
    name: the path, as the user gave it.
    tokenizer: the tokenizer that belongs to the weights.
    model: the network.
    weights: the weights in the layout of `decoding.decode_weights`.
    score_skips: see `scoring.is_read`.
  """

  name: str
  tokenizer: Tokenizer
  model: transformer.Model
  weights: Params
  score_skips: int | None = None
  # Compiled programs by (prompt_length, draw). They are kept here, so that they and the weights go with the speaker.
  _programs: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

  def programs(self, prompt_length: int, draw: Draw) -> tuple[Callable, Callable]:
    """The compiled prefill and decode step for prompts padded to `prompt_length` tokens.

    They are compiled ahead, so that the times of an answer hold no compilation, and only once.
    """
    if (prompt_length, draw) not in self._programs:
      self._programs[prompt_length, draw] = self._compile(prompt_length, draw)
    return self._programs[prompt_length, draw]

  def _compile(self, prompt_length: int, draw: Draw) -> tuple[Callable, Callable]:
    token_BP = jax.ShapeDtypeStruct((1, prompt_length), jnp.int32)
    is_prompt_BP = jax.ShapeDtypeStruct((1, prompt_length), jnp.bool_)
    uniform_BR = jax.ShapeDtypeStruct((1, draw.max_new_tokens), jnp.float32)
    first = _first.lower(self.model, self.weights, token_BP, is_prompt_BP, uniform_BR, draw)
    state = first.out_info
    following = _next.lower(self.model, self.weights, state, uniform_BR, draw)
    return first.compile(), following.compile()


def make(name: str, opened: Weights, head: Head, mesh: Mesh) -> Speaker:
  """Loads opened weights onto the mesh.

  Args:
    name: the path, for messages and tables.
    opened: the weights.
    head: the kind of model that is wanted: 'lm' to answer, 'scalar' to score.
    mesh: a mesh of one device.
  Raises:
    UserError: the weights have the other kind of head, do not fit their architecture, or cannot be read.
  """
  if opened.head != head:
    is_wanted = {"lm": "a language model", "scalar": "a reward model"}
    raise UserError(f"{name} must be {is_wanted[head]}, and it is {is_wanted[opened.head]}")
  model = opened.model(mesh)
  params = opened.load(mesh, model)
  weights = jax.jit(functools.partial(decoding.decode_weights, model))(params)
  return Speaker(name, opened.tokenizer, model, weights, opened.score_skips)


def prompt_text(tokenizer: Tokenizer, messages: Sequence[Mapping], is_chat: bool) -> str:
  """The text that the network reads: the conversation in the chat template, or else the last message as it is.

  Raises:
    UserError: the template refuses the messages.
  """
  return tokenizer.chats.render_one(messages) if is_chat else messages[-1]["content"]


def answer(
  speaker: Speaker, prompt: str, key: Array, draw: Draw, on_text: Callable[[str], None]
) -> Answer:
  """Answers one prompt, with the tokens that `sampling.generate` draws for a batch of this prompt alone.

  Args:
    speaker: a language model.
    prompt: text; control tokens in it are recognised if a chat template made it.
    key: typed key of this answer.
    draw: how tokens are drawn.
    on_text: called with each piece of text as soon as it is certain; the pieces add up to the answer's text.
  Raises:
    UserError: the prompt is empty, or fills the context.
  """
  tokenizer = speaker.tokenizer
  ids = prompt_ids(tokenizer, prompt)
  room = speaker.model.network.max_length - len(ids)
  if not ids:
    raise UserError(f"{speaker.name}: the prompt must hold at least one token, got {prompt[:40]!r}")
  if room < 1:
    raise UserError(
      f"{speaker.name}: prompt of {len(ids)} tokens must be shorter than the context of"
      f" {speaker.model.network.max_length} tokens"
    )
  # The cache has a column for each token that is asked for, and there is no use for more than the context.
  draw = dataclasses.replace(
    draw, max_new_tokens=min(draw.max_new_tokens, speaker.model.network.max_length)
  )
  programs = speaker.programs(_padded_length(len(ids)), draw)
  uniform_BR = sampling.row_uniforms(key, jnp.arange(1), draw.max_new_tokens)
  jax.block_until_ready(uniform_BR)  # before the clock starts
  tokens, times = [], [time.perf_counter()]

  def noted_tokens():
    for token in _tokens(speaker, ids, uniform_BR, programs, min(room, draw.max_new_tokens)):
      tokens.append(token)
      times.append(time.perf_counter())
      if token not in tokenizer.stop_ids:  # which may be a word elsewhere
        yield token

  text = ""
  for piece in text_pieces(tokenizer, noted_tokens()):
    on_text(piece)
    text += piece
  return Answer(
    text=text,
    num_prompt_tokens=len(ids),
    num_tokens=len(tokens),
    ended=tokens[-1] in tokenizer.stop_ids,
    prefill_seconds=times[1] - times[0],
    decode_seconds=times[-1] - times[1],
  )


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
  """Decodes tokens into pieces of text, each yielded as soon as no later token can change it.

  A character may be spread over several tokens. Until the last of them has come, their bytes decode to U+FFFD, which is
  held back here.
  """
  seen, text, shown = [], "", 0
  for token in tokens:
    seen.append(token)
    text = tokenizer.decode(seen)  # all of them, since what a token adds depends on those before it
    certain = len(text.rstrip(_UNFINISHED))
    if certain > shown:
      yield text[shown:certain]
      shown = certain
  if text[shown:]:
    yield text[shown:]


def score(speaker: Speaker, prompt: str, answer: Answer) -> float:
  """The reward model's score of an answer.

  The answer's text is tokenized anew: the reward model may have another tokenizer than the model that wrote it.

  Raises:
    UserError: prompt and answer are longer than the context.
  """
  tokenizer, limit = speaker.tokenizer, speaker.model.network.max_length
  ids = prompt_ids(tokenizer, prompt) + tokenizer.encode(answer.text)
  ids += [tokenizer.eos_id] * answer.ended
  if len(ids) > limit:
    raise UserError(
      f"{speaker.name}: prompt and answer of {len(ids)} tokens must not exceed the context of {limit}"
    )
  token_BL, is_token_BL = _pad_left(ids, tokenizer.pad_id)
  weights, skips = speaker.weights, speaker.score_skips
  return float(_score(speaker.model, weights, token_BL, is_token_BL, skips)[0])


def _padded_length(num_tokens: int) -> int:
  """The next power of two, so that prompts of many lengths share a few compiled programs."""
  return max(_SHORTEST, 1 << (num_tokens - 1).bit_length())


def _pad_left(ids: list[int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
  num_pads = _padded_length(len(ids)) - len(ids)
  token_L = np.asarray([pad_id] * num_pads + ids, np.int32)
  return token_L[None], (np.arange(len(token_L)) >= num_pads)[None]


def _tokens(speaker, ids, uniform_BR: Array, programs, limit: int) -> Iterator[int]:
  """Yields the answer's tokens, the stop token included, each as soon as it is known."""
  first, following = programs
  state = first(speaker.weights, *_pad_left(ids, speaker.tokenizer.pad_id), uniform_BR)
  for step in range(limit):
    if step:
      state = following(speaker.weights, state, uniform_BR)
    token = int(state.token_B[0])
    yield token
    if token in speaker.tokenizer.stop_ids:
      return


def _draw(logits_BV: Array, uniform_B: Array, draw: Draw) -> Array:
  return sampling.sample_token(logits_BV, uniform_B, draw.temperature, draw.top_p)[0]


@functools.partial(jax.jit, static_argnames=("model", "draw"))
def _first(
  model: transformer.Model,
  weights: Params,
  token_BP: Array,
  is_prompt_BP: Array,
  uniform_BR: Array,
  draw,
) -> _State:
  """Reads the prompt and draws the first token."""
  pad_response = ((0, 0), (0, draw.max_new_tokens))
  is_slot_BT = jnp.pad(is_prompt_BP, pad_response)
  cache = decoding.init_cache(model, *is_slot_BT.shape)
  logits_BV, cache = decoding.prefill(model, weights, token_BP, is_prompt_BP, cache)
  return _State(
    token_B=_draw(logits_BV, uniform_BR[:, 0], draw),
    step=jnp.int32(0),
    position_B=jnp.sum(is_prompt_BP, axis=-1, dtype=jnp.int32),
    is_slot_BT=is_slot_BT,
    cache=cache,
  )


@functools.partial(jax.jit, static_argnames=("model", "draw"), donate_argnames="state")
def _next(
  model: transformer.Model, weights: Params, state: _State, uniform_BR: Array, draw
) -> _State:
  """Feeds the newest token and draws the one after it; the cache is updated in place."""
  # The cache has the padded prompt's columns first, then one for each new token.
  slot = state.is_slot_BT.shape[1] - draw.max_new_tokens + state.step
  is_slot_BT = state.is_slot_BT.at[:, slot].set(True)
  logits_BV, cache = decoding.decode_step(
    model, weights, state.token_B, state.position_B, slot, is_slot_BT, state.cache
  )
  step = state.step + 1
  uniform_B = jax.lax.dynamic_index_in_dim(uniform_BR, step, axis=1, keepdims=False)
  return _State(_draw(logits_BV, uniform_B, draw), step, state.position_B + 1, is_slot_BT, cache)


@functools.partial(jax.jit, static_argnames=("model", "skips"))
def _score(
  model: transformer.Model, params: Params, token_BL: Array, is_token_BL: Array, skips: int | None
):
  return scoring.sequence_score(model, params, token_BL, is_token_BL, skips)
