"""How our parameters lie in Hugging Face's tensors: one table a family, read in both directions.

`load_params` builds sharded parameters from an opened source, `named_tensors` takes parameters
apart for the writers. Called by the package's own `__init__`, huggingface.py and gguf_file.py.
Imports no stage and no data.

Both families hold the same numbers in another order, so a row of the table needs two strings: the
dimensions of their tensor (letters written together are one dimension of theirs) and of ours.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging

from instructjax.core.errors import UserError
from instructjax.core.structs import Params
from instructjax.models.interop.hf_config import PAD_ROW, SCORE_BIAS
from instructjax.models.interop.source import Source
from instructjax.models.transformer import Model, param_shapes
from instructjax.parallel import stacking

# Attention masks and rotary tables that old checkpoints hold besides the weights.
_BUFFER = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_HEADS = ("lm_head.weight", "score.weight")  # what carries no prefix


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of theirs and where it goes.

  Attributes:
    ours: path of our parameter; those under layers/ are stacked, one slice a layer.
    theirs: name, with {} for the layer.
    their_dims: its dimensions, one word each; letters of a word are joined, first one slowest.
    our_dims: the same letters as one layer of ours has them. Where that differs from the letters at
      the end of `ours`, the tensor fills only a part of that dimension, from `start` on.
    start: first index of that part.
  """

  ours: str
  theirs: str
  their_dims: str
  our_dims: str
  start: int = 0


def _gpt2() -> tuple[Row, ...]:
  """GPT-2: linear layers are stored [in, out], query, key and value lie in one tensor."""
  return (
    Row("embedding/token_VD", "wte.weight", "V D", "VD"),
    Row("embedding/position_TD", "wpe.weight", "T D", "TD"),
    Row("layers/attention_norm/scale_D", "h.{}.ln_1.weight", "D", "D"),
    Row("layers/attention_norm/bias_D", "h.{}.ln_1.bias", "D", "D"),
    Row("layers/attention/w_qkv_DGQK", "h.{}.attn.c_attn.weight", "D 3GK", "DG3K"),
    Row("layers/attention/b_qkv_GQK", "h.{}.attn.c_attn.bias", "3GK", "G3K"),
    Row("layers/attention/w_out_GRKD", "h.{}.attn.c_proj.weight", "GRK D", "GRKD"),
    Row("layers/attention/b_out_D", "h.{}.attn.c_proj.bias", "D", "D"),
    Row("layers/mlp_norm/scale_D", "h.{}.ln_2.weight", "D", "D"),
    Row("layers/mlp_norm/bias_D", "h.{}.ln_2.bias", "D", "D"),
    Row("layers/mlp/w_up_DF", "h.{}.mlp.c_fc.weight", "D F", "DF"),
    Row("layers/mlp/b_up_F", "h.{}.mlp.c_fc.bias", "F", "F"),
    Row("layers/mlp/w_down_FD", "h.{}.mlp.c_proj.weight", "F D", "FD"),
    Row("layers/mlp/b_down_D", "h.{}.mlp.c_proj.bias", "D", "D"),
    Row("final_norm/scale_D", "ln_f.weight", "D", "D"),
    Row("final_norm/bias_D", "ln_f.bias", "D", "D"),
  )


