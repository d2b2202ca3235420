"""The maths of one decoder layer: pure functions over a dict of that layer's weights.

Called by transformer.py and decoding.py. Knows no batches and no stages. Of meshes it knows only which dimension of an
array to split, through the helpers of constraints.py, which do nothing on one device. Never imports flax.

Dimension letters beside those of structs.py: G counts key/value heads and R the query heads that share one of them
(R = H / G). Q = R + 2 is what the fused projection yields for each key/value head: its R queries, its key and its
value. T counts the columns of the queries, S the columns of the keys.

Norms and activations are recomputed in the backward pass (`jax.checkpoint`) instead of stored. Storing them would take
a quarter of a step's memory, and on a CPU fresh memory costs more than computing them again.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from instructjax.core.config import NetworkConfig, RopeScalingConfig
from instructjax.core.structs import Array, pytree
from instructjax.parallel import constraints

# The weights of norms stay float32, wherever they are nested: a norm is computed in float32. So does the scale of an
# Int8. All others are used in the compute dtype. Their names start with w_ (a product's weights) or b_ (its biases).
FLOAT32 = frozenset({"scale_D", "bias_D", "scale_K", "scale"})
SAVED = "saved"  # checkpoint_name of the arrays that remat='products' keeps for the backward pass
# Score of a masked column. It is finite because with -inf a row in which every column is masked would become NaN.
MASKED_SCORE = -1e30


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("w_a", "w_b", "key_B"),
  meta_fields=("dropout_rate",),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """An addition to a weight: the product of two factors, of which the second holds the scale alpha / rank.

  Attributes:
    w_a: the weight's input dimensions, and the rank E.
    w_b: the rank E, and the weight's output dimensions.
    key_B: a typed key for each row, of the dropout before A; None for none.
    dropout_rate: static.
  """

  w_a: Array
  w_b: Array
  key_B: Array | None = None
  dropout_rate: float = 0.0


@pytree
class Int8:
  """A weight in 8 bits: whole numbers from -127 to 127, times a scale for each output.

  Attributes:
    values: int8, in the weight's shape.
    scale: float32, in the shape of the weight's output dimensions.
  """

  values: Array
  scale: Array

  @property
  def shape(self) -> tuple[int, ...]:
    """The weight's."""
    return self.values.shape


def quantised(w: Array, inputs: int) -> Int8:
  """A weight rounded to 8 bits, each output by its own largest number.

  Args:
    w: float weight.
    inputs: how many of its first dimensions are contracted.
  """
  axes = tuple(range(inputs))
  largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.0).astype(jnp.float32) / 127
  return Int8(jnp.round(w / scale).astype(jnp.int8), scale.squeeze(axes))


def low_rank_name(weight: str) -> str:
  """Where a layer's dict has the addition to a weight, if the network is adapted."""
  return f"low_rank/{weight}"


def weight_name(low_rank: str) -> str:
  """The weight that an addition belongs to."""
  return low_rank.partition("/")[2]


def _norm(x_BTD, weights: dict, cfg: NetworkConfig):
  """LayerNorm (with bias) or RMSNorm, computed in float32 and returned in x's dtype."""
  # A mean of many squares would be too coarse in bfloat16, which has 8 significant bits.
  x32_BTD = x_BTD.astype(jnp.float32)
  if cfg.norm == "layernorm":
    x32_BTD = x32_BTD - x32_BTD.mean(axis=-1, keepdims=True)
  square_BT1 = jnp.square(x32_BTD).mean(axis=-1, keepdims=True)
  scale_D = _scale(weights["scale_D"], cfg)
  y_BTD = x32_BTD * jax.lax.rsqrt(square_BT1 + cfg.norm_eps) * scale_D[None, None, :]
  if cfg.norm == "layernorm":
    y_BTD = y_BTD + weights["bias_D"][None, None, :]
  return y_BTD.astype(x_BTD.dtype)


norm = jax.checkpoint(_norm, static_argnums=2)


@functools.partial(jax.checkpoint, static_argnums=2)
def _head_norm(x_BTGQK, weights: dict, cfg: NetworkConfig):
  """RMSNorm of each head by itself (`qk_norm`); its weights are shared by all heads."""
  x32_BTGQK = x_BTGQK.astype(jnp.float32)
  square_BTGQ1 = jnp.square(x32_BTGQK).mean(axis=-1, keepdims=True)
  y_BTGQK = x32_BTGQK * jax.lax.rsqrt(square_BTGQ1 + cfg.norm_eps)
  return (y_BTGQK * _scale(weights["scale_K"], cfg)[None, None, None, None]).astype(x_BTGQK.dtype)


