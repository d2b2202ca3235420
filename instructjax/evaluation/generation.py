"""Answers to many prompts: prompts that begin alike are read once, and rows decode together until each has ended.

Called by language_model.py. Decoding comes back to the host every few tokens, which looks for the texts that end an
answer: they may be spread over tokens in many ways.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from instructjax.core.structs import Array, Params, pytree
from instructjax.data.tokenizer import Tokenizer
from instructjax.evaluation import planning, scoring
from instructjax.evaluation.planning import Tree
from instructjax.evaluation.scoring import Network
from instructjax.models import branches, decoding, transformer
from instructjax.ops import masked
from instructjax.parallel import distributed, sharding
from instructjax.rl import sampling

_STEPS = 16  # tokens between two looks at the texts
_ROWS = {"cpu": 32}  # decoded together on each row shard
_ROWS_ELSEWHERE = 128
_LEAST = 8  # prompts that what they share is read once for


@dataclasses.dataclass(frozen=True)
class Draw:
  """How answers are drawn; static in the programs."""

  max_new_tokens: int
  temperature: float
  top_p: float


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is answered.

  Attributes:
    ids: at least one token.
    stops: the texts that end the answer.
    row_number: what its random numbers are drawn with.
  """

  ids: tuple[int, ...]
  stops: tuple[str, ...]
  row_number: int


@pytree
class State:
  """Rows between two tokens.

  Attributes:
    token_B: the newest token, not yet fed.
    position_B: its position.
    ended_B: whether the row has ended.
    answer_BR: the tokens of the answers so far, pads after them.
    step: number of tokens that have been drawn.
    is_slot_BT: True on columns of the cache that hold a token.
    cache: see `decoding.init_cache`; the past's columns, the prompts', one for each token of the answers.
  """

  token_B: Array
  position_B: Array
  ended_B: Array
  answer_BR: Array
  step: Array
  is_slot_BT: Array
  cache: tuple


def cut(text: str, stops: Sequence[str]) -> str:
  """The text before the first of the stop texts."""
  places = [text.find(stop) for stop in stops if stop]
  return text[: min([place for place in places if place >= 0], default=len(text))]


def control_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> list[list[int]]:
  """The ids of those stop texts that hold control tokens, of which a decoded answer has none."""
  found = [tokenizer.encode_prompt(stop) for stop in stops if stop]
  return [ids for ids in found if not tokenizer.chats.control_texts.keys().isdisjoint(ids)]


def cut_ids(ids: list[int], stops: Sequence[list[int]]) -> list[int]:
  """The tokens before the first of the stops."""
  for start in range(len(ids)):
    if any(ids[start : start + len(stop)] == stop for stop in stops):
      return ids[:start]
  return ids


def answers(
  network: Network, tokenizer: Tokenizer, prompts: Sequence[Prompt], draw: Draw
) -> Iterator[tuple[int, str]]:
  """Answers prompts: (number of the prompt, its answer), in the order in which batches end.

  Raises:
    Preempted: the program was told to stop.
  """
  texts = [planning.Text(prompt.ids, len(prompt.ids) - 1, (0,)) for prompt in prompts]
  with jax.set_mesh(network.mesh):
    weights = _weights(_unrolled(network), network.params)
  rows = _ROWS.get(sharding.platform_of(network.mesh), _ROWS_ELSEWHERE) * network.shards
  for group in planning.groups(texts, is_tree=False, least=_LEAST):
    past = scoring.prefix(network, group)
    trees = sorted(group.trees, key=lambda tree: -tree.size)
    for start in range(0, len(trees), rows):
      distributed.require_going_on()
      own = trees[start : start + rows]
      yield from _batch(network, weights, tokenizer, prompts, own, past, draw)


def _unrolled(network: Network) -> transformer.Model:
  """The network as a decode step runs it fastest, see `execution.resolve_execution`."""
  layers = "unroll" if sharding.platform_of(network.mesh) == "cpu" else "scan"
  return network.model.clone(execution=dataclasses.replace(network.model.execution, layers=layers))


@functools.partial(jax.jit, static_argnames="model")
def _weights(model: transformer.Model, params: Params) -> Params:
  return decoding.decode_weights(model, params)


