"""Which of Hugging Face's tensors holds which of our parameters, and in which order of dimensions.

There is one table for each family of architectures, used for import and export alike by transfer.py. huggingface.py
asks which tensors are buffers. Reads no file and holds no weights.

Hugging Face's tensors ("theirs") hold the same numbers as our parameters, with dimensions in another order. So a row of
the table names the tensor, the parameter, and the dimensions of both. Letters written together, as in "GRK D", are
joined to one dimension of theirs.

A table has exactly the rows of one network. `tensors` compares the two and refuses a parameter that no row fills, and a
row without a parameter. Otherwise an export could leave out a parameter, or an import leave one uninitialised, without
anyone noticing.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from instructjax.core.network import NetworkConfig
from instructjax.core.stages import Head
from instructjax.models.transformer import Model, param_shapes
from instructjax.parallel import stacking

# Attention masks and rotary tables, which old checkpoints hold beside the weights. The model computes them itself.
_BUFFER = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)$")
_LAYER = re.compile(
  r"(?:^|\.)(?:h|layers)\.(\d{1,9})\."
)  # gpt2's list of layers, and that of all others
LM_HEADS = ("lm_head.weight", "embed_out.weight")
_HEADS = (*LM_HEADS, "score.weight")  # outside of the trunk, so their names have no prefix


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of theirs and the place of its numbers in our parameters.

  Attributes:
    ours: path of our parameter. Under layers/ it means the stack, in which each layer has one slice.
    theirs: name of their tensor, with {} for the layer and without the family's prefix.
    their_dims: its dimensions, a word each. A word of several letters is their product, the first letter varying
      slowest.
    our_dims: the same letters in the order of our parameter (without the layers). If a letter differs from the one at
      the end of `ours`, the tensor fills only a part of that dimension: a row for the queries has R in place of Q.
    start: first index of that part.
  """

  ours: str
  theirs: str
  their_dims: str
  our_dims: str
  start: int = 0


def _gpt2() -> tuple[Row, ...]:
  """The rows of GPT-2. Its Conv1D stores matrices as [in, out], and one tensor holds queries, keys and values."""
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


def _gpt_neox() -> tuple[Row, ...]:
  """The rows of GPT-NeoX. Matrices are [out, in]; one holds each head's query, then its key, then its value."""
  attention, mlp = "layers.{}.attention", "layers.{}.mlp"
  return (
    Row("embedding/token_VD", "embed_in.weight", "V D", "VD"),
    Row("layers/attention_norm/scale_D", "layers.{}.input_layernorm.weight", "D", "D"),
    Row("layers/attention_norm/bias_D", "layers.{}.input_layernorm.bias", "D", "D"),
    Row("layers/mlp_norm/scale_D", "layers.{}.post_attention_layernorm.weight", "D", "D"),
    Row("layers/mlp_norm/bias_D", "layers.{}.post_attention_layernorm.bias", "D", "D"),
    Row("layers/attention/w_qkv_DGQK", f"{attention}.query_key_value.weight", "G3K D", "DG3K"),
    Row("layers/attention/b_qkv_GQK", f"{attention}.query_key_value.bias", "G3K", "G3K"),
    Row("layers/attention/w_out_GRKD", f"{attention}.dense.weight", "D GRK", "GRKD"),
    Row("layers/attention/b_out_D", f"{attention}.dense.bias", "D", "D"),
    Row("layers/mlp/w_up_DF", f"{mlp}.dense_h_to_4h.weight", "F D", "DF"),
    Row("layers/mlp/b_up_F", f"{mlp}.dense_h_to_4h.bias", "F", "F"),
    Row("layers/mlp/w_down_FD", f"{mlp}.dense_4h_to_h.weight", "D F", "FD"),
    Row("layers/mlp/b_down_D", f"{mlp}.dense_4h_to_h.bias", "D", "D"),
    Row("final_norm/scale_D", "final_layer_norm.weight", "D", "D"),
    Row("final_norm/bias_D", "final_layer_norm.bias", "D", "D"),
  )


