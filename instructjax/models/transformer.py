"""The decoder every stage uses: GPT-2, GPT-3 and Llama by switches of NetworkConfig.

Stages, sampling and scoring call the functions here with plain nested dicts of float32 arrays; the
flax module only declares parameters. Layers that are scanned have their weights stacked on a leading
axis N, unrolled ones lie in a list (stacking.py); every function takes either. Keys such as
`w_qkv_DGQK` spell the dimensions that one layer sees. Imports nothing of data, ops or stages.

Columns: attention is causal by column, inside one segment; segment 0 and ids outside the vocabulary
are pads, whose content changes nothing. Positions are the caller's.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax.core.config import ExecutionConfig, NetworkConfig
from instructjax.core.stages import Head
from instructjax.core.structs import Array, Params
from instructjax.models import layers, splash
from instructjax.parallel import constraints, sharding, stacking

POSITION_STD = 0.01  # GPT-2's wpe


class Transformer(nn.Module):
  """Declares the parameters, each with its initialiser and logical axes. Hashable: static in jit.

  Attributes:
    network: switches and sizes; only these decide what the parameters are.
    execution: how it is run, without `auto` (see execution.py).
    vocab_size: token ids are 0 .. vocab_size - 1; anything else is a pad.
    head: 'lm' gives next-token logits, 'scalar' one score a column (reward and value models).
  """

  network: NetworkConfig
  execution: ExecutionConfig
  vocab_size: int
  head: Head

  @nn.compact
  def __call__(self):
    cfg = self.network
    layer, width = ("layers", cfg.num_layers), ("embed", cfg.d_model)
    vocab, vector = ("vocab", self.vocab_size), ("embed_vector", cfg.d_model)
    group, head_dim = ("kv_heads", cfg.num_kv_heads), ("head_dim", cfg.head_dim)
    queries = ("queries_per_kv", cfg.num_heads // cfg.num_kv_heads)
    fused, hidden = ("queries_key_value", queries[1] + 2), ("mlp", cfg.d_mlp)
    normal = nn.initializers.normal(cfg.init_std)
    # GPT-2's modified init: 2N residual branches add up to the variance of one.
    residual = nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5)
    zeros, ones = nn.initializers.zeros, nn.initializers.ones

    def param(name, init, *dims):
      axes, shape = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
      self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

    def norm(name, *stack):
      param(f"{name}/scale_D", ones, *stack, vector)
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
    norm("layers/mlp_norm", layer)
    gates = () if cfg.mlp == "gelu" else (("gate_up", 2),)
    up, up_dims = ("up", "F") if cfg.mlp == "gelu" else ("gate_up", "2F")
    param(f"layers/mlp/w_{up}_D{up_dims}", normal, layer, width, *gates, hidden)
    param("layers/mlp/w_down_FD", residual, layer, hidden, width)
    if cfg.use_bias:
      param("layers/attention/b_out_D", zeros, layer, vector)
      param(f"layers/mlp/b_{up}_{up_dims}", zeros, layer, *gates, hidden)
      param("layers/mlp/b_down_D", zeros, layer, vector)
    norm("final_norm")
    if self.head == "scalar":
      # OpenAI's reward head: variance 1 / (d + 1). Stiennon et al.'s text drops the square root.
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
) -> Model:
  """The model's description; it holds no arrays.

  `execution.model_on` makes one for the devices of a mesh, and chooses what is left to `auto`.
  """
  if head not in ("lm", "scalar"):
    raise ValueError(f"make_model: head={head!r} must be 'lm' or 'scalar'")
  if type(network) is not NetworkConfig:  # two descriptions of one network must be equal
    raise ValueError(f"make_model: network must be a NetworkConfig, got {type(network).__name__}")
  if "auto" in dataclasses.astuple(execution):
    raise ValueError(f"make_model: nothing may be left to 'auto', got {execution}")
  return Transformer(network, execution, vocab_size, head)


def init_params(model: Model, key: Array) -> Params:
  """Fresh float32 parameters: GPT-2's initialisation, whatever the switches."""
  return arrange(model, _nest(nn.unbox(model.init(key)["params"])))


def arrange(model: Model, params: Params) -> Params:
  """Parameters with their layers as this model runs them: stacked for a scan, else a list."""
  change = stacking.stacked if model.execution.layers == "scan" else stacking.unstacked
  return params | {"layers": change(params["layers"])}