def _scale(weight, cfg: NetworkConfig):
  """What a norm multiplies by: its weights, or 1 + w for Gemma, which stores them around 0."""
  return 1.0 + weight if cfg.norm == "rmsnorm_1p" else weight


# --- positions --------------------------------------------------------------------------------------


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


# --- attention --------------------------------------------------------------------------------------


def product(x_BTD, w):
  """x_BTD times weights of shape [D, ...]."""
  if isinstance(w, Int8):
    y = product(x_BTD, w.values.astype(x_BTD.dtype))
    return (y.astype(jnp.float32) * w.scale[None, None]).astype(x_BTD.dtype)
  # On one device as a product of two matrices: with more dimensions XLA's CPU backend computes the gradients in another
  # order, and copies them and the weights. On a mesh the dimensions stay apart: a joined one (2F, say) could not stay
  # split over `tensor`, and would be gathered.
  if constraints.on_one_device():
    y = x_BTD.reshape(-1, w.shape[0]) @ w.reshape(w.shape[0], -1)
    return y.reshape(*x_BTD.shape[:2], *w.shape[1:])
  return jnp.tensordot(x_BTD, w, axes=1)


@jax.custom_vjp
def _factor_product(x_BTD, w):
  """`product` with a factor of an adapter, whose gradient is computed before that of x.

  XLA puts off the gradients of all layers' factors to the end, and keeps what they are made of until then: for a
  network of 30 layers more than a half of the memory of a step.
  """
  return product(x_BTD, w)


def _factor_gradient(kept, dy):
  dx_BTD, dw = jax.vjp(product, *kept)[1](dy)
  if constraints.on_one_device():
    dx_BTD = dx_BTD + _zero(dw).astype(dx_BTD.dtype)
  return dx_BTD, dw


_factor_product.defvjp(lambda x_BTD, w: (product(x_BTD, w), (x_BTD, w)), _factor_gradient)


def narrow(x_BTD, pair: LowRank | None):
  """x A, the narrow half of an adapter's product with x; None without an adapter."""
  if pair is None:
    return None
  x_BTD = dropout(x_BTD, pair.key_B, pair.dropout_rate)
  # Needed whole by every device that holds a part of B's columns.
  z_BTE = _factor_product(x_BTD, pair.w_a.reshape(-1, pair.w_a.shape[-1]))
  # A single column belongs to a decode step, which has a layout of its own.
  return z_BTE if z_BTE.shape[1] == 1 else constraints.shard_rows(z_BTE)


def widen(y, z_BTE, pair: LowRank | None, place=lambda y: y):
  """y, the product of x with a weight, and to it z B, with z from `narrow`; y itself without an adapter.

  Args:
    y: in the layout that `place` gives it.
    z_BTE, pair: of the weight.
    place: layout of the result on a mesh.
  """
  return y if pair is None else y + place(_factor_product(z_BTE, pair.w_b))


def _low_rank(weights: dict, name: str) -> LowRank | None:
  """The addition to a weight of a block, if the network is adapted."""
  return weights.get(low_rank_name(name))


def _recomputed(function, *args):
  """Calls a function of which the backward pass keeps the arguments only, and calls it again.

  On one device that happens no sooner than the gradient of its result is there. `jax.checkpoint` alone does not see to
  it: XLA's CPU backend then computes it early for many layers, and keeps the results. On a mesh it is `jax.checkpoint`.
  """
  if not constraints.on_one_device():
    return jax.checkpoint(function)(*args)

  def gradient(kept, d_result):
    zero = _zero(jax.tree.leaves(d_result)[-1])  # z, which A's gradient needs anyway
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    late = jax.tree.map(lambda x: x + zero.astype(x.dtype) if is_float(x) else x, kept)
    return jax.vjp(function, *late)[1](d_result)

  run = jax.custom_vjp(function)
  run.defvjp(lambda *args: (function(*args), args), gradient)
  return run(*args)


def _zero(x):
  """0 times a number of x, for which XLA must have computed x, since it could be NaN."""
  return 0 * x[(0,) * x.ndim]


