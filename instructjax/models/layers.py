"""The maths of one decoder layer: pure functions over a dict of that layer's weights.

Called by transformer.py and decoding.py. Knows no batches or stages, of meshes only which dimension of an array to
split (the helpers of constraints.py, which do nothing on one device), and never imports flax.

Two more dimension letters than structs.py has: R here is the query heads that share one key/value
head (R = H / G), and Q = R + 2 is what one fused projection yields for each key/value head: its R
queries, its key and its value. S counts the columns attended to, T the columns that ask.

Norms and activations are recomputed for the gradient instead of stored: what they would store is
a quarter of a step's memory, and fresh memory costs a CPU more than the recomputation.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from instructjax.core.config import NetworkConfig
from instructjax.parallel import constraints

# Weights of a layer, wherever they are nested, that are read as float32: those of norms. All others are read in the
# compute dtype, and their names start with w_ (a product's weights) or b_ (its biases).
FLOAT32 = frozenset({"scale_D", "bias_D"})
SAVED = "saved"  # name of what remat='products' keeps of a layer for its gradient
MASKED_SCORE = -1e30  # finite: a row with nothing to attend to must not become NaN


@functools.partial(jax.checkpoint, static_argnums=2)
def norm(x_BTD, weights: dict, cfg: NetworkConfig):
  """LayerNorm (with bias) or RMSNorm, computed in float32 and returned in x's dtype."""
  x32_BTD = x_BTD.astype(jnp.float32)
  if cfg.norm == "layernorm":
    x32_BTD = x32_BTD - x32_BTD.mean(axis=-1, keepdims=True)
  square_BT1 = jnp.square(x32_BTD).mean(axis=-1, keepdims=True)
  y_BTD = x32_BTD * jax.lax.rsqrt(square_BT1 + cfg.norm_eps) * weights["scale_D"][None, None, :]
  if cfg.norm == "layernorm":
    y_BTD = y_BTD + weights["bias_D"][None, None, :]
  return y_BTD.astype(x_BTD.dtype)


def rotary_angles(position_BT, cfg: NetworkConfig):
  """Cosine and sine of the rotary angles, float32 [B, T, K / 2], or None for learned positions."""
  if cfg.position != "rope":
    return None
  frequency_K = rotary_frequencies(cfg)
  angle_BTK = position_BT.astype(jnp.float32)[:, :, None] * frequency_K[None, None, :]
  return jnp.cos(angle_BTK), jnp.sin(angle_BTK)


def rotary_frequencies(cfg: NetworkConfig):
  """Radians a position by which each pair of dimensions turns, float32 [K / 2], scaling included.

  linear (Chen et al. 2023, arXiv:2306.15595) divides all by `factor`. llama3 (Llama 3.1, arXiv:
  2407.21783) keeps what turns more than `high_freq_factor` times within the original length, divides
  what turns fewer than `low_freq_factor` times, and interpolates linearly in between.
  """
  half = cfg.head_dim // 2
  frequency_K = cfg.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  scaling = cfg.rope_scaling
  if scaling.kind == "none":
    return frequency_K
  if scaling.kind == "linear":
    return frequency_K / scaling.factor
  turns_K = scaling.original_length * frequency_K / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept_K = jnp.clip((turns_K - low) / (high - low), 0.0, 1.0)
  return frequency_K * (kept_K + (1.0 - kept_K) / scaling.factor)