def frozen_weights(model: Model, params: Params) -> Params:
  """Weights that are read and never changed: of the compute dtype wherever every use would cast them to it first.

  The same forward pass, bit for bit. Norms and a scalar head stay float32, and so does the embedding: positions are
  added to it before the sum is rounded.
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
  """`init_params`, as ShapeDtypeStructs."""
  return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def param_axes(model: Model) -> Params:
  """Logical axis names of every parameter: tuples, in a tree like the parameters."""
  boxed = jax.eval_shape(model.init, jax.random.key(0))["params"]
  axes = _nest({name: box.names for name, box in boxed.items()})
  if model.execution.layers != "scan":
    layer = jax.tree.map(lambda names: names[1:], axes["layers"], is_leaf=_is_names)
    axes["layers"] = [layer] * model.network.num_layers
  return axes


def _is_names(node) -> bool:
  return isinstance(node, tuple)


def param_shardings(mesh: Mesh, model: Model) -> tuple[Params, Params]:
  """(NamedSharding of every parameter, `param_shapes`): where the weights lie on a mesh."""
  shapes = param_shapes(model)
  return sharding.param_shardings(mesh, param_axes(model), shapes), shapes


def _nest(flat: dict) -> dict:
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def apply(model: Model, params: Params, token_BL: Array, **inputs) -> Array:
  """The whole forward pass.

  Args:
    model, params, token_BL, inputs: as `hidden` has them.
  Returns:
    float32 logits_BTV, or score_BT for a scalar head; T is the window, or all of L.
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
  dropout_key: Array | None = None,
  window: tuple[int, int] | None = None,
) -> tuple[Array, Params]:
  """The forward pass up to what the head reads.

  Args:
    model: from `make_model`.
    params: from `init_params`.
    token_BL: int32 ids.
    segment_BL: int32, 0 is padding; attention stays inside a segment.
    position_BL: int32 position inside the segment. A learned position past max_length gives NaN.
    dropout_rate: residual dropout (each branch's output and the embedding sum).
    dropout_key: typed key; needed when dropout_rate > 0.
    window: (start, stop) columns whose outputs are wanted; the head costs nothing elsewhere.
  Returns:
    (h_BTD after the final norm, in the compute dtype; T is the window, or all of L, and the parameters for the head:
    the same, with a table of tokens that on one device collects its gradient in one array, the head's part first)
  """
  if dropout_rate and dropout_key is None:
    raise ValueError(f"apply: dropout_rate={dropout_rate} must come with a dropout_key")
  key = dropout_key if dropout_rate else None
  h_BLD, _, params = run_layers(model, params, token_BL, segment_BL, position_BL, dropout_rate, key)
  start, stop = window or (0, token_BL.shape[1])
  return final_norm(model, params, h_BLD[:, start:stop]), params


def lm_table(model: Model, params: Params) -> Array:
  """The rows that an 'lm' head multiplies with, [V, D], in the dtype of the parameters."""
  return params["embedding"]["token_VD"] if model.network.tie_embeddings else params["head"]["w_VD"]


def positions_from_mask(is_token_BL: Array) -> Array:
  """int32 number of real tokens before each column: positions that padding does not move."""
  is_token_BL = is_token_BL.astype(jnp.int32)
  return jnp.cumsum(is_token_BL, axis=1) - is_token_BL


def positions_from_segments(segment_BL: Array) -> Array:
  """int32 number of real tokens before each column in its own segment; segment 0 is padding."""
  before_BL = positions_from_mask(segment_BL > 0)
  is_first_BL = jnp.diff(segment_BL, axis=1, prepend=0) != 0
  return before_BL - jax.lax.cummax(jnp.where(is_first_BL, before_BL, 0), axis=1)


def run_layers(
  model, params, token_BL, segment_BL, position_BL, dropout_rate=0.0, key=None, keep=False
):
  """(what the layers yield, keys and values of every layer where `keep`, parameters as `hidden` returns them)."""
  cfg = model.network
  # With whole columns, unlike h: attention's masks are made of them, and are larger.
  token_BL, segment_BL, position_BL = constraints.shard_rows((token_BL, segment_BL, position_BL))
  h_BLD, segment_BL, params = embed(model, params, token_BL, segment_BL, position_BL)
  segment_BL = constraints.shard_rows(segment_BL)
  angles = layers.rotary_angles(position_BL, cfg)
  attend = _attention(model, segment_BL, position_BL)
  keys_N = None
  if key is not None:
    h_BLD = layers.dropout(h_BLD, jax.random.fold_in(key, cfg.num_layers), dropout_rate)
    keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(cfg.num_layers))

  def run_block(h_BLD, layer, index, layer_key):
    def mix(q_BTGRK, k_BTGK, v_BTGK):
      pair = k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)
      return attend(index, q_BTGRK, *pair), pair if keep else None

    h_BLD, kept = layers.block(h_BLD, layer, cfg, angles, mix, dropout_rate, layer_key)
    return h_BLD, kept

  if model.execution.layers == "scan":
    run = _checkpoint(run_block, model.execution.remat, static_argnums=2, prevent_cse=False)
    stacked = stacking.stacked(params["layers"]), keys_N
    return *_scan_layers(run, h_BLD, stacked, 2 if cfg.attention_window else 1), params
  run = _checkpoint(run_block, model.execution.remat, static_argnums=2)
  kept = []
  for index, layer in enumerate(stacking.unstacked(params["layers"])):
    h_BLD, pair = run(h_BLD, layer, index, None if keys_N is None else keys_N[index])
    kept.append(pair)
  return h_BLD, tuple(kept), params


