"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): pure functions over parameter trees.

With `model.adapter` set, a stage trains an *adapter tree* in place of all weights: for each adapted matrix W two
factors A and B, whose product is added to it, W + alpha / rank * A B. The rest, the *base*, is an argument that no
step changes. `join` puts the two together into parameters that every forward pass takes; `merge` adds the products into
the weights, for files of other programs. Without an adapter the trained tree is the parameters, and every function here
passes them on.

A is random and B zero, so an adapter begins as nothing. Where a fused matrix stands for several of Hugging Face's
(q_proj, k_proj and v_proj; gate_proj and up_proj), each of them has its own factors, as in `peft`. GPT-2 has one matrix
for q, k and v in its files too, and so one pair of factors.

An adapter tree has its layers in one stack, even where the base's are a list: a list would make hundreds of small
arrays of it, each with operations of its own in the optimiser.

Called by the stages, train/, rl/ and serve/. The layers add the product, see `products.widen`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax.core.structs import Array, Params, tree_of
from instructjax.models import products, transformer
from instructjax.parallel import sharding, stacking

_FIRST_KEY = 2**20  # more than a network has layers
_fold_B = jax.vmap(jax.random.fold_in, (0, None))


@dataclasses.dataclass(frozen=True)
class Part:
  """A matrix of Hugging Face's layout inside one of our weights.

  Attributes:
    name: its name in the adapter tree.
    targets: the names in `adapter.targets` that adapt it; all or none of them.
    block, weight: where our weight is in a layer.
    inputs: how many of the weight's dimensions are contracted; they are the first.
    where: (dimension, start, stop) of the part inside the weight; None for the whole.
    squeezed: whether a part of size 1 has no dimension of its own.
    dims: letters of A's and B's dimensions.
  """

  name: str
  targets: tuple[str, ...]
  block: str
  weight: str
  inputs: int
  where: tuple[int, int, int] | None
  squeezed: bool
  dims: tuple[str, str]


def parts(network) -> tuple[Part, ...]:
  """The matrices of a layer that an adapter can have."""
  queries = network.num_heads // network.num_kv_heads
  qkv = functools.partial(Part, block="attention", weight="w_qkv_DGQK", inputs=1)
  if network.fused_qkv:
    attention = (qkv("qkv", ("q", "k", "v"), where=None, squeezed=False, dims=("DE", "EGQK")),)
  else:
    attention = (
      qkv("q", ("q",), where=(2, 0, queries), squeezed=False, dims=("DE", "EGRK")),
      qkv("k", ("k",), where=(2, queries, queries + 1), squeezed=True, dims=("DE", "EGK")),
      qkv("v", ("v",), where=(2, queries + 1, queries + 2), squeezed=True, dims=("DE", "EGK")),
    )
  whole = functools.partial(Part, where=None, squeezed=False)
  out = whole("out", ("out",), "attention", "w_out_GRKD", 3, dims=("GRKE", "ED"))
  down = whole("down", ("down",), "mlp", "w_down_FD", 1, dims=("FE", "ED"))
  if not network.is_gated:
    return (*attention, out, whole("up", ("up",), "mlp", "w_up_DF", 1, dims=("DE", "EF")), down)
  gated = functools.partial(Part, block="mlp", weight="w_gate_up_D2F", inputs=1, dims=("DE", "EF"))
  gate = gated("gate", ("gate",), where=(1, 0, 1), squeezed=True)
  up = gated("up", ("up",), where=(1, 1, 2), squeezed=True)
  return (*attention, out, gate, up, down)


def adapted(model: transformer.Model) -> tuple[Part, ...]:
  """The parts that the model's adapter has."""
  targets = set(model.require_adapter().targets)
  return tuple(part for part in parts(model.network) if targets & set(part.targets))