def _llama(queries: int) -> tuple[Row, ...]:
  """Llama, Mistral, Qwen2: linear layers are stored [out, in]; `queries` share a key/value head."""
  attention, mlp = "layers.{}.self_attn", "layers.{}.mlp"
  return (
    Row("embedding/token_VD", "embed_tokens.weight", "V D", "VD"),
    Row("layers/attention_norm/scale_D", "layers.{}.input_layernorm.weight", "D", "D"),
    Row("layers/attention/w_qkv_DGQK", f"{attention}.q_proj.weight", "GRK D", "DGRK"),
    Row("layers/attention/w_qkv_DGQK", f"{attention}.k_proj.weight", "G1K D", "DG1K", queries),
    Row("layers/attention/w_qkv_DGQK", f"{attention}.v_proj.weight", "G1K D", "DG1K", queries + 1),
    Row("layers/attention/b_qkv_GQK", f"{attention}.q_proj.bias", "GRK", "GRK"),
    Row("layers/attention/b_qkv_GQK", f"{attention}.k_proj.bias", "G1K", "G1K", queries),
    Row("layers/attention/b_qkv_GQK", f"{attention}.v_proj.bias", "G1K", "G1K", queries + 1),
    Row("layers/attention/w_out_GRKD", f"{attention}.o_proj.weight", "D GRK", "GRKD"),
    Row("layers/attention/b_out_D", f"{attention}.o_proj.bias", "D", "D"),
    Row("layers/mlp_norm/scale_D", "layers.{}.post_attention_layernorm.weight", "D", "D"),
    Row("layers/mlp/w_gate_up_D2F", f"{mlp}.gate_proj.weight", "1F D", "D1F", 0),
    Row("layers/mlp/w_gate_up_D2F", f"{mlp}.up_proj.weight", "1F D", "D1F", 1),
    Row("layers/mlp/b_gate_up_2F", f"{mlp}.gate_proj.bias", "1F", "1F", 0),
    Row("layers/mlp/b_gate_up_2F", f"{mlp}.up_proj.bias", "1F", "1F", 1),
    Row("layers/mlp/w_down_FD", f"{mlp}.down_proj.weight", "D F", "FD"),
    Row("layers/mlp/b_down_D", f"{mlp}.down_proj.bias", "D", "D"),
    Row("final_norm/scale_D", "norm.weight", "D", "D"),
  )