def _batch(network, weights, tokenizer, prompts, trees: Sequence[Tree], past, draw: Draw):
  owners = [tree.texts[0] for tree in trees]
  shards = network.shards
  count = shards * planning.bucket(-(-len(trees) // shards), least=1)
  length = planning.bucket(trees[0].size, least=32)
  token_BP = np.full((count, length), tokenizer.pad_id, np.int32)
  position_BP = np.zeros((count, length), np.int32)
  number_B = np.zeros(count, np.int32)
  for row, tree in enumerate(trees):
    token_BP[row, length - tree.size :] = tree.token_L
    position_BP[row, length - tree.size :] = tree.depth_L
    number_B[row] = prompts[owners[row]].row_number
  last_BP = np.where(token_BP == tokenizer.pad_id, -1, length - 1).astype(np.int32)
  model, stop_ids = _unrolled(network), tuple(map(np.int32, tokenizer.stop_ids))
  found: dict[int, str] = {}
  marks = [control_stops(tokenizer, prompts[owner].stops) for owner in owners]
  with jax.set_mesh(network.mesh):
    placed = sharding.place_rows(network.mesh, (token_BP, position_BP, last_BP, number_B))
    uniform_BR, state = _first(
      network.model, model, network.params, weights, *placed, *past, stop_ids, draw
    )
    while True:
      answer_BR, ended_B, step = sharding.to_host((state.answer_BR, state.ended_B, state.step))
      ended_B = ended_B.copy()
      for row, owner in enumerate(owners):
        if owner in found:
          continue
        ids = [int(token) for token in answer_BR[row, : int(step)] if token != tokenizer.pad_id]
        before = cut_ids(ids, marks[row])
        text = _text(tokenizer, before)
        shown = cut(text, prompts[owner].stops)
        is_cut = len(before) < len(ids) or shown != text
        if ended_B[row] or is_cut or step == draw.max_new_tokens:
          found[owner] = shown
          ended_B[row] = True
          yield owner, shown
      if len(found) == len(owners):
        return
      ended_B[len(owners) :] = True  # rows that only fill the batch
      state = dataclasses.replace(state, ended_B=sharding.place_rows(network.mesh, ended_B))
      limit = np.int32(min(int(step) + _STEPS, draw.max_new_tokens))
      state = _more(model, weights, state, uniform_BR, stop_ids, limit, draw)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
  has_end = ids and ids[-1] in tokenizer.stop_ids  # it may be a word elsewhere
  return tokenizer.decode(ids[:-1] if has_end else ids)


def _drawn(model, state: State, logits_BV, uniform_BR, stop_ids, draw: Draw) -> State:
  """The state with one more token of every row; rows that have ended get pads."""
  uniform_B = jax.lax.dynamic_index_in_dim(uniform_BR, state.step, axis=1, keepdims=False)
  token_B, _ = sampling.sample_token(logits_BV, uniform_B, draw.temperature, draw.top_p)
  shown_B = jnp.where(state.ended_B, model.vocab_size, token_B)
  return dataclasses.replace(
    state,
    token_B=token_B,
    ended_B=state.ended_B | masked.is_any(token_B, stop_ids),
    answer_BR=jax.lax.dynamic_update_index_in_dim(state.answer_BR, shown_B, state.step, axis=1),
    step=state.step + 1,
  )


@functools.partial(jax.jit, static_argnames=("reader", "model", "draw"))
def _first(
  reader: transformer.Model,
  model: transformer.Model,
  params: Params,
  weights: Params,
  token_BP: Array,
  position_BP: Array,
  last_BP: Array,
  number_B: Array,
  past,
  past_length: Array,
  stop_ids,
  draw: Draw,
):
  """Reads the prompts, and draws the first token of each answer: (uniform_BR, state)."""
  num_rows, length = token_BP.shape
  num_past = 0 if past is None else jax.tree.leaves(past)[0].shape[-2]
  uniform_BR = sampling.row_uniforms(jax.random.key(0), number_B, draw.max_new_tokens)
  h_BPD, kept = branches.run(reader, params, token_BP, position_BP, last_BP, past, past_length)
  # The last column of each row is the last token of its prompt.
  h_B1D = transformer.final_norm(reader, params, h_BPD[:, -1:])
  logits_BV = transformer.apply_head(reader, params, h_B1D)[:, 0]
  is_past_BS = jnp.broadcast_to((jnp.arange(num_past) < past_length)[None], (num_rows, num_past))
  is_slot_BT = jnp.concatenate([is_past_BS, last_BP >= 0], axis=1)
  state = State(
    token_B=jnp.zeros(num_rows, jnp.int32),
    position_B=position_BP[:, -1],
    ended_B=jnp.zeros(num_rows, bool),
    answer_BR=jnp.full((num_rows, draw.max_new_tokens), model.vocab_size, jnp.int32),
    step=jnp.int32(0),
    is_slot_BT=jnp.pad(is_slot_BT, ((0, 0), (0, draw.max_new_tokens))),
    cache=_cache(reader, model, kept, past, num_rows, num_past + length + draw.max_new_tokens),
  )
  return uniform_BR, _drawn(model, state, logits_BV, uniform_BR, stop_ids, draw)


def _cache(reader, model, kept, past, num_rows: int, length: int):
  """The cache of `model`, filled with what `reader` has kept of the past and of the prompts."""

  def layer_of(stack, index):
    if reader.execution.layers == "scan":
      return jax.tree.map(lambda x: x[index], stack)
    return stack[index]

  def write(old, new, column: int):
    new = jnp.broadcast_to(new, (*new.shape[:-4], num_rows, *new.shape[-3:]))
    start = (0,) * (old.ndim - 2) + (column, 0)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

  cache = decoding.init_cache(model, num_rows, length)
  column = 0
  for part in (past, kept):
    if part is None:
      continue
    if model.execution.layers != "scan":
      part = tuple(layer_of(part, index) for index in range(model.network.num_layers))
    cache = jax.tree.map(functools.partial(write, column=column), cache, part)
    column += jax.tree.leaves(part)[0].shape[-2]
  return cache


@functools.partial(jax.jit, static_argnames=("model", "draw"), donate_argnames="state")
def _more(
  model: transformer.Model,
  weights: Params,
  state: State,
  uniform_BR: Array,
  stop_ids,
  limit: Array,
  draw: Draw,
) -> State:
  """Decodes until `limit` tokens have been drawn, or every row has ended."""
  first_column = state.is_slot_BT.shape[1] - draw.max_new_tokens

  def goes_on(state: State):
    return (state.step < limit) & ~jnp.all(state.ended_B)

  def step(state: State) -> State:
    column = first_column + state.step - 1
    is_slot_BT = jax.lax.dynamic_update_index_in_dim(
      state.is_slot_BT, jnp.ones_like(state.ended_B), column, axis=1
    )
    position_B = state.position_B + 1
    logits_BV, cache = decoding.decode_step(
      model, weights, state.token_B, position_B, column, is_slot_BT, state.cache
    )
    state = dataclasses.replace(state, is_slot_BT=is_slot_BT, cache=cache, position_B=position_B)
    return _drawn(model, state, logits_BV, uniform_BR, stop_ids, draw)

  return jax.lax.while_loop(goes_on, step, state)