def _leaves(model: transformer.Model, make) -> Params:
  """The layers of an adapter tree: make(name of a leaf, (name, size) of each of a layer's dimensions)."""
  one = model.clone(execution=dataclasses.replace(model.execution, layers="unroll"))
  (layer, *_), (axes, *_) = (
    tree["layers"] for tree in (transformer.param_shapes(one), transformer.param_axes(one))
  )
  rank, tree = ("rank", model.require_adapter().rank), {}
  for part in adapted(model):
    shape, names = layer[part.block][part.weight].shape, axes[part.block][part.weight]
    dims = list(zip(names, shape))
    if part.where:
      dim, start, stop = part.where
      dims[dim : dim + 1] = [] if part.squeezed else [(names[dim], stop - start)]
    a, b = (*dims[: part.inputs], rank), (rank, *dims[part.inputs :])
    factors = {f"w_{x}_{letters}": pair for x, letters, pair in zip("ab", part.dims, (a, b))}
    tree.setdefault(part.block, {})[part.name] = {
      name: make(name, dims) for name, dims in factors.items()
    }
  return tree


def trained_shapes(model: transformer.Model) -> Params:
  """Shapes and dtypes of what a stage trains: the adapter tree with a scalar head, or all parameters."""
  shapes = transformer.param_shapes(model)
  if model.adapter is None:
    return shapes
  stack = (model.network.num_layers,)
  shape_of = lambda _, dims: jax.ShapeDtypeStruct((*stack, *(d[1] for d in dims)), jnp.float32)
  return _with_head(model, _leaves(model, shape_of), shapes)


def trained_axes(model: transformer.Model) -> Params:
  """Logical axis names in a tree like `trained_shapes`: those of the adapted weight, and `rank`."""
  axes = transformer.param_axes(model)
  if model.adapter is None:
    return axes
  return _with_head(model, _leaves(model, lambda _, dims: ("layers", *(d[0] for d in dims))), axes)


def _with_head(model: transformer.Model, of_layers: Params, params: Params) -> Params:
  """The trained tree: a scalar head is trained whole."""
  return {"layers": of_layers} | ({"head": params["head"]} if model.head == "scalar" else {})


def trained_shardings(mesh: Mesh, model: transformer.Model) -> tuple[Params, Params]:
  """Where the trained tree lies on a mesh: (NamedSharding of every leaf, `trained_shapes`).

  Raises:
    UserError: the mesh does not divide a leaf.
  """
  shapes = trained_shapes(model)
  return sharding.param_shardings(mesh, trained_axes(model), shapes), shapes


def init(model: transformer.Model, key: Array) -> Params:
  """A fresh trained tree, float32: A uniform within 1 / sqrt(inputs), as `peft` draws it, B zero, a head as usual."""
  if model.adapter is None:
    return transformer.init_params(model, key)
  num_layers = model.network.num_layers

  def draw(name, dims):
    shape = (num_layers, *(d[1] for d in dims))
    if name.startswith("w_b_"):
      return jnp.zeros(shape, jnp.float32)
    # nn.init.kaiming_uniform_(a=sqrt(5)) of PyTorch: gain sqrt(1 / 3), bound gain * sqrt(3 / inputs).
    bound = math.prod(shape[1:-1]) ** -0.5
    drawn.append(jax.random.fold_in(key, len(drawn)))
    return jax.random.uniform(drawn[-1], shape, jnp.float32, -bound, bound)

  drawn: list = []
  of_layers = _leaves(model, draw)
  # Only the head of the fresh parameters is used: under jit, XLA drops the rest.
  fresh = transformer.init_params(model, key) if model.head == "scalar" else {}
  return _with_head(model, of_layers, fresh)


def base_of(model: transformer.Model, params: Params) -> Params:
  """The base of a model, from parameters of a network of its shape: all of them, less what `join` replaces."""
  return {name: part for name, part in params.items() if name != "head" or model.head == "lm"}


def base_shardings(mesh: Mesh, model: transformer.Model) -> tuple[Params, ...]:
  """Where the base of an adapted model lies on a mesh, as one more argument of a step; () without an adapter.

  Raises:
    UserError: the mesh does not divide a parameter.
  """
  if model.adapter is None:
    return ()
  shapes = jax.eval_shape(functools.partial(freeze, model), transformer.param_shapes(model))
  axes = base_of(model, base_axes(shapes, transformer.param_axes(model)))
  return (sharding.param_shardings(mesh, axes, base_of(model, shapes)),)