def _checkpoint(run_block, remat: str, **kwargs):
  """What of a layer is kept for its gradient: all, its input, or that and what products with weights yielded."""
  if remat == "none":
    return run_block
  policies = jax.checkpoint_policies
  save = policies.save_only_these_names(layers.SAVED) if remat == "products" else None
  return jax.checkpoint(run_block, policy=save, **kwargs)


def _scan_layers(run, h_BLD, stacked, period: int):
  """A scan of `period` layers a turn, of which each knows its place: no layer chooses a mask as it runs.

  Args:
    run: (h_BLD, layer, index, key) -> (h_BLD, kept), where only index modulo `period` counts.
    h_BLD: what the first layer gets.
    stacked: (layers, keys_N).
    period: after how many layers they repeat; what is left over runs after the scan.
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


def _attention(model, segment_BL, position_BL):
  """(index, q_BTGRK, k_BGTK, v_BGTK) -> x_BTGRK: how layer `index` attends inside whole sequences."""
  cfg = model.network
  if model.execution.attention == "splash":
    windows = 0, cfg.attention_window
    return lambda index, *qkv: splash.attend(segment_BL, *qkv, window=windows[index % 2])
  masks = layers.attention_masks(segment_BL, position_BL, cfg)
  return lambda index, q_BTGRK, *pair: layers.attend(
    q_BTGRK, *pair, mask_BTS=layer_mask(masks, index)
  )


def layer_mask(masks, index):
  """Every second layer is banded, from the second on; `index` is an int, or traced in a scan."""
  dense_BTS, banded_BTS = masks
  if banded_BTS is None:
    return dense_BTS
  if isinstance(index, int):
    return banded_BTS if index % 2 else dense_BTS
  return jnp.where(index % 2 == 1, banded_BTS, dense_BTS)


def embed(model, params, token_BL, segment_BL, position_BL, place=constraints.split_columns):
  """Embedding sum, zero at pads; segments with every id outside the vocabulary made a pad; `hidden`'s parameters."""
  is_token_BL = (segment_BL > 0) & (token_BL >= 0) & (token_BL < model.vocab_size)
  row_BL = jnp.where(is_token_BL, token_BL, 0)
  look_up = _look_up_and_pass if constraints.on_one_device() else _look_up
  h_BLD, table_VD = look_up(params["embedding"]["token_VD"], row_BL)
  params = params | {"embedding": params["embedding"] | {"token_VD": table_VD}}
  if model.network.position == "learned":
    row_BL = jnp.where(is_token_BL, position_BL, 0)
    h_BLD = h_BLD + params["embedding"]["position_TD"].at[row_BL].get(mode="fill")
  # A select, not a product: whatever the table holds, NaN included, ends here.
  h_BLD = jnp.where(is_token_BL[:, :, None], h_BLD, 0.0).astype(model.execution.dtype)
  return place(h_BLD), jnp.where(is_token_BL, segment_BL, 0), params


def _look_up(table_VD, row_BL):
  return table_VD.at[row_BL].get(mode="promise_in_bounds"), table_VD


@jax.custom_vjp
def _look_up_and_pass(table_VD, row_BL):
  """(rows, the table for its next use).

  The gradient of the rows is added into that of the next use, in place. By itself JAX would scatter it into an array of
  zeros and sum the two, which takes three arrays of the table's size. On a mesh the two are split differently.
  """
  return _look_up(table_VD, row_BL)


def _look_up_gradient(row_BL, gradients):
  dh_BLD, dtable_VD = gradients
  return dtable_VD.at[row_BL].add(dh_BLD, mode="promise_in_bounds"), None


_look_up_and_pass.defvjp(
  lambda table_VD, row_BL: (_look_up(table_VD, row_BL), row_BL), _look_up_gradient
)


def final_norm(model: Model, params: Params, h_BTD: Array) -> Array:
  """The last norm, each column once on a mesh."""
  return layers.norm(constraints.split_columns(h_BTD), params["final_norm"], model.network)


def apply_head(model: Model, params: Params, h_BTD: Array, *, decoding: bool = False) -> Array:
  """What `apply` returns, of what `hidden` does.

  `decoding`: params are from `decode_weights`, whose tables are gathered.
  """
  if model.head == "scalar":
    head = params["head"]
    return jnp.einsum("BTD,D->BT", h_BTD.astype(jnp.float32), head["w_D"]) + head["bias"]
  table_VD = lm_table(model, params).astype(h_BTD.dtype)
  if not decoding:
    h_BTD, table_VD = constraints.gather_columns(h_BTD), constraints.split_vocab(table_VD)
  # Contracted as the table lies: a transposed copy costs 1.7 times as much on CPU.
  logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, table_VD, preferred_element_type=jnp.float32)
  return logits_BTV if decoding else constraints.split_logits(logits_BTV)
