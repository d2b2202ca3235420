"""Positions of tokens: which kinds of layers a network has, how far rotary positions turn queries and keys in each.

Called by layers.py, transformer.py and what decodes, and by interop/, which reads and writes the settings. Dimension
letters as in layers.py.
"""

import functools
import math

import jax
import jax.numpy as jnp

from instructjax.core.config import NetworkConfig, RopeScalingConfig


def layer_kinds(cfg: NetworkConfig) -> str:
  """The kinds of a network's layers, one period of them: layer n is of kind `kinds[n % len(kinds)]`.

  Letters as for `layer_pattern`, without those that make no difference: local layers of an unlimited window are global
  ones, unless their positions turn at another speed.
  """
  kinds = cfg.layer_pattern
  if not cfg.attention_window and not cfg.rope_local_base:
    kinds = kinds.replace("L", "G")
  return shortest_pattern(kinds * cfg.num_layers, cfg.num_layers)


def shortest_pattern(kinds: str, num_layers: int) -> str:
  """The shortest pattern whose repetition gives the first `num_layers` letters of `kinds`."""
  kinds = kinds[:num_layers]
  lengths = range(1, num_layers + 1)
  return next(kinds[:n] for n in lengths if (kinds[:n] * num_layers)[:num_layers] == kinds)


def from_mask(is_token_BL):
  """Positions that count real tokens only, so that padding moves none (details item 3). int32."""
  is_token_BL = is_token_BL.astype(jnp.int32)
  return jnp.cumsum(is_token_BL, axis=1) - is_token_BL


def from_segments(segment_BL):
  """Positions inside each segment, counting real tokens only; segment 0 is padding. int32."""
  # The count at a column, less the count at its segment's first column. Counts never fall, so the running maximum over
  # first columns is that of the newest segment.
  before_BL = from_mask(segment_BL > 0)
  is_first_BL = jnp.diff(segment_BL, axis=1, prepend=0) != 0
  return before_BL - jax.lax.cummax(jnp.where(is_first_BL, before_BL, 0), axis=1)


def rotary_angles(position_BT, cfg: NetworkConfig):
  """Cosine and sine of the rotary angles of each kind of layer: kind -> (cos, sin), float32 [B, T, K / 2], or None.

  None stands for a kind without rotary positions: all, if positions are learned. K counts the dimensions that turn.
  """
  angles = dict.fromkeys(layer_kinds(cfg))
  if cfg.position != "rope":
    return angles
  is_local = {kind: kind == "L" and cfg.rope_local_base > 0 for kind in angles if kind != "N"}
  pairs = {
    own: _angles(position_BT, rotary_frequencies(cfg, own), attention_factor(cfg, own))
    for own in sorted({*is_local.values()})
  }
  return angles | {kind: pairs[own] for kind, own in is_local.items()}


def _angles(position_BT, frequency_K, factor: float):
  # In float32: bfloat16 has 8 significant bits, so it could not even tell positions 256 and 257 apart.
  angle_BTK = position_BT.astype(jnp.float32)[:, :, None] * frequency_K[None, None, :]
  if factor == 1:
    return jnp.cos(angle_BTK), jnp.sin(angle_BTK)
  return jnp.cos(angle_BTK) * factor, jnp.sin(angle_BTK) * factor


def attention_factor(cfg: NetworkConfig, is_local: bool = False) -> float:
  """What cosine and sine are multiplied by: 1, but for YaRN, eq. 22 of Peng et al. 2023, arXiv:2309.00071.

  Queries and keys both turn, so that attention's logits are multiplied by its square.
  """
  scaling = cfg.rope_scaling
  if scaling.kind != "yarn" or is_local:
    return 1.0
  return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotary_frequencies(cfg: NetworkConfig, is_local: bool = False):
  """Angle by which each pair of dimensions turns from one position to the next, in radians, float32 [K / 2].

  K counts the dimensions that turn. Scaling 'linear' (Chen et al. 2023, arXiv:2306.15595) divides every frequency by
  `factor`. 'llama3' (Llama 3.1, arXiv:2407.21783) looks at the number of turns that a pair makes within the original
  context. Above `high_freq_factor` turns it keeps the frequency, below `low_freq_factor` it divides it, and in between
  it interpolates. 'yarn' (Peng et al. 2023, arXiv:2309.00071) does the same but for what lies between: there it
  interpolates by the number of the pair, from a whole number to a whole number, as its authors' code does.

  Args:
    cfg: the network.
    is_local: whether for local layers with a base of their own, `rope_local_base`, which are not scaled.
  """
  half = (cfg.rotary_dim or cfg.head_dim) // 2
  base = cfg.rope_local_base if is_local else cfg.rope_base
  frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  scaling = cfg.rope_scaling
  if scaling.kind == "none" or is_local:
    return frequency_K
  if scaling.kind == "linear":
    return frequency_K / scaling.factor
  if scaling.kind == "yarn":
    kept_K = _kept_by_yarn(scaling, base, half)
  else:
    turns_K = scaling.original_length * frequency_K / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_K = jnp.clip((turns_K - low) / (high - low), 0.0, 1.0)
  return frequency_K * (kept_K + (1.0 - kept_K) / scaling.factor)