_HEAD_ROWS = (
  Row("head/w_VD", "lm_head.weight", "V D", "VD"),
  Row("head/w_D", "score.weight", "1 D", "D"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A row for one layer of one model: sizes in place of letters.

  Attributes:
    name: with the family's prefix.
    shape: of their tensor.
    param: path of our parameter.
    layer: index into its stack, None where it is in none.
    unfold: their shape with joined dimensions taken apart.
    order: transposition of that to ours.
    part: where it lies in (one layer of) our parameter.
  """

  name: str
  shape: tuple[int, ...]
  param: str
  layer: int | None
  unfold: tuple[int, ...]
  order: tuple[int, ...]
  part: tuple[slice, ...]

  def alone(self) -> "Tensor":
    """The same where layers are no stack: its parameter is the layer's own."""
    if self.layer is None:
      return self
    path = self.param.replace("layers/", f"layers/{self.layer}/", 1)
    return dataclasses.replace(self, param=path, layer=None)

  def to_ours(self, tensor: np.ndarray) -> np.ndarray:
    """Our view of their array, more rows than the vocabulary included."""
    unfold = (-1, *self.unfold[1:]) if len(tensor) > self.shape[0] else self.unfold
    return tensor.reshape(unfold).transpose(self.order)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Their array out of one layer of our parameter."""
    return array[self.part].transpose(np.argsort(self.order)).reshape(self.shape)


def tensors(model: Model) -> tuple[Tensor, ...]:
  """Every tensor that the model has in Hugging Face's layout, in their order."""
  cfg = model.network
  queries = cfg.num_heads // cfg.num_kv_heads
  prefix, trunk = (
    ("transformer.", _gpt2()) if cfg.position == "learned" else ("model.", _llama(queries))
  )
  sizes = dict(V=model.vocab_size, T=cfg.max_length, D=cfg.d_model, F=cfg.d_mlp, K=cfg.head_dim)
  sizes |= {"G": cfg.num_kv_heads, "R": queries, "1": 1, "3": 3}
  make = functools.partial(_tensor, sizes=sizes, prefix=prefix)
  known = _leaves(stacking.relay(param_shapes(model), stacking.stacked_shapes))
  rows = [row for row in (*trunk, *_HEAD_ROWS) if row.ours in known]
  stacked = [row for row in rows if row.ours.startswith("layers/")]
  first = rows.index(stacked[0])
  return (
    *(make(row, None) for row in rows[:first]),
    *(make(row, layer) for layer in range(cfg.num_layers) for row in stacked),
    *(make(row, None) for row in rows[first + len(stacked) :]),
  )


def _tensor(row: Row, layer: int | None, sizes: dict[str, int], prefix: str) -> Tensor:
  letters = [x for x in row.their_dims if x in row.our_dims]
  whole = row.ours.rpartition("_")[2]
  part = (
    slice(None) if ours == theirs else slice(row.start, row.start + sizes[ours])
    for ours, theirs in zip(row.our_dims, whole)
  )
  return Tensor(
    name=("" if row.theirs in _HEADS else prefix) + row.theirs.format(layer),
    shape=tuple(math.prod(sizes[x] for x in word) for word in row.their_dims.split()),
    param=row.ours,
    layer=layer,
    unfold=tuple(sizes[x] for x in letters),
    order=tuple(letters.index(x) for x in row.our_dims),
    part=tuple(part),
  )


def _leaves(tree) -> dict:
  """Path -> leaf, in the tree's order: layers/mlp/w_up_DF of a stack, layers/3/mlp/w_up_DF of a list."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_buffer(name: str) -> bool:
  """Whether a tensor is a table that some files hold and no model needs."""
  return _BUFFER.search(name) is not None


# --- in -------------------------------------------------------------------------------------------


def load_params(source: Source, model: Model, shardings: Params) -> Params:
  """The model's parameters, each tensor read once and written straight into the local shards.

  Host memory: one tensor of the source, besides the shards of this process. The largest parameters
  come first, so that what a transfer needs besides is freed before the rest is there.

  Args:
    source: opened weights.
    model: of the architecture that `describe(source)` gives. With a smaller vocabulary than the
      tables have rows, the rest (padding that no text encodes to) is dropped.
    shardings: of every parameter.
  Returns:
    float32 parameters. A scalar head's bias is the config's instructjax_score_bias, or 0.
  Raises:
    UserError: a tensor is missing, left over, or of another shape. Nothing has been read then.
  """
  wanted = _match(source, model)
  _require_tied_copy_equal(source, model, wanted)
  by_param: dict[str, list] = {}
  for tensor in wanted:
    tensor = tensor if model.execution.layers == "scan" else tensor.alone()
    by_param.setdefault(tensor.param, []).append(tensor)
  tree = param_shapes(model)
  shapes, places = _leaves(tree), _leaves(shardings)
  params = {}
  for path in sorted(shapes, key=lambda name: -shapes[name].size):
    shape = shapes[path].shape
    if path == "head/bias":
      bias = np.asarray(source.config[SCORE_BIAS] if SCORE_BIAS in source.config else 0, np.float32)
      params[path] = jax.device_put(bias, places[path])
    else:
      params[path] = _assemble(source, by_param[path], shape, places[path])
  # In the order of the model's own parameters.
  return jax.tree.unflatten(jax.tree.structure(tree), [params[path] for path in shapes])


def _match(source: Source, model: Model) -> list[Tensor]:
  """The model's tensors under the names that the source has for them, all of them or an error."""
  wanted = tensors(model)
  prefix = wanted[0].name.partition(".")[0] + "."
  bare = not any(name.startswith(prefix) for name in source.shapes)
  if bare:  # saved from the trunk's own class
    wanted = tuple(dataclasses.replace(t, name=t.name.removeprefix(prefix)) for t in wanted)
  by_name = {tensor.name: tensor for tensor in wanted}
  missing = [name for name in by_name if name not in source.shapes]
  known = by_name.keys() | ({"lm_head.weight"} if _is_tied(model) else set())
  extra = [name for name in source.shapes if name not in known and not is_buffer(name)]
  for names, what in ((missing, "lacks"), (extra, "has, and this model has no place for,")):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise UserError(
        f"{source.path} {what} tensor {names[0]}{more}; the config must fit the weights"
      )
  dropped = 0
  for name, tensor in by_name.items():
    shape, rows = tuple(source.shapes[name]), tensor.param.endswith("_VD")
    if shape[1:] != tensor.shape[1:] or (
      shape[0] < tensor.shape[0] if rows else shape != tensor.shape
    ):
      raise UserError(
        f"{source.path}: tensor {name} has shape {list(shape)}, and the model needs"
        f" {list(tensor.shape)}{' or more rows' if rows else ''}"
      )
    dropped = max(dropped, shape[0] - tensor.shape[0]) if rows else dropped
  if dropped > (PAD_ROW in source.config):
    logging.warning(
      "%s: %d rows of the embedding past the vocabulary dropped", source.path, dropped
    )
  return list(wanted)


def _is_tied(model: Model) -> bool:
  return model.head == "lm" and model.network.tie_embeddings


def _require_tied_copy_equal(source: Source, model: Model, wanted: list[Tensor]):
  """Old files hold the tied head a second time: harmless if it is the embedding."""
  if not _is_tied(model) or "lm_head.weight" not in source.shapes:
    return
  embedding = next(tensor.name for tensor in wanted if tensor.param == "embedding/token_VD")
  if not np.array_equal(source.read(embedding), source.read("lm_head.weight")):
    raise UserError(
      f"{source.path}: tensor lm_head.weight differs from {embedding}, and the config ties them; set"
      " tie_word_embeddings to false in config.json if the head is meant to differ"
    )


def _assemble(source: Source, parts: list[Tensor], shape: tuple[int, ...], place) -> jax.Array:
  """One parameter on its devices: every tensor is read once and copied into all local shards."""
  buffers = {}
  for index in place.addressable_devices_indices_map(shape).values():
    key = _bounds(index, shape)
    if key not in buffers:
      buffers[key] = _empty([stop - start for start, stop in key])
  for part in parts:
    stack = () if part.layer is None else (slice(part.layer, part.layer + 1),)
    covered = _bounds((*stack, *part.part), shape)
    targets = [
      (buffer[inner], outer)
      for key, buffer in buffers.items()
      for inner, outer in [_overlap(key, covered)]
      if inner is not None
    ]
    if not targets:
      continue
    ours = part.to_ours(source.read(part.name))
    ours = ours if part.layer is None else ours[None]
    for target, outer in targets:
      target[...] = ours[outer]
    del ours  # before the next one is read
  return jax.make_array_from_callback(shape, place, lambda index: buffers[_bounds(index, shape)])


def _empty(shape: list[int]) -> np.ndarray:
  """float32 at a multiple of 64 bytes: so placed, the CPU backend takes it over without a copy."""
  size = math.prod(shape)
  raw = np.empty(size + 16, np.float32)
  skip = -raw.ctypes.data % 64 // 4
  return raw[skip : skip + size].reshape(shape)


def _bounds(index, shape) -> tuple[tuple[int, int], ...]:
  """(start, stop) of each dimension; a hashable index."""
  return tuple(piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True))


def _overlap(shard, part):
  """What a shard and a part have in common: the index into the shard, the index into the part."""
  both = [(max(s[0], p[0]), min(s[1], p[1])) for s, p in zip(shard, part)]
  if any(start >= stop for start, stop in both):
    return None, None
  within = lambda outer: tuple(
    slice(start - o[0], stop - o[0]) for (start, stop), o in zip(both, outer)
  )
  return within(shard), within(part)


# --- out ------------------------------------------------------------------------------------------


def named_tensors(
  model: Model, params: Params
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
  """Every tensor for export as (name, shape, make): `make()` brings one layer's tensor to the host.

  A scalar head is exported so that `transformers` gives the same scores: one more row of the
  embedding is the pad token it looks for, and LayerNorm's bias takes up the score's (see
  `folded_bias`; RMSNorm has none).
  """
  flat, is_scalar = _leaves(params), model.head == "scalar"
  is_list = isinstance(params["layers"], list)
  for tensor in tensors(model):

    def make(tensor=tensor):
      tensor = tensor.alone() if is_list else tensor
      array = flat[tensor.param]
      if tensor.layer is not None:
        # A traced index: one compilation for all layers.
        array = jax.lax.dynamic_index_in_dim(array, np.int32(tensor.layer), keepdims=False)
      array = np.asarray(array, np.float32)
      if is_scalar and tensor.param == "embedding/token_VD":
        return np.pad(array, ((0, 1), (0, 0)))
      if is_scalar and tensor.param == "final_norm/bias_D":
        return array + folded_bias(flat["head/w_D"], flat["head/bias"])
      return tensor.to_theirs(array)

    rows = tensor.shape[0] + (is_scalar and tensor.param == "embedding/token_VD")
    yield tensor.name, (rows, *tensor.shape[1:]), make


def folded_bias(w_D, bias) -> np.ndarray:
  """What LayerNorm's bias must grow by for w . (LN + it) to be w . LN + bias; zeros for no bias."""
  w_D, bias = np.asarray(w_D, np.float64), float(bias)
  return (bias * w_D / max(float(w_D @ w_D), np.finfo(np.float32).tiny)).astype(np.float32)
