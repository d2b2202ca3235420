"""Forward passes over rows that hold trees: texts that begin alike share the columns of what they have in common.

Called by evaluation/. A tree lies in depth-first order, so what may see a column is a span: those from it to the last
one below it. One number a column says where that is, and with it rows of several trees need no other mask. Before all
trees of a batch there may be a text that they share, of which only keys and values are kept.
"""

import functools

import jax
import jax.numpy as jnp

from instructjax.core.structs import Array, Params
from instructjax.models import embedding, layers, positions
from instructjax.models.transformer import Model

QUERIES = 512  # columns whose scores exist at once in long rows


def run(
  model: Model,
  params: Params,
  token_BL: Array,
  position_BL: Array,
  last_BL: Array,
  past=None,
  past_length: Array | int = 0,
):
  """All layers, before the final norm.

  Args:
    model: any head.
    params: as for `transformer.hidden`.
    token_BL: int32 ids.
    position_BL: int32; a column's depth in its tree, and with it the number of tokens of the past.
    last_BL: int32; the last column of the row that is below this one in its tree, itself if there is none; -1 at pads.
    past: keys and values of one row, as this function returns them; None for none.
    past_length: columns of the past that hold tokens, the first ones.
  Returns:
    (h_BLD, the (k_BGLK, v_BGLK) of every layer: stacked if the layers are scanned, else a tuple)
  """
  cfg, kinds = model.network, positions.layer_kinds(model.network)
  is_token_BL = (last_BL >= 0).astype(jnp.int32)
  h_BLD, _, _ = embedding.embed(model, params, token_BL, is_token_BL, position_BL)
  angles = positions.rotary_angles(position_BL, cfg)
  masks = _masks(position_BL, last_BL, _length(past), past_length, cfg)

  def run_block(h_BLD, layer, index, own_past):
    def mix(q_BTGRK, k_BTGK, v_BTGK):
      pair = k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)
      k_BGSK, v_BGSK = pair if own_past is None else map(_after, own_past, pair)
      mask_BTS = positions.layer_mask(masks, kinds, index)
      return _attend(q_BTGRK, k_BGSK, v_BGSK, mask_BTS), pair

    turn = positions.layer_angles(angles, kinds, index)
    return layers.block(h_BLD, layer, cfg, turn, mix, 0.0, None)  # no dropout

  if model.execution.layers == "scan":

    def body(h_BLD, xs):
      index, layer, own_past = xs
      return run_block(h_BLD, layer, index, own_past)

    stack = jnp.arange(cfg.num_layers), params["layers"], past
    return jax.lax.scan(body, h_BLD, stack)
  kept = []
  for index, layer in enumerate(params["layers"]):
    h_BLD, pair = run_block(h_BLD, layer, index, None if past is None else past[index])
    kept.append(pair)
  return h_BLD, tuple(kept)


def _length(past) -> int:
  return 0 if past is None else jax.tree.leaves(past)[0].shape[-2]


def _after(past_1GSK, own_BGLK):
  """A batch's keys or values after those of the past, which all rows share."""
  rows = (len(own_BGLK), *past_1GSK.shape[1:])
  return jnp.concatenate([jnp.broadcast_to(past_1GSK, rows), own_BGLK], axis=2)


def _masks(position_BL, last_BL, num_past: int, past_length, cfg):
  """(dense_BLS, banded_BLS or None) with S = past and own columns, as `layers.attention_masks` for whole rows."""
  dense = layers.tree_mask(last_BL)
  key_position_BS = position_BL
  if num_past:
    past_S = jnp.arange(num_past, dtype=jnp.int32)
    shape = (*last_BL.shape, num_past)
    is_past = jnp.broadcast_to((past_S < past_length)[None, None, :], shape)
    dense = jnp.concatenate([is_past, dense], axis=2)
    before = jnp.broadcast_to(past_S[None], (len(last_BL), num_past))
    key_position_BS = jnp.concatenate([before, position_BL], axis=1)
  return dense, layers.band(dense, position_BL, key_position_BS, cfg)


def _attend(q_BTGRK, k_BGSK, v_BGSK, mask_BTS):
  """`layers.attend`; in long rows for some queries at a time, so that the scores of all never exist."""
  length = q_BTGRK.shape[1]
  if length <= 2 * QUERIES or length % QUERIES:
    return layers.attend(q_BTGRK, k_BGSK, v_BGSK, mask_BTS)

  def split(x):
    return x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]).swapaxes(0, 1)

  some = functools.partial(layers.attend, k_BGSK=k_BGSK, v_BGSK=v_BGSK)
  x = jax.lax.map(lambda one: some(one[0], mask_BTS=one[1]), (split(q_BTGRK), split(mask_BTS)))
  return x.swapaxes(0, 1).reshape(q_BTGRK.shape)