def rotate(x_BTGQK, angles):
  """Rotary positions, half-split: dimension i turns with dimension i + K / 2 (Llama, GPT-NeoX)."""
  cos, sin = (angle[:, :, None, None, :] for angle in angles)
  low, high = jnp.split(x_BTGQK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
  return turned.astype(x_BTGQK.dtype)


def product(x_BTD, w):
  """x times weights of shape [D, ...].

  As one matrix where no mesh splits it: for several dimensions XLA's CPU backend would compute the gradients in another
  order and copy them, and the weights. Joined, 2F would be gathered on a mesh.
  """
  if constraints.on_one_device():
    y = x_BTD.reshape(-1, w.shape[0]) @ w.reshape(w.shape[0], -1)
    return y.reshape(*x_BTD.shape[:2], *w.shape[1:])
  return jnp.tensordot(x_BTD, w, axes=1)


def project_qkv(x_BTD, weights: dict, angles):
  """One fused projection to q_BTGRK, k_BTGK, v_BTGK; queries and keys rotated where asked."""
  y_BTGQK = product(x_BTD, weights["w_qkv_DGQK"])
  if "b_qkv_GQK" in weights:
    y_BTGQK = y_BTGQK + weights["b_qkv_GQK"][None, None]
  y_BTGQK = constraints.split_products(y_BTGQK, tensor_dim=2)
  # Split, not sliced: the gradient of a split is one concatenation instead of padded sums.
  q_BTGRK, k_BTG1K, v_BTG1K = jax.lax.split(y_BTGQK, (y_BTGQK.shape[3] - 2, 1, 1), axis=3)
  if angles is not None:
    q_BTGRK, k_BTG1K = rotate(q_BTGRK, angles), rotate(k_BTG1K, angles)
  return q_BTGRK, k_BTG1K.squeeze(3), v_BTG1K.squeeze(3)


def attention_masks(segment_BL, position_BL, cfg: NetworkConfig):
  """(dense_BLL, banded_BLL): may row t look at column s? Same segment, not a pad, not later.

  GPT-3 alternates dense and locally banded layers (Brown et al. 2020, sec 2.1); the band is the
  `attention_window` newest positions, the token's own included. banded is None without a band.
  """
  length = segment_BL.shape[1]
  causal_LL = jnp.tril(jnp.ones((length, length), bool))
  same_BLL = segment_BL[:, :, None] == segment_BL[:, None, :]
  dense_BLL = same_BLL & (segment_BL > 0)[:, None, :] & causal_LL[None]
  return dense_BLL, band(dense_BLL, position_BL, position_BL, cfg)


def band(mask_BTS, query_position_BT, key_position_BS, cfg: NetworkConfig):
  """The mask of the banded layers from that of the dense ones; None when no layer is banded."""
  if not cfg.attention_window:
    return None
  distance_BTS = query_position_BT[:, :, None] - key_position_BS[:, None, :]
  return mask_BTS & (distance_BTS < cfg.attention_window)


def attend(q_BTGRK, k_BGSK, v_BGSK, mask_BTS):
  """Softmax attention, scores and softmax in float32; zero where a row may look at nothing."""
  B, T, G, R, K = q_BTGRK.shape
  # All queries of a key/value head as one dimension E, in the order that the scores have: in any other, XLA's CPU
  # products go through transposed copies, or through a slower kernel where a token at a time is decoded.
  q_BGEK = q_BTGRK.transpose(0, 2, 3, 1, 4).reshape(B, G, R * T, K)
  x_BGEK = _weighted_values(q_BGEK, k_BGSK, v_BGSK, mask_BTS)
  return x_BGEK.reshape(B, G, R, T, K).transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def _weighted_values(q_BGEK, k_BGSK, v_BGSK, mask_BTS):
  """`attend` with the queries as E, R * T. Its own gradient: one pass over the scores where XLA's takes four."""
  return _weighted_values_forward(q_BGEK, k_BGSK, v_BGSK, mask_BTS)[0]


def _weighted_values_forward(q_BGEK, k_BGSK, v_BGSK, mask_BTS):
  """(x_BGEK, what the gradient needs): values are summed by weights that are divided by their own sum afterwards."""
  B, G, E, K = q_BGEK.shape
  _, T, S = mask_BTS.shape
  score_BGES = jnp.einsum("BGEK,BGSK->BGES", q_BGEK, k_BGSK, preferred_element_type=jnp.float32)
  score_BGRTS = score_BGES.reshape(B, G, E // T, T, S) * K**-0.5
  score_BGRTS = jnp.where(mask_BTS[:, None, None], score_BGRTS, MASKED_SCORE)
  # Under the greatest, but above what is masked: where all is, every weight is 0 and so is their sum.
  top_BGRT1 = jnp.maximum(jnp.max(score_BGRTS, axis=-1, keepdims=True), MASKED_SCORE / 2)
  weight_BGES = jnp.exp(score_BGRTS - top_BGRT1).reshape(B, G, E, S)
  sum_BGE1 = jnp.sum(weight_BGES, axis=-1, keepdims=True)
  scale_BGE1 = 1 / jnp.where(sum_BGE1 > 0, sum_BGE1, 1.0)
  weight_BGES = weight_BGES.astype(v_BGSK.dtype)
  x_BGEK = jnp.einsum("BGES,BGSK->BGEK", weight_BGES, v_BGSK, preferred_element_type=jnp.float32)
  x_BGEK = checkpoint_name((x_BGEK * scale_BGE1).astype(v_BGSK.dtype), SAVED)
  return x_BGEK, (q_BGEK, k_BGSK, v_BGSK, weight_BGES, scale_BGE1, x_BGEK)


def _weighted_values_gradient(kept, dx_BGEK):
  """With p the probabilities: dv = p' dx and ds = p (dx v' - rowsum(dx x)), Dao et al. 2022 (arXiv:2205.14135), B.2."""
  q_BGEK, k_BGSK, v_BGSK, weight_BGES, scale_BGE1, x_BGEK = kept
  dx_BGEK = dx_BGEK * scale_BGE1
  mean_BGE1 = jnp.sum(dx_BGEK * x_BGEK, axis=-1, keepdims=True)
  dx_BGEK = dx_BGEK.astype(v_BGSK.dtype)
  dv_BGSK = jnp.einsum("BGES,BGEK->BGSK", weight_BGES, dx_BGEK)
  dp_BGES = jnp.einsum("BGEK,BGSK->BGES", dx_BGEK, v_BGSK, preferred_element_type=jnp.float32)
  ds_BGES = (weight_BGES * (dp_BGES - mean_BGE1)).astype(q_BGEK.dtype)
  factor = q_BGEK.shape[-1] ** -0.5
  dq_BGEK = jnp.einsum("BGES,BGSK->BGEK", ds_BGES, k_BGSK) * factor
  dk_BGSK = jnp.einsum("BGES,BGEK->BGSK", ds_BGES, q_BGEK * factor)
  return dq_BGEK, dk_BGSK, dv_BGSK, None


_weighted_values.defvjp(_weighted_values_forward, _weighted_values_gradient)


def project_out(x_BTGRK, weights: dict):
  """Heads back to the residual width."""
  w_GRKD = weights["w_out_GRKD"]
  # As one dimension: XLA would contract three of them in another order and, a token at a time on CPU,
  # copy all weights into it at each step, which doubles the time of a decode step.
  x_BTE = x_BTGRK.reshape(*x_BTGRK.shape[:2], -1)
  y_BTD = product(x_BTE, w_GRKD.reshape(-1, w_GRKD.shape[-1]))
  return _add_bias(constraints.scatter_columns(y_BTD), weights.get("b_out_D"))


def _add_bias(y_BTD, bias_D):
  """Also where there is none; its gradient sums the columns that a device has, not those it gathers."""
  return y_BTD if bias_D is None else constraints.split_columns(y_BTD + bias_D[None, None])


@jax.checkpoint
def _gelu(x_BTF):
  return jax.nn.gelu(x_BTF, approximate=True)


@jax.checkpoint
def _gated(x_BT2F):
  return jax.nn.silu(x_BT2F[:, :, 0]) * x_BT2F[:, :, 1]


def mlp(x_BTD, weights: dict, cfg: NetworkConfig):
  """tanh-GELU (GPT-2) or SwiGLU with gate and up fused (Llama)."""
  if cfg.mlp == "gelu":
    y_BTF = product(x_BTD, weights["w_up_DF"])
    if "b_up_F" in weights:
      y_BTF = y_BTF + weights["b_up_F"][None, None]
    y_BTF = constraints.split_products(y_BTF, tensor_dim=2)
    y_BTF = _gelu(checkpoint_name(y_BTF, SAVED))
  else:
    y_BT2F = product(x_BTD, weights["w_gate_up_D2F"])
    if "b_gate_up_2F" in weights:
      y_BT2F = y_BT2F + weights["b_gate_up_2F"][None, None]
    y_BT2F = constraints.split_products(y_BT2F, tensor_dim=3)
    y_BTF = _gated(checkpoint_name(y_BT2F, SAVED))
  y_BTD = product(y_BTF, weights["w_down_FD"])
  return _add_bias(constraints.scatter_columns(y_BTD), weights.get("b_down_D"))


def dropout(x_BTD, key, rate: float):
  """Inverted dropout; `key` None switches it off.

  Each element has 16 random bits of its own, two elements share a word: the rate is rounded to a multiple of 2 ** -16,
  what is kept is scaled by the rounded one, and the expectation is exact.
  """
  if key is None:
    return x_BTD
  kept = round((1.0 - rate) * 2**16)
  shape = (*x_BTD.shape[:2], (x_BTD.shape[2] + 1) // 2)
  word_BTE = jax.random.bits(key, shape)
  keep_BTD = jnp.concatenate([word_BTE & 0xFFFF < kept, word_BTE >> 16 < kept], axis=2)
  scale_BTD = jnp.where(keep_BTD[:, :, : x_BTD.shape[2]], 2**16 / kept, 0.0)
  return x_BTD * scale_BTD.astype(x_BTD.dtype)


def cast(weights: dict, dtype) -> dict:
  """A layer's weights in the compute dtype, but for those named in FLOAT32. Casting twice is free.

  Cast before a mesh gathers them, which halves what is sent; so a gradient is summed over devices in that dtype too,
  each device's part having been summed in float32 over its tokens. Masters and optimiser are float32.
  """

  def one(path, weight):
    name = path[-1].key
    if name in FLOAT32:
      return weight
    if not name.startswith(("w_", "b_")):
      raise ValueError(
        f"cast: {jax.tree_util.keystr(path)} must start with w_ or b_, or be in FLOAT32"
      )
    return weight.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, weights)


def block(h_BTD, weights: dict, cfg: NetworkConfig, angles, mix, dropout_rate: float, key):
  """One pre-norm decoder layer.

  Args:
    h_BTD: residual stream, in the compute dtype.
    weights: this layer's weights, float32 or already cast.
    cfg: the network's switches.
    angles: from `rotary_angles`.
    mix: (q_BTGRK, k_BTGK, v_BTGK) -> (x_BTGRK, kept): attention over whatever keys and values the
      caller has; `kept` is handed back (the cache, or nothing).
    dropout_rate: of both residual branches.
    key: typed key of this layer's dropout, or None for none.
  Returns:
    (h_BTD, kept)
  """
  weights = cast(weights, h_BTD.dtype)
  keys = (None, None) if key is None else jax.random.split(key)
  x_BTD = constraints.gather_columns(norm(h_BTD, weights["attention_norm"], cfg))
  q_BTGRK, k_BTGK, v_BTGK = checkpoint_name(project_qkv(x_BTD, weights["attention"], angles), SAVED)
  mixed_BTGRK, kept = mix(q_BTGRK, k_BTGK, v_BTGK)
  y_BTD = project_out(mixed_BTGRK, weights["attention"])
  h_BTD = h_BTD + dropout(y_BTD, keys[0], dropout_rate)
  h_BTD = checkpoint_name(h_BTD, SAVED)
  x_BTD = constraints.gather_columns(norm(h_BTD, weights["mlp_norm"], cfg))
  y_BTD = mlp(x_BTD, weights["mlp"], cfg)
  return h_BTD + dropout(y_BTD, keys[1], dropout_rate), kept
