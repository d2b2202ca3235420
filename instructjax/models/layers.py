"""The maths of one decoder layer: pure functions over a dict of that layer's weights.

Called by transformer.py and decoding.py. Knows no batches and no stages. Of meshes it knows only which dimension of an
array to split, through the helpers of constraints.py, which do nothing on one device. Never imports flax.

Dimension letters beside those of structs.py: G counts key/value heads and R the query heads that share one of them
(R = H / G). Q = R + 2 is what the fused projection yields for each key/value head: its R queries, its key and its
value. T counts the columns of the queries, S the columns of the keys.

Norms and activations are recomputed in the backward pass (`jax.checkpoint`) instead of stored. Storing them would take
a quarter of a step's memory, and on a CPU fresh memory costs more than computing them again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from instructjax.core.config import NetworkConfig
from instructjax.models import positions, products
from instructjax.parallel import constraints

# The weights of norms stay float32, wherever they are nested: a norm is computed in float32. So does the scale of an
# Int8. All others are used in the compute dtype. Their names start with w_ (a product's weights) or b_ (its biases).
FLOAT32 = frozenset({"scale_D", "bias_D", "scale_K", "scale"})
SAVED = "saved"  # checkpoint_name of the arrays that remat='products' keeps for the backward pass
# Score of a masked column. It is finite because with -inf a row in which every column is masked would become NaN.
MASKED_SCORE = -1e30


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


# --- attention --------------------------------------------------------------------------------------


def _low_rank(weights: dict, name: str) -> products.LowRank | None:
  """The addition to a weight of a block, if the network is adapted."""
  return weights.get(products.low_rank_name(name))


def _read(h_BTD, norm_weights: dict, pair: products.LowRank | None, cfg: NetworkConfig):
  """What a branch reads of the residual stream: (its norm, with all columns; that times A, or None)."""
  # A frozen weight has no gradient, so nothing but A's gradient needs the norm again, and that computes it anew. Not so
  # on a mesh, where its columns would have to be gathered again.
  if pair is not None and constraints.on_one_device():

    def norm_and_narrow(h_BTD, norm_weights, pair):
      x_BTD = _norm(h_BTD, norm_weights, cfg)
      return x_BTD, products.narrow(x_BTD, pair)

    return products.recomputed(norm_and_narrow, h_BTD, norm_weights, pair)
  # On a mesh, columns are split over `tensor` between products, and gathered for a product (see constraints.py).
  x_BTD = constraints.gather_columns(norm(h_BTD, norm_weights, cfg))
  return x_BTD, products.narrow(x_BTD, pair)


def project_qkv(x_BTD, z_BTE, weights: dict, cfg: NetworkConfig, angles):
  """Queries, keys and values by one fused projection of what `_read` returns: (q_BTGRK, k_BTGK, v_BTGK).

  The projection is fused per key/value head, so splitting G over `tensor` keeps each head's queries, key and value on
  one device. Queries and keys are normalised if the network says so, and rotated unless `angles` is None.
  """
  y_BTGQK = products.product(x_BTD, weights["w_qkv_DGQK"])
  y_BTGQK = products.widen(y_BTGQK, z_BTE, _low_rank(weights, "w_qkv_DGQK"))
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
    q_BTGRK, k_BTG1K = positions.rotate(q_BTGRK, angles), positions.rotate(k_BTG1K, angles)
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


def tree_mask(last_BL):
  """The mask of dense layers for rows that hold trees, in depth-first order: [B, L, L] as in `attention_masks`.

  What may see a column is then a span: those from it to the last one below it, `last_BL`; -1 at pads.
  """
  column_L = jnp.arange(last_BL.shape[1], dtype=jnp.int32)
  query_1L1, key_11L = column_L[None, :, None], column_L[None, None, :]
  return (key_11L <= query_1L1) & (query_1L1 <= last_BL[:, None, :])


def band(mask_BTS, query_position_BT, key_position_BS, cfg: NetworkConfig):
  """The mask of the banded layers, from that of the dense ones; None if the network has no banded layers."""
  if not cfg.attention_window or "L" not in positions.layer_kinds(cfg):
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
  y_BTD = products.product(x_BTE, _join_inputs(w_GRKD))
  y_BTD = constraints.scatter_columns(y_BTD)
  pair = _low_rank(weights, "w_out_GRKD")
  y_BTD = products.widen(y_BTD, products.narrow(x_BTE, pair), pair, constraints.split_columns)
  return _add_bias(y_BTD, weights.get("b_out_D"))


def _join_inputs(w):
  """A weight of the heads' outputs as a matrix: all dimensions but the last become one."""
  join = lambda x: x.reshape(-1, x.shape[-1])
  return products.Int8(join(w.values), w.scale) if isinstance(w, products.Int8) else join(w)


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


