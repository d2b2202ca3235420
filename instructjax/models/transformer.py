"""The decoder that every stage uses: GPT-2, Llama, Gemma 3 and so on, by the switches of NetworkConfig.

Stages, sampling and scoring call the functions here with plain nested dicts of arrays; the flax module only declares
the parameters. If the layers are scanned, their weights are stacked on a leading axis N; if they are unrolled, the
weights are a list with one dict a layer (see parallel/stacking.py). Every function takes either form. A parameter's key
spells the dimensions that one layer sees: `w_qkv_DGQK`. Imports nothing of data or stages.

A row may hold several segments. Attention is causal by column and stays inside a segment. Columns of segment 0, and ids
outside the vocabulary, are pads, whose content changes nothing. The caller gives the positions.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax.core.config import AdapterConfig, ExecutionConfig, NetworkConfig
from instructjax.core.stages import Head
from instructjax.core.structs import Array, Params
from instructjax.models import cudnn, embedding, layers, positions, products, splash
from instructjax.parallel import constraints, sharding, stacking

POSITION_STD = 0.01  # of GPT-2's position table (wpe); its other weights have 0.02


class Transformer(nn.Module):
  """A network and how it is run. As a flax module it declares the parameters, with initialisers and logical axes.

  Hashable, so that it can be a static argument of jit.

  Attributes:
    network: switches and sizes; they alone decide what the layers' parameters are.
    execution: how the network is run, with no `auto` left (see execution.py).
    vocab_size: token ids are 0 .. vocab_size - 1; any other id is a pad.
    head: 'lm' for next-token logits, 'scalar' for one score a column (reward model and value network).
    adapter: the low-rank factors that are trained in place of these parameters (see adapters.py); None for none. The
      functions of this module do not read it.
  """

  network: NetworkConfig
  execution: ExecutionConfig
  vocab_size: int
  head: Head
  adapter: AdapterConfig | None = None

  def require_adapter(self) -> AdapterConfig:
    """`adapter`, for whoever knows that there is one."""
    if self.adapter is None:
      raise ValueError("this model has no adapter")
    return self.adapter

  @nn.compact
  def __call__(self):
    cfg = self.network
    layer, width = ("layers", cfg.num_layers), ("embed", cfg.d_model)
    vocab, vector = ("vocab", self.vocab_size), ("embed_vector", cfg.d_model)
    group, head_dim = ("kv_heads", cfg.num_kv_heads), ("head_dim", cfg.head_dim)
    queries = ("queries_per_kv", cfg.num_heads // cfg.num_kv_heads)
    fused, hidden = ("queries_key_value", queries[1] + 2), ("mlp", cfg.d_mlp)
    normal = nn.initializers.normal(cfg.init_std)
    # GPT-2's modified init: a residual stream is a sum of 2N branches, so each gets 1 / 2N of the variance.
    residual = nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5)
    zeros, ones = nn.initializers.zeros, nn.initializers.ones

    def param(name, init, *dims):
      axes, shape = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
      self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

    scale = zeros if cfg.norm == "rmsnorm_1p" else ones

    def norm(name, *stack):
      param(f"{name}/scale_D", scale, *stack, vector)
      if cfg.norm == "layernorm":
        param(f"{name}/bias_D", zeros, *stack, vector)

    param("embedding/token_VD", normal, vocab, width)
    if cfg.position == "learned":
      position_init = nn.initializers.normal(POSITION_STD)
      param("embedding/position_TD", position_init, ("position", cfg.max_length), width)
    norm("layers/attention_norm", layer)
    param("layers/attention/w_qkv_DGQK", normal, layer, width, group, fused, head_dim)
    param("layers/attention/w_out_GRKD", residual, layer, group, queries, head_dim, width)
    if cfg.use_bias or cfg.qkv_bias:
      param("layers/attention/b_qkv_GQK", zeros, layer, group, fused, head_dim)
    if cfg.qk_norm:
      param("layers/attention/q_norm/scale_K", scale, layer, head_dim)
      param("layers/attention/k_norm/scale_K", scale, layer, head_dim)
    norm("layers/mlp_norm", layer)
    if cfg.sandwich_norm:
      norm("layers/attention_out_norm", layer)
      norm("layers/mlp_out_norm", layer)
    gates = (("gate_up", 2),) if cfg.is_gated else ()
    up, up_dims = ("gate_up", "2F") if cfg.is_gated else ("up", "F")
    param(f"layers/mlp/w_{up}_D{up_dims}", normal, layer, width, *gates, hidden)
    param("layers/mlp/w_down_FD", residual, layer, hidden, width)
    if cfg.use_bias:
      param("layers/attention/b_out_D", zeros, layer, vector)
      param(f"layers/mlp/b_{up}_{up_dims}", zeros, layer, *gates, hidden)
      param("layers/mlp/b_down_D", zeros, layer, vector)
    norm("final_norm")
    if self.head == "scalar":
      # The reward head of OpenAI's code: variance 1 / (d + 1) (details item 14). The text of Stiennon et al. drops the
      # square root of the standard deviation.
      param("head/w_D", nn.initializers.normal((cfg.d_model + 1) ** -0.5), vector)
      param("head/bias", zeros)
    elif not cfg.tie_embeddings:
      param("head/w_VD", normal, vocab, width)


Model = Transformer


def make_model(
  network: NetworkConfig,
  execution: ExecutionConfig,
  vocab_size: int,
  head: Head,
  adapter: AdapterConfig | None = None,
) -> Model:
  """Describes a model; the result holds no arrays.

  `execution.model_on` does the same for the devices of a mesh, and resolves `auto` before.

  Raises:
    ValueError: an unknown head, an `auto` that is left, or a subclass of NetworkConfig.
  """
  if head not in ("lm", "scalar"):
    raise ValueError(f"make_model: head={head!r} must be 'lm' or 'scalar'")
  # Models are compared and hashed as static arguments: a subclass's instance would never equal its parent's.
  if type(network) is not NetworkConfig:
    raise ValueError(f"make_model: network must be a NetworkConfig, got {type(network).__name__}")
  if "auto" in dataclasses.astuple(execution):
    raise ValueError(f"make_model: nothing may be left to 'auto', got {execution}")
  return Transformer(network, execution, vocab_size, head, adapter)


def init_params(model: Model, key: Array) -> Params:
  """Fresh float32 parameters, with GPT-2's initialisation for every architecture."""
  return arrange(model, _nest(nn.unbox(model.init(key)["params"])))