def _read(h_BTD, norm_weights: dict, pair: LowRank | None, cfg: NetworkConfig):
  """What a branch reads of the residual stream: (its norm, with all columns; that times A, or None)."""
  # A frozen weight has no gradient, so nothing but A's gradient needs the norm again, and that computes it anew. Not so
  # on a mesh, where its columns would have to be gathered again.
  if pair is not None and constraints.on_one_device():

    def norm_and_narrow(h_BTD, norm_weights, pair):
      x_BTD = _norm(h_BTD, norm_weights, cfg)
      return x_BTD, narrow(x_BTD, pair)

    return _recomputed(norm_and_narrow, h_BTD, norm_weights, pair)
  # On a mesh, columns are split over `tensor` between products, and gathered for a product (see constraints.py).
  x_BTD = constraints.gather_columns(norm(h_BTD, norm_weights, cfg))
  return x_BTD, narrow(x_BTD, pair)


def project_qkv(x_BTD, z_BTE, weights: dict, cfg: NetworkConfig, angles):
  """Queries, keys and values by one fused projection of what `_read` returns: (q_BTGRK, k_BTGK, v_BTGK).

  The projection is fused per key/value head, so splitting G over `tensor` keeps each head's queries, key and value on
  one device. Queries and keys are normalised if the network says so, and rotated unless `angles` is None.
  """
  y_BTGQK = product(x_BTD, weights["w_qkv_DGQK"])
  y_BTGQK = widen(y_BTGQK, z_BTE, _low_rank(weights, "w_qkv_DGQK"))
  if "b_qkv_GQK" in weights:
    y_BTGQK = y_BTGQK + weights["b_qkv_GQK"][None, None]
  y_BTGQK = constraints.split_products(y_BTGQK, tensor_dim=2)
  # Split, not sliced: the gradient of a split is one concatenation, that of three slices a sum of three padded arrays.
  sizes = y_BTGQK.shape[3] - 2, 1, 1
  if cfg.qk_norm:
    # remat='products' keeps the product, which the norms' gradient needs too; norms and rotation are computed again.
    y_BTGQK = checkpoint_name(y_BTGQK, SAVED)
    q_BTGRK, k_BTG1K, v_BTG1K = jax.lax.split(y_BTGQK, sizes, axis=3)
    q_BTGRK = _head_norm(q_BTGRK, weights["q_norm"], cfg)
    k_BTG1K = _head_norm(k_BTG1K, weights["k_norm"], cfg)
  else:
    q_BTGRK, k_BTG1K, v_BTG1K = jax.lax.split(y_BTGQK, sizes, axis=3)
  if cfg.query_pre_attn_scalar:
    # `attend` divides scores by sqrt(head_dim).
    factor = (cfg.head_dim / cfg.query_pre_attn_scalar) ** 0.5
    q_BTGRK = (q_BTGRK.astype(jnp.float32) * factor).astype(q_BTGRK.dtype)
  if angles is not None:
    q_BTGRK, k_BTG1K = rotate(q_BTGRK, angles), rotate(k_BTG1K, angles)
  qkv = q_BTGRK, k_BTG1K.squeeze(3), v_BTG1K.squeeze(3)
  return qkv if cfg.qk_norm else checkpoint_name(qkv, SAVED)


def attention_masks(segment_BL, position_BL, cfg: NetworkConfig):
  """Attention masks of dense and of banded layers: True where column t (first) may attend to column s (second).

  A column attends to columns of its own segment that are not pads and not later. GPT-3 alternates dense and locally
  banded layers (Brown et al. 2020, sec 2.1), and Gemma 3 has five banded ones before each dense one. In a banded layer
  a token sees only the `attention_window` newest positions, its own included.

  Returns:
    (dense_BLL, banded_BLL); banded_BLL is None if the network has no banded layers.
  """
  length = segment_BL.shape[1]
  causal_LL = jnp.tril(jnp.ones((length, length), bool))
  same_BLL = segment_BL[:, :, None] == segment_BL[:, None, :]
  dense_BLL = same_BLL & (segment_BL > 0)[:, None, :] & causal_LL[None]
  return dense_BLL, band(dense_BLL, position_BL, position_BL, cfg)


def band(mask_BTS, query_position_BT, key_position_BS, cfg: NetworkConfig):
  """The mask of the banded layers, from that of the dense ones; None if the network has no banded layers."""
  if not cfg.attention_window or "L" not in layer_kinds(cfg):
    return None
  distance_BTS = query_position_BT[:, :, None] - key_position_BS[:, None, :]
  return mask_BTS & (distance_BTS < cfg.attention_window)