def freeze(model: transformer.Model, params: Params) -> Params:
  """The base as forward passes read it: cast once to the dtype that they run in, matrices in 8 bits if configured.

  Args:
    model: with the adapter.
    params: float32 parameters.
  """
  if model.require_adapter().base == "int8":
    change = lambda layer: {name: _in_8_bits(model, name, block) for name, block in layer.items()}
    of_layers = params["layers"]
    is_list = isinstance(of_layers, list)
    done = [change(layer) for layer in of_layers] if is_list else jax.vmap(change)(of_layers)
    params = params | {"layers": done}
  return transformer.frozen_weights(model, params)


def _in_8_bits(model: transformer.Model, name: str, block: Params) -> Params:
  """A block of a layer with its matrices in 8 bits; biases and norms stay as they are."""
  inputs = {part.weight: part.inputs for part in parts(model.network) if part.block == name}
  return {
    key: products.quantised(leaf, inputs[key]) if key in inputs else leaf
    for key, leaf in block.items()
  }


def base_and(model: transformer.Model, inputs: tuple) -> tuple:
  """(base, batch) of a step's arguments after its state; the base is None without an adapter."""
  return (None, *inputs) if model.adapter is None else inputs


def drops(model: transformer.Model) -> bool:
  """Whether the model's adapter has dropout."""
  return model.adapter is not None and model.adapter.dropout > 0


def dropout_keys(model: transformer.Model, key: Array, num_rows: int) -> Array | None:
  """A key for each row, for `join`; None without dropout."""
  return jax.random.split(key, num_rows) if drops(model) else None


def join(
  model: transformer.Model, base: Params | None, trained: Params, key_B: Array | None = None
) -> Params:
  """Parameters for a forward pass: the base with the adapters' factors beside its weights. Traceable.

  Without an adapter it is the identity, and `base` is not read. Differentiate with respect to `trained`: the base then
  has no gradient, and none is computed.

  Args:
    model: whose `adapter` says what `trained` is.
    base: parameters of a network of this shape, with any head, from `freeze`. A scalar head comes from `trained`.
    trained: from `init`, or what training made of it.
    key_B: a typed key for each row, of the adapter's dropout; None for none.
  """
  if model.adapter is None or base is None:
    return trained
  of_layers, key_NB = base["layers"], None
  if key_B is not None and model.adapter.dropout:
    # Others than those of the residual dropout, which are folded by the layer's number.
    numbers_N = _FIRST_KEY + jnp.arange(model.network.num_layers)
    key_NB = jax.vmap(_fold_B, (None, 0))(key_B, numbers_N)
  pairs = jax.vmap(functools.partial(_pairs, model))(trained["layers"], key_NB)
  if isinstance(of_layers, list):
    pairs = stacking.unstacked(pairs)
    joined = [_beside(layer, pair) for layer, pair in zip(of_layers, pairs, strict=True)]
  else:
    joined = _beside(of_layers, pairs)
  return base | {"layers": joined} | ({"head": trained["head"]} if "head" in trained else {})


def joined(model: transformer.Model, base: tuple[Params, ...], trained: Params) -> Params:
  """`join` outside of a traced function, in which the base passes through uncopied.

  Args:
    model, trained: as for `join`.
    base: the base as one more argument of a step, see `base_shardings`; () without an adapter.
  """
  return join(model, base[0], trained) if base else trained


def _beside(layer: Params, pairs: Params) -> Params:
  return {name: {**part, **pairs.get(name, {})} for name, part in layer.items()}