def arrange(model: Model, params: Params) -> Params:
  """Brings the layers' weights into the form in which this model runs them: stacked for a scan, else a list."""
  change = stacking.stacked if model.execution.layers == "scan" else stacking.unstacked
  return params | {"layers": change(params["layers"])}


def frozen_weights(model: Model, params: Params) -> Params:
  """Weights that are only read, such as PPO's reference and reward model: in bfloat16 they take half of the memory.

  A weight is cast to the compute dtype if every use of it would cast it anyway, so the forward pass is the same bit for
  bit. Norms and a scalar head stay float32. So does the embedding, because positions are added before the sum is
  rounded.

  Raises:
    ValueError: a layer's weight has a name that `layers.cast` does not know.
  """
  dtype = jnp.dtype(model.execution.dtype)
  cast = lambda layer: layers.cast(layer, dtype)
  of_layers = params["layers"]
  result = params | {
    "layers": [cast(layer) for layer in of_layers]
    if isinstance(of_layers, list)
    else cast(of_layers)
  }
  if model.head == "lm" and "head" in params:
    result["head"] = jax.tree.map(lambda w: w.astype(dtype), params["head"])
  return result


def param_shapes(model: Model) -> Params:
  """Shapes and dtypes of `init_params`, as ShapeDtypeStructs; nothing is computed."""
  return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def param_axes(model: Model) -> Params:
  """Logical axis names of every parameter's dimensions: a tuple for each, in a tree like the parameters."""
  boxed = jax.eval_shape(model.init, jax.random.key(0))["params"]
  axes = _nest({name: box.names for name, box in boxed.items()})
  if model.execution.layers != "scan":
    layer = jax.tree.map(lambda names: names[1:], axes["layers"], is_leaf=_is_names)
    axes["layers"] = [layer] * model.network.num_layers
  return axes