def attend(q_BTGRK, k_BGSK, v_BGSK, mask_BTS):
  """Grouped-query softmax attention, with scores and softmax in float32.

  Args:
    q_BTGRK: queries, not yet scaled.
    k_BGSK, v_BGSK: keys and values, of whole sequences or of a cache.
    mask_BTS: True where a query may attend to a key.
  Returns:
    x_BTGRK in the values' dtype; zero for a query whose columns are all masked.
  """
  B, T, G, R, K = q_BTGRK.shape
  # All queries of a key/value head become one dimension E, in the order of the scores. In any other order XLA's CPU
  # products copy transposed arrays, and for one token at a time take a kernel that is half as fast.
  q_BGEK = q_BTGRK.transpose(0, 2, 3, 1, 4).reshape(B, G, R * T, K)
  x_BGEK = _weighted_values(q_BGEK, k_BGSK, v_BGSK, mask_BTS)
  return x_BGEK.reshape(B, G, R, T, K).transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def _weighted_values(q_BGEK, k_BGSK, v_BGSK, mask_BTS):
  """`attend` with the queries joined to one dimension E = R * T.

  The gradient is written by hand because it takes one pass over the scores, where the one by autodiff takes four.
  """
  return _weighted_values_forward(q_BGEK, k_BGSK, v_BGSK, mask_BTS)[0]