def _llama(cfg: NetworkConfig, queries: int) -> tuple[Row, ...]:
  """The rows of Llama, Mistral, Qwen2, Qwen3, SmolLM3 and Gemma 3. Matrices are stored as [out, in].

  Args:
    cfg: its switches decide on biases (all, or those of queries, keys and values only) and norms.
    queries: number of query heads that share a key/value head; in our fused dimension Q the key comes after them, then
      the value.
  """
  attention, mlp = "layers.{}.self_attn", "layers.{}.mlp"
  qkv_biases = (
    Row("layers/attention/b_qkv_GQK", f"{attention}.q_proj.bias", "GRK", "GRK"),
    Row("layers/attention/b_qkv_GQK", f"{attention}.k_proj.bias", "G1K", "G1K", queries),
    Row("layers/attention/b_qkv_GQK", f"{attention}.v_proj.bias", "G1K", "G1K", queries + 1),
  )
  out_bias = Row("layers/attention/b_out_D", f"{attention}.o_proj.bias", "D", "D")
  gate_up_biases = (
    Row("layers/mlp/b_gate_up_2F", f"{mlp}.gate_proj.bias", "1F", "1F", 0),
    Row("layers/mlp/b_gate_up_2F", f"{mlp}.up_proj.bias", "1F", "1F", 1),
  )
  down_bias = Row("layers/mlp/b_down_D", f"{mlp}.down_proj.bias", "D", "D")
  head_norms = (
    Row("layers/attention/q_norm/scale_K", f"{attention}.q_norm.weight", "K", "K"),
    Row("layers/attention/k_norm/scale_K", f"{attention}.k_norm.weight", "K", "K"),
  )
  norm = lambda ours, theirs: Row(
    f"layers/{ours}/scale_D", f"layers.{{}}.{theirs}.weight", "D", "D"
  )
  # Llama calls the norm before the MLP by its place after attention. Gemma has a norm there, too.
  norms = (
    (
      norm("attention_out_norm", "post_attention_layernorm"),
      norm("mlp_norm", "pre_feedforward_layernorm"),
      norm("mlp_out_norm", "post_feedforward_layernorm"),
    )
    if cfg.sandwich_norm
    else (norm("mlp_norm", "post_attention_layernorm"),)
  )
  return (
    Row("embedding/token_VD", "embed_tokens.weight", "V D", "VD"),
    norm("attention_norm", "input_layernorm"),
    Row("layers/attention/w_qkv_DGQK", f"{attention}.q_proj.weight", "GRK D", "DGRK"),
    Row("layers/attention/w_qkv_DGQK", f"{attention}.k_proj.weight", "G1K D", "DG1K", queries),
    Row("layers/attention/w_qkv_DGQK", f"{attention}.v_proj.weight", "G1K D", "DG1K", queries + 1),
    *(qkv_biases if cfg.use_bias or cfg.qkv_bias else ()),
    *(head_norms if cfg.qk_norm else ()),
    Row("layers/attention/w_out_GRKD", f"{attention}.o_proj.weight", "D GRK", "GRKD"),
    *((out_bias,) if cfg.use_bias else ()),
    *norms,
    Row("layers/mlp/w_gate_up_D2F", f"{mlp}.gate_proj.weight", "1F D", "D1F", 0),
    Row("layers/mlp/w_gate_up_D2F", f"{mlp}.up_proj.weight", "1F D", "D1F", 1),
    *(gate_up_biases if cfg.use_bias else ()),
    Row("layers/mlp/w_down_FD", f"{mlp}.down_proj.weight", "D F", "FD"),
    *((down_bias,) if cfg.use_bias else ()),
    Row("final_norm/scale_D", "norm.weight", "D", "D"),
  )