def _is_names(node) -> bool:
  return isinstance(node, tuple)


def param_shardings(mesh: Mesh, model: Model) -> tuple[Params, Params]:
  """Where the weights lie on a mesh: (NamedSharding of every parameter, `param_shapes`).

  Raises:
    UserError: the mesh does not divide a parameter.
  """
  shapes = param_shapes(model)
  return sharding.param_shardings(mesh, param_axes(model), shapes), shapes


def _nest(flat: dict) -> dict:
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def apply(model: Model, params: Params, token_BL: Array, **inputs) -> Array:
  """The whole forward pass.

  Args:
    model, params, token_BL, inputs: as for `hidden`.
  Returns:
    float32 logits_BTV, or score_BT for a scalar head; T counts the columns of the window, or all of L.
  Raises:
    ValueError: see `hidden`.
  """
  h_BTD, params = hidden(model, params, token_BL, **inputs)
  return apply_head(model, params, h_BTD)


def hidden(
  model: Model,
  params: Params,
  token_BL: Array,
  *,
  segment_BL: Array,
  position_BL: Array,
  dropout_rate: float = 0.0,
  dropout_key_B: Array | None = None,
  window: tuple[int, int] | None = None,
  last_BL: Array | None = None,
) -> tuple[Array, Params]:
  """The forward pass up to the head's input.

  Args:
    model: from `make_model`.
    params: from `init_params` or `frozen_weights`, or, without a mesh, from `decode_weights`.
    token_BL: int32 ids.
    segment_BL: int32 segment of each column; 0 is padding.
    position_BL: int32 position inside the segment. A learned position past max_length gives NaN.
    dropout_rate: residual dropout, on the output of each branch and on the sum of the embeddings.
    dropout_key_B: a typed key for each row; needed if dropout_rate > 0. A row's masks depend on its own key alone, so
      they are the same in whatever batch the row is computed.
    window: (start, stop) of the columns whose outputs are wanted; the head is not computed for others.
    last_BL: for rows that hold trees, as answers that share the columns of their prompt: int32; see `layers.tree_mask`.
      Attention is then by it in place of segments, and positions count from a tree's root. None for plain sequences.
  Returns:
    (h_BTD, params). h_BTD is the output of the final norm, in the compute dtype; T counts the columns of the window, or
    all of L. Give these params to the head (`apply_head`, lm_head.py) instead of the ones passed in. The values are the
    same, but a tied embedding table then collects its gradient in one array: see `_look_up_and_pass`.
  Raises:
    ValueError: dropout_rate > 0 without keys, or trees for attention that takes segments only ('splash').
  """
  if dropout_rate and dropout_key_B is None:
    raise ValueError(f"apply: dropout_rate={dropout_rate} must come with dropout_key_B")
  key_B = dropout_key_B if dropout_rate else None
  h_BLD, _, params = run_layers(
    model, params, token_BL, segment_BL, position_BL, dropout_rate, key_B, last_BL=last_BL
  )
  start, stop = window or (0, token_BL.shape[1])
  return final_norm(model, params, h_BLD[:, start:stop]), params


def lm_table(model: Model, params: Params) -> Array:
  """The 'lm' head's weights, [V, D], in the dtype of the parameters: the embedding table if the two are tied."""
  return params["embedding"]["token_VD"] if model.network.tie_embeddings else params["head"]["w_VD"]