def _weighted_values_forward(q_BGEK, k_BGSK, v_BGSK, mask_BTS):
  """Returns (x_BGEK, residuals).

  The softmax is not normalised before the product with the values. Dividing the result by the sum of the weights gives
  the same, on an array of [E, K] in place of [E, S].
  """
  B, G, E, K = q_BGEK.shape
  _, T, S = mask_BTS.shape
  score_BGES = jnp.einsum("BGEK,BGSK->BGES", q_BGEK, k_BGSK, preferred_element_type=jnp.float32)
  score_BGRTS = score_BGES.reshape(B, G, E // T, T, S) * K**-0.5
  score_BGRTS = jnp.where(mask_BTS[:, None, None], score_BGRTS, MASKED_SCORE)
  # The maximum is subtracted so that exp cannot overflow. It is held above MASKED_SCORE: if every column is masked, the
  # weights are exp(-5e29) = 0 and so is their sum. Subtracting the true maximum would make them exp(0) = 1.
  top_BGRT1 = jnp.maximum(jnp.max(score_BGRTS, axis=-1, keepdims=True), MASKED_SCORE / 2)
  weight_BGES = jnp.exp(score_BGRTS - top_BGRT1).reshape(B, G, E, S)
  sum_BGE1 = jnp.sum(weight_BGES, axis=-1, keepdims=True)
  scale_BGE1 = 1 / jnp.where(sum_BGE1 > 0, sum_BGE1, 1.0)
  # Summed in float32 above, and only then rounded for the product.
  weight_BGES = weight_BGES.astype(v_BGSK.dtype)
  x_BGEK = jnp.einsum("BGES,BGSK->BGEK", weight_BGES, v_BGSK, preferred_element_type=jnp.float32)
  x_BGEK = checkpoint_name((x_BGEK * scale_BGE1).astype(v_BGSK.dtype), SAVED)
  return x_BGEK, (q_BGEK, k_BGSK, v_BGSK, weight_BGES, scale_BGE1, x_BGEK)


def _weighted_values_gradient(kept, dx_BGEK):
  """With probabilities p: dv = p' dx, ds = p (dx v' - rowsum(dx x)); Dao et al. 2022, arXiv:2205.14135, B.2."""
  q_BGEK, k_BGSK, v_BGSK, weight_BGES, scale_BGE1, x_BGEK = kept
  # p is weight * scale. Scaling dx once puts the factor into every term below, and p itself is never formed. The mask
  # is not needed again: a masked weight is 0, and so is its ds.
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
  """The output projection: from the heads back to the residual width."""
  w_GRKD = weights["w_out_GRKD"]
  # G, R and K become one dimension. XLA would contract the three in another order. On a CPU that copies all weights
  # into this order at each decode step, which doubles its time.
  x_BTE = x_BTGRK.reshape(*x_BTGRK.shape[:2], -1)
  y_BTD = product(x_BTE, _join_inputs(w_GRKD))
  y_BTD = constraints.scatter_columns(y_BTD)
  pair = _low_rank(weights, "w_out_GRKD")
  y_BTD = widen(y_BTD, narrow(x_BTE, pair), pair, constraints.split_columns)
  return _add_bias(y_BTD, weights.get("b_out_D"))


def _join_inputs(w):
  """A weight of the heads' outputs as a matrix: all dimensions but the last become one."""
  join = lambda x: x.reshape(-1, x.shape[-1])
  return Int8(join(w.values), w.scale) if isinstance(w, Int8) else join(w)


def _add_bias(y_BTD, bias_D):
  """Adds the bias, if there is one, to columns that are split over `tensor`.

  The constraint makes the bias's gradient a sum over a device's own columns, instead of one over gathered columns.
  """
  return y_BTD if bias_D is None else constraints.split_columns(y_BTD + bias_D[None, None])


def _gelu(x_BTF, approximate: bool):
  return jax.nn.gelu(x_BTF, approximate=approximate)


def _gated(x_BT2F, activation):
  return activation(x_BT2F[:, :, 0]) * x_BT2F[:, :, 1]


# The hidden units of the MLP, by NetworkConfig.mlp, from the product with `up`, or with gate and up.
_ACTIVATIONS = {
  "gelu": functools.partial(_gelu, approximate=True),
  "gelu_exact": functools.partial(_gelu, approximate=False),
  "swiglu": functools.partial(_gated, activation=jax.nn.silu),
  "geglu": functools.partial(_gated, activation=functools.partial(jax.nn.gelu, approximate=True)),
}


def _hidden_units(y, z_BTE, up: LowRank | None, down: LowRank | None, kind: str):
  """The MLP's hidden units, and their product with A of `down`: (y_BTF, z_BTE or None).

  The backward pass computes both low-rank products again. So one array of the hidden width is kept for it, y, and not
  the two parts of the sum y + z B, and the hidden units as well.

  Args:
    y: product with the frozen weight, bias included.
    z_BTE: from `narrow`, for `up`.
    up, down: additions to the weights before and after the hidden units.
    kind: static; NetworkConfig.mlp.
  """
  if up is None and down is None:
    return jax.checkpoint(_ACTIVATIONS[kind])(y), None
  place = functools.partial(constraints.split_products, tensor_dim=y.ndim - 1)

  def compute(y, z_BTE, up, down):
    y_BTF = _ACTIVATIONS[kind](widen(y, z_BTE, up, place))
    return y_BTF, narrow(y_BTF, down)

  return _recomputed(compute, y, z_BTE, up, down)


def mlp(x_BTD, z_BTE, weights: dict, cfg: NetworkConfig):
  """The feed-forward part: GELU (GPT-2), or SwiGLU with its gate and up projections fused (Llama), and their like.

  Args:
    x_BTD, z_BTE: as `_read` returns them.
    weights: the block's.
    cfg: the network.
  """
  up, bias = ("w_gate_up_D2F", "b_gate_up_2F") if cfg.is_gated else ("w_up_DF", "b_up_F")
  y = product(x_BTD, weights[up])
  if bias in weights:
    y = y + weights[bias][None, None]
  y = constraints.split_products(y, tensor_dim=y.ndim - 1)
  pair = _low_rank(weights, "w_down_FD")
  # The name is on the product, before the activation: remat='products' keeps products, and recomputes what is cheap.
  y = checkpoint_name(y, SAVED)
  y_BTF, z_BTE = _hidden_units(y, z_BTE, _low_rank(weights, up), pair, cfg.mlp)
  y_BTD = constraints.scatter_columns(product(y_BTF, weights["w_down_FD"]))
  y_BTD = widen(y_BTD, z_BTE, pair, constraints.split_columns)
  return _add_bias(y_BTD, weights.get("b_down_D"))


def dropout(x_BTD, key_B, rate: float):
  """Inverted dropout: sets elements to 0 with probability `rate`, and scales the others to keep the expectation.

  The rate is rounded to a multiple of 2 ** -16. The scale uses the rounded rate, so the expectation is exact.

  Args:
    x_BTD: any float dtype.
    key_B: a typed key for each row; None switches dropout off.
    rate: static, in [0, 1).
  """
  if key_B is None:
    return x_BTD
  # 16 random bits decide on an element, so one 32-bit word serves two: half of the random bits to generate.
  kept = round((1.0 - rate) * 2**16)
  shape = (x_BTD.shape[1], (x_BTD.shape[2] + 1) // 2)
  word_BTE = jax.vmap(lambda key: jax.random.bits(key, shape))(key_B)
  keep_BTD = jnp.concatenate([word_BTE & 0xFFFF < kept, word_BTE >> 16 < kept], axis=2)
  scale_BTD = jnp.where(keep_BTD[:, :, : x_BTD.shape[2]], 2**16 / kept, 0.0)
  return x_BTD * scale_BTD.astype(x_BTD.dtype)


def cast(weights: dict, dtype) -> dict:
  """A layer's weights in the compute dtype, except those named in FLOAT32. Casting twice changes nothing.

  The cast comes before a mesh gathers the weights, which in bfloat16 halves what is sent. A consequence: gradients are
  summed over devices in that dtype too, after each device has summed over its own tokens in float32. The master weights
  and the optimiser are float32.

  Raises:
    ValueError: a weight's name says neither w_ nor b_, and is not in FLOAT32.
  """

  def one(path, weight):
    # Names are keys of dicts, or fields of LowRank and Int8.
    name = getattr(path[-1], "key", None) or path[-1].name
    is_float = jnp.issubdtype(
      weight.dtype, jnp.floating
    )  # not so a LowRank's key, and Int8's values
    if name in FLOAT32 or not is_float:
      return weight
    if not name.startswith(("w_", "b_")):
      raise ValueError(
        f"cast: {jax.tree_util.keystr(path)} must start with w_ or b_, or be in FLOAT32"
      )
    return weight.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, weights)


def block(h_BTD, weights: dict, cfg: NetworkConfig, angles, mix, dropout_rate: float, key_B):
  """One decoder layer: attention, then the MLP, each added to the residual stream whose norm it reads.

  With `parallel_residual` both read the stream as it enters the layer.

  Args:
    h_BTD: residual stream, in the compute dtype.
    weights: this layer's weights, float32 or already cast.
    cfg: the network.
    angles: cosine and sine for this kind of layer, from `rotary_angles`; None for no rotation.
    mix: attention, (q_BTGRK, k_BTGK, v_BTGK) -> (x_BTGRK, kept). It belongs to the caller, which may have keys and
      values in a cache. `kept` (the cache, or None) is passed through.
    dropout_rate: for both residual branches.
    key_B: each row's typed key of this layer's dropout; None for no dropout.
  Returns:
    (h_BTD, kept)
  Raises:
    ValueError: see `cast`.
  """
  weights = cast(weights, h_BTD.dtype)
  key_2B = (None, None) if key_B is None else jax.vmap(jax.random.split, out_axes=1)(key_B)
  pair = _low_rank(weights["attention"], "w_qkv_DGQK")
  x_BTD, z_BTE = _read(h_BTD, weights["attention_norm"], pair, cfg)
  mixed_BTGRK, kept = mix(*project_qkv(x_BTD, z_BTE, weights["attention"], cfg, angles))
  y_BTD = project_out(mixed_BTGRK, weights["attention"])
  y_BTD = dropout(_branch_norm(y_BTD, weights, "attention_out_norm", cfg), key_2B[0], dropout_rate)
  added_BTD = h_BTD + y_BTD
  # Kept in place of the product y_BTD: the backward pass of the mlp starts from this sum.
  h_BTD = h_BTD if cfg.parallel_residual else checkpoint_name(added_BTD, SAVED)
  pair = _low_rank(weights["mlp"], "w_gate_up_D2F" if cfg.is_gated else "w_up_DF")
  x_BTD, z_BTE = _read(h_BTD, weights["mlp_norm"], pair, cfg)
  y_BTD = _branch_norm(mlp(x_BTD, z_BTE, weights["mlp"], cfg), weights, "mlp_out_norm", cfg)
  h_BTD = added_BTD if cfg.parallel_residual else h_BTD
  return h_BTD + dropout(y_BTD, key_2B[1], dropout_rate), kept


def _branch_norm(y_BTD, weights: dict, name: str, cfg: NetworkConfig):
  """The output of a branch, normalised where the network has sandwich norms."""
  if not cfg.sandwich_norm:
    return y_BTD
  # The product is kept: the norm's gradient needs it.
  return norm(checkpoint_name(y_BTD, SAVED), weights[name], cfg)
