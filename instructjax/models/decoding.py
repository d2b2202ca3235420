"""Decoding: the weights laid out for it, a cache of keys and values, a prompt at once and then a token a step.

Called by sampling, batching and speaker inside their programs. The layers are transformer.py's; here is what a step
does otherwise than a whole sequence: one column, keys and values from the cache, layouts of its own on a mesh. Imports
nothing of data, ops or stages.
"""

import functools

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Params
from instructjax.models import layers, transformer
from instructjax.models.transformer import Model
from instructjax.parallel import constraints


def decode_weights(model: Model, params: Params) -> Params:
  """Parameters as decoding wants them: in the compute dtype, and layer by layer where unrolled.

  `prefill`, `decode_step` and `apply` take the result in place of params. Call it once, before the
  decode loop, so that no step casts or slices weights again. On a mesh the copy is split as
  its execution's `decode_layout` says: in neither layout does a step gather weights.
  """
  dtype = jnp.dtype(model.execution.dtype)
  weights = transformer.frozen_weights(model, transformer.arrange(model, params))
  weights["embedding"] = jax.tree.map(lambda w: w.astype(dtype), weights["embedding"])
  return constraints.place_for_decoding(
    weights, transformer.param_axes(model), model.execution.decode_layout
  )


def init_cache(model: Model, batch_size: int, length: int):
  """An empty key/value cache of `length` columns: stacked for a scan, else one pair a layer.

  A pair has at least two rows: XLA drops a dimension of one from attention's products, and on CPU then copies the cache
  several times a step, which at 1,024 columns takes twice as long as all else.
  """
  cfg = model.network
  stack = (cfg.num_layers,) if model.execution.layers == "scan" else ()
  if not stack:
    batch_size = max(batch_size, 2)
  shape = (*stack, batch_size, cfg.num_kv_heads, length, cfg.head_dim)

  def pair():
    empty = tuple(jnp.zeros(shape, model.execution.dtype) for _ in range(2))
    return constraints.shard_rows(empty, row_dim=len(stack), tensor_dim=len(stack) + 1)

  return pair() if stack else tuple(pair() for _ in range(cfg.num_layers))


def prefill(model: Model, weights: Params, token_BP: Array, is_prompt_BP: Array, cache):
  """Runs left-padded prompts and fills cache columns 0 .. P - 1.

  Args:
    model: with an 'lm' head.
    weights: from `decode_weights`.
    token_BP: int32 prompts, left-padded so that the last column is real.
    is_prompt_BP: True on real tokens.
    cache: from `init_cache`, at least P columns.
  Returns:
    (logits_BV after the last column, cache)
  """
  segment_BP, position_BP = (
    is_prompt_BP.astype(jnp.int32),
    transformer.positions_from_mask(is_prompt_BP),
  )
  h_BPD, kept, _ = transformer.run_layers(
    model, weights, token_BP, segment_BP, position_BP, keep=True
  )
  # Columns come last but one in the cache, layers (when stacked) first: pad the start with zeros.
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
  """Feeds one token a row and gives the logits of the next.

  Args:
    model: with an 'lm' head.
    weights: from `decode_weights`.
    token_B: int32 ids; a pad is harmless.
    position_B: int32 positions of these tokens.
    slot: int32 scalar, the cache column they go to.
    is_slot_BT: True on cache columns that hold real tokens, these ones included.
    cache: from `prefill` or the step before; updated in place when donated or carried by a loop.
    slot_position_BT: int32 positions of the columns' tokens; None where they lie in order.
  Returns:
    (logits_BV, cache)
  """
  cfg = model.network
  position_B1 = position_B[:, None]
  is_2d = model.execution.decode_layout == "2d"
  place = constraints.shard_width if is_2d else constraints.shard_rows
  is_token_B1 = jnp.ones_like(position_B1)
  h_B1D, _, _ = transformer.embed(model, weights, token_B[:, None], is_token_B1, position_B1, place)
  angles = layers.rotary_angles(position_B1, cfg)
  dense = is_slot_BT[:, None, :]
  if slot_position_BT is None:
    slot_position_BT = transformer.positions_from_mask(is_slot_BT)
  masks = dense, layers.band(dense, position_B1, slot_position_BT, cfg)

  def mix_unrolled(index, pair, q_BTGRK, *new_BTGK):
    pair = tuple(
      jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2), (0, 0, slot, 0))
      for old, new in zip(pair, new_BTGK)
    )
    num_rows, cache_rows = len(q_BTGRK), len(pair[0])
    q_BTGRK = jnp.pad(q_BTGRK, ((0, cache_rows - num_rows), *[(0, 0)] * 4))
    mixed_BTGRK = layers.attend(q_BTGRK, *pair, mask_BTS=transformer.layer_mask(masks, index))
    return mixed_BTGRK[:num_rows], pair

  def mix_stacked(index, stacks, q_BTGRK, *new_BTGK):
    # One update of the whole stack is in place; taking a layer out and putting it back is not.
    stacks = tuple(
      jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2)[None], (index, 0, 0, slot, 0))
      for old, new in zip(stacks, new_BTGK)
    )
    pair = (jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in stacks)
    return layers.attend(q_BTGRK, *pair, mask_BTS=transformer.layer_mask(masks, index)), stacks

  def run_block(h_B1D, layer, mix):
    if is_2d:
      mix = _mix_own_rows(mix)
    h_B1D, kept = layers.block(h_B1D, layer, cfg, angles, mix, 0.0, None)
    return place(h_B1D), kept

  if model.execution.layers == "scan":

    def body(carry, xs):
      h_B1D, stacks = carry
      index, layer = xs
      return run_block(h_B1D, layer, functools.partial(mix_stacked, index, stacks)), None

    xs = jnp.arange(cfg.num_layers), weights["layers"]
    (h_B1D, cache), _ = jax.lax.scan(body, (h_B1D, cache), xs)
  else:
    pairs = []
    for index, layer in enumerate(weights["layers"]):
      h_B1D, pair = run_block(h_B1D, layer, functools.partial(mix_unrolled, index, cache[index]))
      pairs.append(pair)
    cache = tuple(pairs)
  return constraints.shard_rows(_logits(model, weights, h_B1D)), cache


def _mix_own_rows(mix):
  """Attention over a device's own rows, as the cache lies, between products with weights that see all rows."""

  def run(*qkv):
    mixed_BTGRK, kept = mix(*constraints.shard_rows(qkv, tensor_dim=2))
    return constraints.gather_rows(mixed_BTGRK), kept

  return run


def _logits(model, weights, h_B1D):
  h_B1D = transformer.final_norm(model, weights, h_B1D)
  return transformer.apply_head(model, weights, h_B1D, decoding=True)[:, 0]