def run_layers(
  model,
  params,
  token_BL,
  segment_BL,
  position_BL,
  dropout_rate=0.0,
  key_B=None,
  keep=False,
  last_BL=None,
):
  """Embedding and all layers, before the final norm.

  Args:
    model, params, token_BL, segment_BL, position_BL, dropout_rate, last_BL: as for `hidden`.
    key_B: each row's typed key for dropout, or None.
    keep: whether to return keys and values, for a cache.
  Returns:
    (h_BLD, kept, params). kept is the (k_BGLK, v_BGLK) of every layer, stacked or as a tuple like the layers, or Nones.
    params are as `hidden` returns them.
  """
  cfg = model.network
  # Unlike h_BLD, these keep whole columns on every device: the attention masks are made from them, and gathering a
  # mask, which is larger, would cost more.
  token_BL, segment_BL, position_BL = constraints.shard_rows((token_BL, segment_BL, position_BL))
  # Keys and values are kept by `prefill` only.
  fed = token_BL, segment_BL, position_BL
  h_BLD, segment_BL, params = embedding.embed(model, params, *fed, decoding=keep)
  segment_BL = constraints.shard_rows(segment_BL)
  angles, kinds = positions.rotary_angles(position_BL, cfg), positions.layer_kinds(cfg)
  attend = _attention(model, segment_BL, position_BL, last_BL)
  key_NB = None
  if key_B is not None:
    # Keys 0 .. N - 1 are for the layers, N for the embedding: scan and unrolled layers draw the same noise.
    fold_B = jax.vmap(jax.random.fold_in, (0, None))
    h_BLD = products.dropout(h_BLD, fold_B(key_B, cfg.num_layers), dropout_rate)
    key_NB = jax.vmap(fold_B, (None, 0))(key_B, jnp.arange(cfg.num_layers))

  def run_block(h_BLD, layer, index, layer_key_B):
    def mix(q_BTGRK, k_BTGK, v_BTGK):
      pair = k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)
      return attend(index, q_BTGRK, *pair), pair if keep else None

    turn = positions.layer_angles(angles, kinds, index)
    h_BLD, kept = layers.block(h_BLD, layer, cfg, turn, mix, dropout_rate, layer_key_B)
    return h_BLD, kept

  # A scan compiles one layer for all. Unrolled layers take longer to compile, but read their weights where they lie,
  # while a scan on a CPU first copies each layer's weights out of the stack (docs/performance.md, "How cost grows").
  if model.execution.layers == "scan":
    # The loop itself keeps XLA from merging recomputation with the forward pass, so no barrier against CSE is needed.
    run = _checkpoint(run_block, model.execution.remat, static_argnums=2, prevent_cse=False)
    stacked = stacking.stacked(params["layers"]), key_NB
    return *_scan_layers(run, h_BLD, stacked, len(kinds)), params
  run = _checkpoint(run_block, model.execution.remat, static_argnums=2)
  kept = []
  for index, layer in enumerate(stacking.unstacked(params["layers"])):
    h_BLD, pair = run(h_BLD, layer, index, None if key_NB is None else key_NB[index])
    kept.append(pair)
  return h_BLD, tuple(kept), params


def _checkpoint(run_block, remat: str, **kwargs):
  """Wraps a layer so that the backward pass finds only a part of it stored, and recomputes the rest.

  'none' stores everything. 'full' stores only the layer's input. 'products' also stores what layers.py names SAVED: the
  results of products with weights and of attention, and the residual stream between the two branches.
  """
  if remat == "none":
    return run_block
  policies = jax.checkpoint_policies
  save = policies.save_only_these_names(layers.SAVED) if remat == "products" else None
  return jax.checkpoint(run_block, policy=save, **kwargs)