def _hidden_units(y, z_BTE, up: products.LowRank | None, down: products.LowRank | None, kind: str):
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
    y_BTF = _ACTIVATIONS[kind](products.widen(y, z_BTE, up, place))
    return y_BTF, products.narrow(y_BTF, down)

  return products.recomputed(compute, y, z_BTE, up, down)


def mlp(x_BTD, z_BTE, weights: dict, cfg: NetworkConfig):
  """The feed-forward part: GELU (GPT-2), or SwiGLU with its gate and up projections fused (Llama), and their like.

  Args:
    x_BTD, z_BTE: as `_read` returns them.
    weights: the block's.
    cfg: the network.
  """
  up, bias = ("w_gate_up_D2F", "b_gate_up_2F") if cfg.is_gated else ("w_up_DF", "b_up_F")
  y = products.product(x_BTD, weights[up])
  if bias in weights:
    y = y + weights[bias][None, None]
  y = constraints.split_products(y, tensor_dim=y.ndim - 1)
  pair = _low_rank(weights, "w_down_FD")
  # The name is on the product, before the activation: remat='products' keeps products, and recomputes what is cheap.
  y = checkpoint_name(y, SAVED)
  y_BTF, z_BTE = _hidden_units(y, z_BTE, _low_rank(weights, up), pair, cfg.mlp)
  y_BTD = constraints.scatter_columns(products.product(y_BTF, weights["w_down_FD"]))
  y_BTD = products.widen(y_BTD, z_BTE, pair, constraints.split_columns)
  return _add_bias(y_BTD, weights.get("b_down_D"))


def cast(weights: dict, dtype) -> dict:
  """A layer's weights in the compute dtype, except those named in FLOAT32. Casting twice changes nothing.

  The cast comes before a mesh gathers the weights, which in bfloat16 halves what is sent. A consequence: gradients are
  summed over devices in that dtype too, after each device has summed over its own tokens in float32. The master weights
  and the optimiser are float32.

  Raises:
    ValueError: a weight's name says neither w_ nor b_, and is not in FLOAT32.
  """

  def one(path, weight):
    # Names are keys of dicts, or fields of products.LowRank and Int8.
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
  y_BTD = products.dropout(
    _branch_norm(y_BTD, weights, "attention_out_norm", cfg), key_2B[0], dropout_rate
  )
  added_BTD = h_BTD + y_BTD
  # Kept in place of the product y_BTD: the backward pass of the mlp starts from this sum.
  h_BTD = h_BTD if cfg.parallel_residual else checkpoint_name(added_BTD, SAVED)
  pair = _low_rank(weights["mlp"], "w_gate_up_D2F" if cfg.is_gated else "w_up_DF")
  x_BTD, z_BTE = _read(h_BTD, weights["mlp_norm"], pair, cfg)
  y_BTD = _branch_norm(mlp(x_BTD, z_BTE, weights["mlp"], cfg), weights, "mlp_out_norm", cfg)
  h_BTD = added_BTD if cfg.parallel_residual else h_BTD
  return h_BTD + products.dropout(y_BTD, key_2B[1], dropout_rate), kept


def _branch_norm(y_BTD, weights: dict, name: str, cfg: NetworkConfig):
  """The output of a branch, normalised where the network has sandwich norms."""
  if not cfg.sandwich_norm:
    return y_BTD
  # The product is kept: the norm's gradient needs it.
  return norm(checkpoint_name(y_BTD, SAVED), weights[name], cfg)