def _kept_by_yarn(scaling: RopeScalingConfig, base: float, half: int):
  """The share of each pair's frequency that YaRN keeps, float32 [half]: 1 up to a pair, 0 from a slower one on."""

  def pair_of(turns: float) -> float:
    """The pair that makes so many turns within the original context."""
    tokens_a_radian = math.log(scaling.original_length) - math.log(2 * math.pi) - math.log(turns)
    return half * tokens_a_radian / math.log(base)

  # The last bound is the dimension before the last, not the pair before: so in the authors' code.
  first = min(max(math.floor(pair_of(scaling.high_freq_factor)), 0), 2 * half)
  last = min(math.ceil(pair_of(scaling.low_freq_factor)), 2 * half - 1)
  width = float(last - first) or 1e-3
  return 1.0 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / width, 0.0, 1.0)


def rotate(x_BTGQK, angles):
  """Applies rotary positions: dimension i turns together with dimension i + K / 2, as in Llama and GPT-NeoX.

  K counts the dimensions that turn, which the angles tell; those after them stay as they are. llama.cpp stores its
  `llama` weights for the other convention, neighbouring dimensions: gguf_names.py permutes them.
  """
  cos, sin = (angle[:, :, None, None, :] for angle in angles)
  rotary_dim = 2 * cos.shape[-1]
  if rotary_dim < x_BTGQK.shape[-1]:
    rest_BTGQK = x_BTGQK[..., rotary_dim:]
    return jnp.concatenate([rotate(x_BTGQK[..., :rotary_dim], angles), rest_BTGQK], axis=-1)
  low, high = jnp.split(x_BTGQK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
  return turned.astype(x_BTGQK.dtype)


def layer_mask(masks, kinds: str, index):
  """Mask of a layer.

  Args:
    masks: (dense_BTS, banded_BTS or None).
    kinds: from `layer_kinds`.
    index: number of the layer, from 0; an int, or traced in decoding's scan.
  """
  dense_BTS, banded_BTS = masks
  if banded_BTS is None:
    return dense_BTS
  if isinstance(index, int):
    return banded_BTS if kinds[index % len(kinds)] == "L" else dense_BTS
  return jnp.where(_is_kind("L", kinds, index), banded_BTS, dense_BTS)


def layer_angles(angles, kinds: str, index):
  """Cosine and sine of a layer's positions; None if no layer has rotary positions.

  Args:
    angles: from `rotary_angles`.
    kinds, index: as for `layer_mask`.
  """
  if isinstance(index, int):
    return angles[kinds[index % len(kinds)]]
  first = next((pair for pair in angles.values() if pair is not None), None)
  if first is None:
    return None
  still = jnp.ones_like(first[0]), jnp.zeros_like(first[1])  # an angle of 0 changes no bit
  chosen = first
  for kind, pair in angles.items():
    if pair is not first:
      is_kind = _is_kind(kind, kinds, index)
      pair = still if pair is None else pair
      chosen = tuple(jnp.where(is_kind, one, other) for one, other in zip(pair, chosen))
  return chosen


def _is_kind(kind: str, kinds: str, index):
  """Whether a layer of a traced index is of this kind."""
  turn = index % len(kinds)
  return functools.reduce(jnp.logical_or, [turn == n for n, one in enumerate(kinds) if one == kind])