def _scan_layers(run, h_BLD, stacked, period: int):
  """Scans over the layers, `period` of them a turn.

  GPT-3 alternates dense and banded layers. With two layers a turn, each has a static index, so its attention mask (or
  splash kernel) and its positions are chosen at compile time. A conditional inside the scan was slower by the
  compiler's estimate.

  Args:
    run: (h_BLD, layer, index, key) -> (h_BLD, kept). It may use the index modulo `period` only.
    h_BLD: input of the first layer.
    stacked: (layers, keys_N), each stacked on a leading axis.
    period: number of layers after which the pattern repeats. Layers that are left over run after the scan.
  Returns:
    (h_BLD, kept of every layer, stacked)
  """

  def turn(h_BLD, some):
    some, keys = some
    kept = []
    for index, layer in enumerate(stacking.unstacked(some)):
      h_BLD, pair = run(h_BLD, layer, index, None if keys is None else keys[index])
      kept.append(pair)
    return h_BLD, jax.tree.map(lambda *pairs: jnp.stack(pairs), *kept)

  num_layers = jax.tree.leaves(stacked)[0].shape[0]
  rest = num_layers % period
  turns = jax.tree.map(lambda x: x[: num_layers - rest].reshape(-1, period, *x.shape[1:]), stacked)
  h_BLD, kept = jax.lax.scan(turn, h_BLD, turns)
  kept = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)
  if rest:
    h_BLD, last = turn(h_BLD, jax.tree.map(lambda x: x[-rest:], stacked))
    kept = jax.tree.map(lambda *parts: jnp.concatenate(parts), kept, last)
  return h_BLD, kept


def _attention(model, segment_BL, position_BL, last_BL):
  """Makes the attention of layer `index` over whole sequences: (index, q_BTGRK, k_BGTK, v_BGTK) -> x_BTGRK."""
  cfg, kinds = model.network, positions.layer_kinds(model.network)
  if model.execution.attention == "splash":
    if last_BL is not None:
      raise ValueError("apply: execution.attention='splash' takes segments, not trees")
    window = lambda index: cfg.attention_window if kinds[index % len(kinds)] == "L" else 0
    return lambda index, *qkv: splash.attend(segment_BL, *qkv, window=window(index))
  if last_BL is None:
    masks = layers.attention_masks(segment_BL, position_BL, cfg)
  else:
    dense_BLL = layers.tree_mask(constraints.shard_rows(last_BL))
    masks = dense_BLL, layers.band(dense_BLL, position_BL, position_BL, cfg)
  attend = cudnn.attend if model.execution.attention == "cudnn" else layers.attend
  return lambda index, q_BTGRK, k_BGTK, v_BGTK: attend(
    q_BTGRK, k_BGTK, v_BGTK, positions.layer_mask(masks, kinds, index)
  )


def final_norm(model: Model, params: Params, h_BTD: Array) -> Array:
  """The norm before the head. On a mesh each device normalises its own columns."""
  return layers.norm(constraints.split_columns(h_BTD), params["final_norm"], model.network)


def apply_head(model: Model, params: Params, h_BTD: Array, *, decoding: bool = False) -> Array:
  """The head: float32 logits_BTV, or score_BT for a scalar head.

  Args:
    model: from `make_model`.
    params, h_BTD: as `hidden` returns them.
    decoding: whether params are from `decode_weights`, which has placed the tables already.
  """
  if model.head == "scalar":
    # In float32, as a scalar head's weights are kept (see `frozen_weights`).
    head = params["head"]
    return jnp.einsum("BTD,D->BT", h_BTD.astype(jnp.float32), head["w_D"]) + head["bias"]
  table_VD = lm_table(model, params).astype(h_BTD.dtype)
  if not decoding:
    h_BTD, table_VD = constraints.gather_columns(h_BTD), constraints.split_vocab(table_VD)
  # Contracted over the table's last dimension, as it is stored: through a transposed copy this takes 1.7 times as long
  # on a CPU.
  logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, table_VD, preferred_element_type=jnp.float32)
  return logits_BTV if decoding else constraints.split_logits(logits_BTV)
