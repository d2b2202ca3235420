"""Decoding with a key/value cache: the whole prompt in one pass, then one token a step.

Called by rl/sampling.py, rl/slots.py and serve/speaker.py inside their compiled programs. The layers are those of
transformer.py. This module holds what a decode step does differently from a pass over a whole sequence: it has one
column, it reads keys and values from a cache, and on a mesh it has layouts of its own. Imports nothing of data, ops or
stages.
"""

import functools

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Params
from instructjax.models import adapters, layers, positions, transformer
from instructjax.models.transformer import Model
from instructjax.parallel import constraints


def decode_weights(model: Model, params: Params) -> Params:
  """A copy of the parameters for decoding: in the compute dtype, and as a list of layers if they are unrolled.

  `prefill`, `decode_step` and `apply` take the copy in place of the parameters. Call this once, before the decode loop,
  so that no step casts or slices weights again. On a mesh, `execution.decode_layout` decides how the copy is split. In
  neither layout does a decode step gather weights. The tables are split by vocabulary over `tensor`, and lengthened for
  it by rows of zeros.

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


def init_cache(model: Model, batch_size: int, length: int):
  """An empty key/value cache.

  Args:
    model: any head.
    batch_size: rows.
    length: columns, for the prompt and the response together.
  Returns:
    A pair (keys, values) of [N, B, G, S, K] if the layers are scanned, else a tuple with one pair of [B, G, S, K] for
    each layer. In the second case there are at least two rows.
  """
  cfg = model.network
  stack = (cfg.num_layers,) if model.execution.layers == "scan" else ()
  if not stack:
    # XLA drops a dimension of size 1 from attention's products, and its CPU backend then copies the cache several times
    # a step. With a second row SmolLM2 takes half of the time for a step at 1,024 columns.
    batch_size = max(batch_size, 2)
  shape = (*stack, batch_size, cfg.num_kv_heads, length, cfg.head_dim)

  def pair():
    empty = tuple(jnp.zeros(shape, model.execution.dtype) for _ in range(2))
    return constraints.shard_rows(empty, row_dim=len(stack), tensor_dim=len(stack) + 1)

  return pair() if stack else tuple(pair() for _ in range(cfg.num_layers))


def prefill(model: Model, weights: Params, token_BP: Array, is_prompt_BP: Array, cache):
  """Reads whole prompts, fills cache columns 0 .. P - 1 and predicts each row's first new token.

  Args:
    model: with an 'lm' head.
    weights: from `decode_weights`.
    token_BP: int32 prompts, padded on the left, so that every row's last column is a real token.
    is_prompt_BP: True on real tokens.
    cache: from `init_cache`, with at least P columns.
  Returns:
    (logits_BV of the token after the prompt, the filled cache). Where the vocabulary is split, the logits are split and
    lengthened as it is; those past the vocabulary are -inf.
  """
  segment_BP, position_BP = (
    is_prompt_BP.astype(jnp.int32),
    transformer.positions_from_mask(is_prompt_BP),
  )
  h_BPD, kept, _ = transformer.run_layers(
    model, weights, token_BP, segment_BP, position_BP, keep=True
  )
  # `kept` has the cache's structure but only P columns (and the true number of rows), so it is written at the origin.
  write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
  cache = jax.tree.map(write, cache, kept)
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
  Returns:
    (logits_BV, cache), as from `prefill`.
  """
  cfg = model.network
  position_B1 = position_B[:, None]
  # Layout '2d' leaves the weights split over fsdp and tensor, as in training, and moves the activations of all rows to
  # them. Layout 'tensor' keeps each device on its own rows. See docs/pods.md, "Two layouts for decoding".
  is_2d = model.execution.decode_layout == "2d"
  place = constraints.shard_width if is_2d else constraints.shard_rows
  is_token_B1 = jnp.ones_like(position_B1)  # one segment; `embed` itself finds pads, by their id
  h_B1D, _, _ = transformer.embed(model, weights, token_B[:, None], is_token_B1, position_B1, place)
  angles, kinds = positions.rotary_angles(position_B1, cfg), positions.layer_kinds(cfg)
  # The cache holds no later token than the new one, so no causal mask is needed. Whole columns are asked for, because
  # what reads the tokens after the loop may split them, and the compiler would gather the mask in every layer.
  is_slot_BT = constraints.shard_rows(is_slot_BT)
  dense = is_slot_BT[:, None, :]
  if slot_position_BT is None:
    slot_position_BT = transformer.positions_from_mask(is_slot_BT)
  masks = dense, layers.band(dense, position_B1, slot_position_BT, cfg)

  def mix_unrolled(index, pair, q_BTGRK, *new_BTGK):
    pair = tuple(
      jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2), (0, 0, slot, 0))
      for old, new in zip(pair, new_BTGK)
    )
    # The cache may have a row more than the batch: see `init_cache`.
    num_rows, cache_rows = len(q_BTGRK), len(pair[0])
    q_BTGRK = jnp.pad(q_BTGRK, ((0, cache_rows - num_rows), *[(0, 0)] * 4))
    mixed_BTGRK = layers.attend(
      q_BTGRK, *pair, mask_BTS=transformer.layer_mask(masks, kinds, index)
    )
    return mixed_BTGRK[:num_rows], pair

  def mix_stacked(index, stacks, q_BTGRK, *new_BTGK):
    # XLA updates the whole stack in place. Taking a layer's cache out of the stack and putting it back would copy it.
    stacks = tuple(
      jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2)[None], (index, 0, 0, slot, 0))
      for old, new in zip(stacks, new_BTGK)
    )
    pair = (jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in stacks)
    return layers.attend(
      q_BTGRK, *pair, mask_BTS=transformer.layer_mask(masks, kinds, index)
    ), stacks

  def run_block(h_B1D, layer, index, mix):
    # The cache is split by rows in either layout, so attention must see a device's own rows again.
    if is_2d:
      mix = _mix_own_rows(mix)
    turn = transformer.layer_angles(angles, kinds, index)
    h_B1D, kept = layers.block(h_B1D, layer, cfg, turn, mix, 0.0, None)  # no dropout
    return place(h_B1D), kept

  if model.execution.layers == "scan":

    def body(carry, xs):
      # The cache is carried, not scanned over: an output of scan would be a new array of the cache's size.
      h_B1D, stacks = carry
      index, layer = xs
      return run_block(h_B1D, layer, index, functools.partial(mix_stacked, index, stacks)), None

    xs = jnp.arange(cfg.num_layers), weights["layers"]
    (h_B1D, cache), _ = jax.lax.scan(body, (h_B1D, cache), xs)
  else:
    pairs = []
    for index, layer in enumerate(weights["layers"]):
      mix = functools.partial(mix_unrolled, index, cache[index])
      h_B1D, pair = run_block(h_B1D, layer, index, mix)
      pairs.append(pair)
    cache = tuple(pairs)
  return _logits(model, weights, h_B1D), cache


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