def _pairs(model: transformer.Model, adapter: Params, key_B: Array | None) -> Params:
  """The low-rank products of one layer, by block and weight: parts of a fused weight are joined to one pair.

  The As of q, k and v stand side by side. Their Bs are the blocks of a matrix that is zero elsewhere, so that each part
  gets its own.

  Args:
    model: with the adapter.
    adapter: the layer's factors.
    key_B: of the layer's dropout, or None. Parts of one weight drop the same elements.
  """
  result, cfg = {}, model.require_adapter()
  network = model.network
  sizes = {"w_qkv_DGQK": network.num_heads // network.num_kv_heads + 2, "w_gate_up_D2F": 2}
  by_weight: dict[tuple[str, str], list] = {}
  for part in adapted(model):
    a, b = (adapter[part.block][part.name][f"w_{x}_{dims}"] for x, dims in zip("ab", part.dims))
    if part.where:
      dim, start, stop = (
        part.where
      )  # counted in the weight: B has the rank in place of one input dimension
      b = jnp.expand_dims(b, dim) if part.squeezed else b
      fill = [(0, 0)] * b.ndim
      fill[dim] = (start, sizes[part.weight] - stop)
      b = jnp.pad(b, fill)
    by_weight.setdefault((part.block, part.weight), []).append((a, b * (cfg.alpha / cfg.rank)))
  for index, ((block, weight), pairs) in enumerate(by_weight.items()):
    a, b = zip(*pairs)
    joined = products.LowRank(
      jnp.concatenate(a, axis=-1),
      jnp.concatenate(b, axis=0),
      None if key_B is None else _fold_B(key_B, index),
      cfg.dropout,
    )
    result.setdefault(block, {})[products.low_rank_name(weight)] = joined
  return result


def merge(model: transformer.Model, base: Params, trained: Params) -> Params:
  """Plain parameters of the adapted network, W + alpha / rank * A B, in the dtype of the base's weights.

  Args:
    model, trained: as for `join`.
    base: as for `join`, with float weights.
  """
  joined = join(model, base, trained)
  change = lambda layer: {name: _merged(part) for name, part in layer.items()}
  of_layers = joined["layers"]
  if isinstance(of_layers, list):
    return joined | {"layers": [change(layer) for layer in of_layers]}
  return joined | {"layers": jax.vmap(change)(of_layers)}


def _merged(block: Params) -> Params:
  """A block's weights with its low-rank products added in."""
  names = [name for name in block if not isinstance(block[name], products.LowRank)]
  result = {name: block[name] for name in names}
  for name in names:
    pair = block.get(products.low_rank_name(name))
    if pair is not None:
      product = jnp.tensordot(pair.w_a, pair.w_b, axes=1)
      result[name] = (block[name] + product).astype(block[name].dtype)
  return result


def base_axes(params: Params, axes: Params) -> Params:
  """The axes of joined parameters, from those of plain ones.

  Args:
    params: as `join` returns them, or plain.
    axes: from `transformer.param_axes`.
  """
  change = lambda layer, names: {
    block: {name: _axes(leaf, name, names[block]) for name, leaf in part.items()}
    for block, part in layer.items()
  }
  of_layers, of_axes = params["layers"], axes["layers"]
  if isinstance(of_layers, list):
    return axes | {"layers": [change(layer, names) for layer, names in zip(of_layers, of_axes)]}
  return axes | {"layers": change(of_layers, of_axes)}


def _axes(leaf, name: str, names: dict):
  if isinstance(leaf, products.Int8):
    # The scale has the axis of stacked layers, if there is one, and the outputs' dimensions.
    outputs = leaf.scale.ndim - (is_stack := names[name][:1] == ("layers",))
    stack = names[name][:is_stack]
    scale = (*stack, *names[name][len(names[name]) - outputs :])
    return tree_of(products.Int8, values=names[name], scale=scale)
  if not isinstance(leaf, products.LowRank):
    return names[name]
  of_weight = names[products.weight_name(name)]
  # The rank is A's last dimension and takes the inputs' place in B. Both have the axis of stacked layers, if there is
  # one, so it is what the two have more than the weight and two ranks.
  stack = of_weight[: leaf.w_a.ndim + leaf.w_b.ndim - 2 - len(of_weight)]
  inputs = leaf.w_a.ndim - 1
  a, b = (*of_weight[:inputs], "rank"), (*stack, "rank", *of_weight[inputs:])
  return tree_of(products.LowRank, w_a=a, w_b=b)
