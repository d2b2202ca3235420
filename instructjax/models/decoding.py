"""Decoding with a key/value cache: the whole prompt in one pass, then one token a step.

Called by rl/sampling.py, rl/slots.py and serve/speaker.py inside their compiled programs. The layers are those of
transformer.py. This module holds what a decode step does differently from a pass over a whole sequence: it has one
column, it reads keys and values from a cache, and on a mesh it has layouts of its own. Imports nothing of data, ops or
stages.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from instructjax.core.config import NetworkConfig
from instructjax.core.structs import Array, Params
from instructjax.models import adapters, embedding, layers, positions, transformer
from instructjax.models.transformer import Model
from instructjax.parallel import constraints


def decode_weights(model: Model, params: Params) -> Params:
  """A copy of the parameters for decoding: in the compute dtype, and as a list of layers if they are unrolled.

  `prefill` and `decode_step` take the copy in place of the parameters; so does `apply` without a mesh. Call this once,
  before the decode loop, so that no step casts or slices weights again. On a mesh, `execution.decode_layout` decides
  how the copy is split. In neither layout does a decode step gather weights. The tables are split by vocabulary over
  `tensor`, and lengthened for it by rows of zeros.

  Raises:
    ValueError: a layer's weight has a name that `layers.cast` does not know.
  """
  dtype = jnp.dtype(model.execution.dtype)
  weights = transformer.frozen_weights(model, transformer.arrange(model, params))
  # `frozen_weights` keeps the embedding in float32, so that positions are added before the sum is rounded. Decoding
  # accepts the extra rounding: the head reads a tied table whole at every step.
  weights["embedding"] = jax.tree.map(lambda w: w.astype(dtype), weights["embedding"])
  axes = adapters.base_axes(weights, transformer.param_axes(model))
  return constraints.place_for_decoding(weights, axes, model.execution.decode_layout)


def ring_length(model: Model, length: int) -> int | None:
  """Columns of the rings that `init_cache` can give banded layers, if others have `length`; None where it cannot.

  It can if the layers are scanned and the window is shorter than a row.
  """
  cfg = model.network
  is_banded = "L" in positions.layer_kinds(cfg) and 0 < cfg.attention_window < length
  return cfg.attention_window if model.execution.layers == "scan" and is_banded else None


def init_cache(model: Model, batch_size: int, length: int, band_length: int | None = None):
  """An empty key/value cache.

  Args:
    model: any head.
    batch_size: rows.
    length: columns, for the prompt and the response together.
    band_length: columns of the banded layers, where `ring_length` is not None. If they are `ring_length`, as few as
      these layers ever read, each new token takes the place of the one that has left the window. None: all layers have
      `length`.
  Returns:
    A pair (keys, values) of [N, B, G, S, K] if the layers are scanned, else a tuple with one pair of [B, G, S, K] for
    each layer. In the second case there are at least two rows. With `band_length` there is a tuple with a pair for each
    layer of a period of the pattern; N counts the periods that have the layer.
  """
  cfg = model.network
  if band_length is not None:
    kinds = positions.layer_kinds(cfg)
    return tuple(
      _empty(
        model,
        (len(range(index, cfg.num_layers, len(kinds))),),
        batch_size,
        band_length if kind == "L" else length,
      )
      for index, kind in enumerate(kinds)
    )
  stack = (cfg.num_layers,) if model.execution.layers == "scan" else ()
  if not stack:
    # XLA drops a dimension of size 1 from attention's products, and its CPU backend then copies the cache several times
    # a step. With a second row SmolLM2 takes half of the time for a step at 1,024 columns.
    batch_size = max(batch_size, 2)
  pair = functools.partial(_empty, model, stack, batch_size, length)
  return pair() if stack else tuple(pair() for _ in range(cfg.num_layers))


def _empty(model: Model, stack: tuple, batch_size: int, length: int) -> tuple:
  """(keys, values) of a layer, or of a stack of layers."""
  cfg = model.network
  shape = (*stack, batch_size, cfg.num_kv_heads, length, cfg.head_dim)
  empty = tuple(jnp.zeros(shape, model.execution.dtype) for _ in range(2))
  return constraints.shard_rows(empty, row_dim=len(stack), tensor_dim=len(stack) + 1)


def _by_kind(model: Model, kept):
  """Stacks of all layers, [N, ...], as a cache with `band_length` has them."""
  period = len(positions.layer_kinds(model.network))
  return tuple(jax.tree.map(lambda x, n=n: x[n::period], kept) for n in range(period))


def in_ring(prompt, length: int, end):
  """The newest columns of a prompt in the places of a ring in which column c is in place c modulo `length`.

  Args:
    prompt: keys or values, [..., P, K].
    length: places of the ring.
    end: number of the column after the prompt; an int or int32 scalar.
  Returns:
    [..., length, K]; places without a column are 0.
  """
  newest = prompt[..., -length:, :]
  fill = [(0, 0)] * (prompt.ndim - 2) + [(length - newest.shape[-2], 0), (0, 0)]
  return jnp.roll(jnp.pad(newest, fill), end % length, axis=-2)


def prefill(model: Model, weights: Params, token_BP: Array, is_prompt_BP: Array, cache):
  """Reads whole prompts, fills cache columns 0 .. P - 1 and predicts each row's first new token.

  Args:
    model: with an 'lm' head.
    weights: from `decode_weights`.
    token_BP: int32 prompts, padded on the left, so that every row's last column is a real token.
    is_prompt_BP: True on real tokens.
    cache: from `init_cache`, with at least P columns, rings excepted.
  Returns:
    (logits_BV of the token after the prompt, the filled cache). Where the vocabulary is split, the logits are split and
    lengthened as it is; those past the vocabulary are -inf.
  """
  segment_BP, position_BP = (
    is_prompt_BP.astype(jnp.int32),
    positions.from_mask(is_prompt_BP),
  )
  h_BPD, kept, _ = transformer.run_layers(
    model, weights, token_BP, segment_BP, position_BP, keep=True
  )

  # `kept` has the cache's structure but only P columns (and the true number of rows), so it is written at the origin.
  def write(old, new):
    if old.shape[-2] < new.shape[-2]:
      new = in_ring(new, old.shape[-2], new.shape[-2])
    return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

  is_by_kind = model.execution.layers == "scan" and isinstance(cache[0], tuple)
  cache = jax.tree.map(write, cache, _by_kind(model, kept) if is_by_kind else kept)
  return _logits(model, weights, h_BPD[:, -1:]), cache


def decode_step(
  model: Model,
  weights: Params,
  token_B: Array,
  position_B: Array,
  slot: Array,
  is_slot_BT: Array,
  cache,
  slot_position_BT: Array | None = None,
  *,
  num_columns: int | None = None,
  ring_step: Array | None = None,
):
  """Feeds one token of each row and returns the logits of the next.

  Args:
    model: with an 'lm' head.
    weights: from `decode_weights`.
    token_B: int32 ids. A row that has ended may feed a pad; its logits mean nothing.
    position_B: int32 positions of these tokens.
    slot: int32 scalar, the cache column that the tokens are written to. It is the same for all rows.
    is_slot_BT: True on the cache columns that hold a row's real tokens, `slot` included.
    cache: from `prefill` or from the step before. It is updated in place if it is donated or carried by a loop.
    slot_position_BT: int32 positions of the tokens in the cache columns. None if a row's tokens lie in the order of
      their positions.
    num_columns: the first columns of a stacked cache, all that can hold a token yet: attention reads no others.
    ring_step: int32 scalar, a number that counts the steps, for a cache with rings: the tokens are written to place
      `ring_step` modulo the ring's length. A row's earlier tokens must be in the places before it, without a gap.
  Returns:
    (logits_BV, cache), as from `prefill`.
  """
  position_B1 = position_B[:, None]
  is_token_B1 = jnp.ones_like(position_B1)  # one segment; `embed` itself finds pads, by their id
  step = _Step(
    model=model,
    weights=weights,
    slot=slot,
    angles=positions.rotary_angles(position_B1, model.network),
    masks=_masks(model.network, position_B1, is_slot_BT, slot_position_BT, num_columns, ring_step),
  )
  fed = token_B[:, None], is_token_B1, position_B1
  h_B1D, _, _ = embedding.embed(model, weights, *fed, step.place, decoding=True)
  if ring_step is not None:
    h_B1D, cache = _run_periods(step, ring_step, h_B1D, cache)
  elif model.execution.layers == "scan":
    h_B1D, cache = _run_stack(step, h_B1D, cache)
  else:
    h_B1D, cache = _run_unrolled(step, h_B1D, cache)
  return _logits(model, weights, h_B1D), cache


def _masks(
  cfg: NetworkConfig, position_B1, is_slot_BT, slot_position_BT, num_columns, ring_step
) -> tuple:
  """Columns of the cache that the new token may see, in dense and in banded layers; see `decode_step`."""
  # The cache holds no later token than the new one, so no causal mask is needed. Whole columns are asked for, because
  # what reads the tokens after the loop may split them, and the compiler would gather the mask in every layer.
  is_slot_BT = constraints.shard_rows(is_slot_BT)
  dense = is_slot_BT[:, None, :num_columns]
  if ring_step is not None:
    # A place's age: steps since its token was written. The row has no token older than its first.
    places = jnp.arange(cfg.attention_window)
    age_1W = ((ring_step - places) % cfg.attention_window)[None]
    return dense, (age_1W <= position_B1)[:, None, :]
  if slot_position_BT is None:
    slot_position_BT = positions.from_mask(is_slot_BT)
  return dense, layers.band(dense, position_B1, slot_position_BT[:, :num_columns], cfg)


@dataclasses.dataclass(frozen=True)
class _Step:
  """What the layers of a decode step share; the fields are those of `decode_step`, and what it has made of them."""

  model: Model
  weights: Params
  slot: Array
  angles: dict
  masks: tuple

  @property
  def kinds(self) -> str:
    """The kinds of layers, of one period of the pattern."""
    return positions.layer_kinds(self.model.network)

  @property
  def is_2d(self) -> bool:
    """Whether the weights stay split over fsdp and tensor, as in training, and all rows' activations move to them.

    In the other layout each device keeps its own rows. See docs/pods.md, "Two layouts for decoding".
    """
    return self.model.execution.decode_layout == "2d"

  def place(self, x):
    """Splits activations as the layout has them between layers."""
    return constraints.shard_width(x) if self.is_2d else constraints.shard_rows(x)

  def run_block(self, h_B1D, layer: Params, index, mix):
    """One layer: (its output, what `mix` returns as the cache)."""
    # The cache is split by rows in either layout, so attention must see a device's own rows again.
    if self.is_2d:
      mix = _mix_own_rows(mix)
    turn = positions.layer_angles(self.angles, self.kinds, index)
    h_B1D, kept = layers.block(h_B1D, layer, self.model.network, turn, mix, 0.0, None)  # no dropout
    return self.place(h_B1D), kept


def _run_unrolled(step: _Step, h_B1D, cache):
  """All layers, one after the other, of a cache that has a pair for each."""
  pairs = []
  for index, layer in enumerate(step.weights["layers"]):
    mask_BTS = positions.layer_mask(step.masks, step.kinds, index)
    mix = functools.partial(_mix_pair, cache[index], step.slot, mask_BTS)
    h_B1D, pair = step.run_block(h_B1D, layer, index, mix)
    pairs.append(pair)
  return h_B1D, tuple(pairs)


def _run_stack(step: _Step, h_B1D, cache):
  """All layers in a scan."""

  def body(carry, xs):
    # The cache is carried, not scanned over: an output of scan would be a new array of the cache's size.
    h_B1D, stacks = carry
    index, layer = xs
    mask_BTS = positions.layer_mask(step.masks, step.kinds, index)
    mix = functools.partial(_mix_stacked, index, stacks, step.slot, mask_BTS)
    return step.run_block(h_B1D, layer, index, mix), None

  xs = jnp.arange(step.model.network.num_layers), step.weights["layers"]
  return jax.lax.scan(body, (h_B1D, cache), xs)[0]


def _run_periods(step: _Step, ring_step: Array, h_B1D, cache):
  """All layers in a scan over periods of the pattern, of a cache whose banded layers are rings."""
  cfg, kinds = step.model.network, step.kinds

  def turn(h_B1D, stacks, number, length):
    """The first `length` layers of a period."""
    stacks = list(stacks)
    for index in range(length):
      place = ring_step % cfg.attention_window if kinds[index] == "L" else step.slot
      mask_BTS = positions.layer_mask(step.masks, kinds, index)
      # Each layer's weights are taken from the stack by themselves: those of a period at once would be copied.
      take = functools.partial(jax.lax.dynamic_index_in_dim, index=number * len(kinds) + index)
      layer = jax.tree.map(lambda x: take(x, keepdims=False), step.weights["layers"])  # noqa: B023
      mix = functools.partial(_mix_stacked, number, stacks[index], place, mask_BTS)
      h_B1D, stacks[index] = step.run_block(h_B1D, layer, index, mix)
    return h_B1D, tuple(stacks)

  def body(carry, number):
    return turn(carry[0], carry[1], number, len(kinds)), None

  periods, rest = divmod(cfg.num_layers, len(kinds))
  (h_B1D, cache), _ = jax.lax.scan(body, (h_B1D, cache), jnp.arange(periods))
  return turn(h_B1D, cache, periods, rest)


def _mix_pair(pair, slot, mask_BTS, q_BTGRK, *new_BTGK):
  """Attention of one layer after its new keys and values are written: (x_BTGRK, the pair)."""
  pair = tuple(
    jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2), (0, 0, slot, 0))
    for old, new in zip(pair, new_BTGK)
  )
  # The cache may have a row more than the batch: see `init_cache`.
  num_rows, cache_rows = len(q_BTGRK), len(pair[0])
  q_BTGRK = jnp.pad(q_BTGRK, ((0, cache_rows - num_rows), *[(0, 0)] * 4))
  mixed_BTGRK = layers.attend(q_BTGRK, *pair, mask_BTS=mask_BTS)
  return mixed_BTGRK[:num_rows], pair


def _mix_stacked(index, stacks, slot, mask_BTS, q_BTGRK, *new_BTGK):
  """As `_mix_pair`, of layer `index` of two stacks."""
  # XLA updates the whole stack in place. Taking a layer's cache out of the stack and putting it back would copy it.
  stacks = tuple(
    jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2)[None], (index, 0, 0, slot, 0))
    for old, new in zip(stacks, new_BTGK)
  )
  # One slice, of the layer and of the columns: of two, the first would be copied.
  length, (_, rows, groups, _, width) = mask_BTS.shape[-1], stacks[0].shape
  sizes = 1, rows, groups, length, width
  pair = (jax.lax.dynamic_slice(stack, (index, 0, 0, 0, 0), sizes)[0] for stack in stacks)
  return layers.attend(q_BTGRK, *pair, mask_BTS=mask_BTS), stacks


def _mix_own_rows(mix):
  """Wraps `mix` for layout '2d': attention over a device's own rows, between products that see all rows.

  Queries, keys and values come from products with weights that are split over fsdp, which take all rows. They are split
  by rows for attention, where the cache is, and the result is gathered for the next product.
  """

  def run(*qkv):
    mixed_BTGRK, kept = mix(*constraints.shard_rows(qkv, tensor_dim=2))
    return constraints.gather_rows(mixed_BTGRK), kept

  return run


def _logits(model, weights, h_B1D):
  """logits_BV of the only column."""
  h_B1D = transformer.final_norm(model, weights, h_B1D)
  logits_BV = transformer.apply_head(model, weights, h_B1D, decoding=True)[:, 0]
  if not constraints.splits_vocab():
    return constraints.shard_rows(logits_BV)
  is_token_V = jnp.arange(logits_BV.shape[1]) < model.vocab_size
  logits_BV = constraints.shard_rows(logits_BV, tensor_dim=1)
  return jnp.where(is_token_V[None], logits_BV, -jnp.inf)