_SCORE_HEAD = Row("head/w_D", "score.weight", "1 D", "D")
# This parameter has no row, because their score heads have no bias. It goes into LayerNorm's bias or into the config
# (see `transfer.named_tensors`).
SCORE_BIAS_PATH = "head/bias"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A row applied to one layer of one model, with sizes in place of letters.

  Attributes:
    name: their name, with the family's prefix.
    shape: of their tensor.
    param: path of our parameter.
    layer: index into the stack; None if the parameter is not stacked.
    unfold: their shape with joined dimensions taken apart.
    order: the transposition that takes the unfolded tensor to our order.
    part: the slice of our parameter (of one layer of it) that the tensor fills.
  """

  name: str
  shape: tuple[int, ...]
  param: str
  layer: int | None
  unfold: tuple[int, ...]
  order: tuple[int, ...]
  part: tuple[slice, ...]

  def alone(self) -> "Tensor":
    """The same tensor for a model whose layers are a list: the parameter is the layer's own, not a slice of a stack."""
    if self.layer is None:
      return self
    path = self.param.replace("layers/", f"layers/{self.layer}/", 1)
    return dataclasses.replace(self, param=path, layer=None)

  @property
  def row_axis(self) -> int | None:
    """The unfolded dimension whose indices are runs of rows of theirs; None if rows have no such dimension."""
    # The slowest one of the first word that is no 1.
    axis = next((axis for axis, size in enumerate(self.unfold) if size > 1), None)
    return None if axis is None or self.shape[0] == 1 else axis

  @property
  def rows_apart(self) -> int:
    """Rows of theirs that belong to one index of `row_axis`; for a tensor that has one."""
    axis = self.row_axis
    return 1 if axis is None else self.shape[0] // self.unfold[axis]

  def to_ours(self, tensor: np.ndarray) -> np.ndarray:
    """Their array in our order of dimensions, as a view; or some of its rows, whole indices of `row_axis`."""
    unfold = list(self.unfold)
    if self.row_axis is not None:
      unfold[self.row_axis] = len(tensor) // self.rows_apart
    return tensor.reshape(unfold).transpose(self.order)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Their array, from one layer of our parameter."""
    return array[self.part].transpose(np.argsort(self.order)).reshape(self.shape)


def tensors(model: Model) -> tuple[Tensor, ...]:
  """Every tensor that the model has in Hugging Face's layout, in Hugging Face's order.

  Raises:
    ValueError: the table does not know this network: a parameter is not filled by the rows, or a row has no parameter.
      This is a fault of the table, which the user cannot mend.
  """
  found = listed(model.network, model.vocab_size, model.head)
  _require_complete(model, found)
  return found


def listed(cfg: NetworkConfig, vocab_size: int, head: Head) -> tuple[Tensor, ...]:
  """The tensors of a network by the table alone: no model is made, so sizes may be those of a hostile file."""
  queries = cfg.num_heads // cfg.num_kv_heads
  if cfg.position == "learned":
    prefix, trunk = "transformer.", _gpt2()
  elif cfg.norm == "layernorm":
    prefix, trunk = "gpt_neox.", _gpt_neox()
  else:
    prefix, trunk = "model.", _llama(cfg, queries)
  last = _SCORE_HEAD if head == "scalar" else Row("head/w_VD", lm_head(cfg), "V D", "VD")
  rows = trunk if head == "lm" and cfg.tie_embeddings else (*trunk, last)
  sizes = dict(V=vocab_size, T=cfg.max_length, D=cfg.d_model, F=cfg.d_mlp, K=cfg.head_dim)
  sizes |= {"G": cfg.num_kv_heads, "R": queries, "1": 1, "3": 3}
  make = functools.partial(_tensor, sizes=sizes, prefix=prefix)
  stacked = [row for row in rows if row.ours.startswith("layers/")]
  first = rows.index(stacked[0])
  return (
    *(make(row, None) for row in rows[:first]),
    *(make(row, layer) for layer in range(cfg.num_layers) for row in stacked),
    *(make(row, None) for row in rows[first + len(stacked) :]),
  )


def _require_complete(model: Model, found: Sequence[Tensor]):
  """Compares the table with the network.

  Raises:
    ValueError: a row has no parameter, or a parameter has more or fewer numbers than its rows hold.
  """
  # Numbers are counted, not rows: a missing row of a fused parameter (the values, say) leaves a part of it unset.
  shapes = leaves(stacking.relay(param_shapes(model), stacking.stacked_shapes))
  sizes = {path: leaf.size for path, leaf in shapes.items() if path != SCORE_BIAS_PATH}
  filled = collections.Counter()
  for tensor in found:
    if tensor.param not in sizes:
      raise ValueError(
        f"tensor_table: the row of {tensor.name} fills {tensor.param}, which this network does not have"
      )
    filled[tensor.param] += math.prod(tensor.shape)
  for path, size in sizes.items():
    if filled[path] != size:
      raise ValueError(
        f"tensor_table: parameter {path} has {size} numbers and the table's rows hold {filled[path]}"
        " of them; no file could hold this network whole: add the row that is missing"
      )


def _tensor(row: Row, layer: int | None, sizes: dict[str, int], prefix: str) -> Tensor:
  """A row with the sizes of one model; layer None for a row outside of the layers."""
  # Without spaces, and without a 1 that only theirs has: the score head's matrix of one row is a vector here.
  letters = [x for x in row.their_dims if x in row.our_dims]
  whole = row.ours.rpartition("_")[2]  # the dimensions of the whole parameter: GQK of b_qkv_GQK
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


def leaves(tree) -> dict:
  """Path -> leaf, in the tree's order.

  A path is `layers/mlp/w_up_DF` if the layers are stacked, `layers/3/mlp/w_up_DF` if they are a list.
  """
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def is_buffer(name: str) -> bool:
  """Whether a tensor is a mask or a table that some files hold and no model needs."""
  return _BUFFER.search(name) is not None


def layers_in(names: Iterable[str]) -> set[int]:
  """The numbers of the layers that tensors of these names belong to."""
  return {int(match[1]) for name in names if (match := _LAYER.search(name))}


def lm_head(cfg: NetworkConfig) -> str:
  """The name of the tensor that the head of a language model has, if it is not tied to the embedding."""
  is_neox = cfg.position == "rope" and cfg.norm == "layernorm"
  return "embed_out.weight" if is_neox else "lm_head.weight"


def is_tied(model: Model) -> bool:
  """Whether the head is the embedding table, so that it has no tensor of its own."""
  return model.head == "lm" and model.network.tie_embeddings
