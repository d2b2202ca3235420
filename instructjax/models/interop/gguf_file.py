"""Reads GGUF files: Llama-family, Qwen2 and GPT-2 weights as llama.cpp stores them.

Called through the package. Names, layout, quantisation and config are translated here, so that other modules see the
file as if it were a Hugging Face folder. Of data it imports the reader of headers only; never stages.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.foreign import named, shown
from instructjax.data import gguf_header
from instructjax.models.interop import gguf_names, rotary, source

_Type = gguf.GGMLQuantizationType
_READABLE = (
  *(_Type.F32, _Type.F16, _Type.BF16, _Type.Q8_0, _Type.Q4_0, _Type.Q4_1, _Type.Q5_0, _Type.Q5_1),
  *(_Type.Q4_K, _Type.Q5_K, _Type.Q6_K),
)
_CHUNK = 1 << 20  # values dequantised at a time, which bounds the memory needed beside the result


def open_file(path: str | os.PathLike) -> source.Source:
  """Opens a GGUF file as a Source, which dequantises a tensor when it is read.

  Raises:
    UserError: the file is damaged, cut off or one part of several; its architecture, quantisation or rotary scaling is
      not supported; a metadata key is missing, or a tensor is unknown.
  """
  path = pathlib.Path(path)
  header = gguf_header.read(path)
  keys = _Keys(path, header.metadata)
  if keys.get("split.count", int, 1) > 1:
    raise UserError(
      f"{path} is one of {keys.get('split.count', int)} parts of a model; merge them with"
      " llama.cpp's `llama-gguf-split --merge` and give the merged file"
    )
  if keys.get("general.type", str, "model") != "model":
    raise UserError(
      f"{path}: general.type={shown(keys.get('general.type', str))} must be 'model'; merge an adapter"
      " into its base model first (llama.cpp's llama-export-lora)"
    )
  name = keys.get("general.architecture", str)
  if name not in gguf_names.ARCHITECTURES:
    known = ", ".join(gguf_names.ARCHITECTURES)
    raise UserError(f"{path}: general.architecture={shown(name)} must be one of {known}")
  unread = _unread_keys(keys, name, header.metadata)
  tensors = dict(header.tensors)
  _require_readable(path, tensors)
  # Some files hold GPT-2's tied head a second time (so do ours). Without the copy the config below says "tied".
  if name == "gpt2" and _is_tied_copy(path, tensors):
    del tensors["output.weight"]
  config = (_gpt2_config if name == "gpt2" else _llama_config)(keys, name, tensors)
  # The config now says what the rotary tensor said. llama.cpp reads it for llama only: elsewhere it stays, and is
  # refused as unknown.
  if name == "llama":
    tensors.pop(gguf_names.ROPE_FREQS, None)
  stored = _stored(path, name, tensors, config)
  return source.Source(
    path=path,
    config=config,
    shapes={hf_name: one.shape for hf_name, one in stored.items()},
    read=lambda hf_name: stored[hf_name].read(),
    files=(path,),
    notes=(f"metadata not read: {', '.join(map(named, unread[:8]))}",) if unread else (),
  )


def _require_readable(path: pathlib.Path, tensors: Mapping[str, gguf_header.Tensor]):
  """Raises UserError for a quantisation that cannot be read."""
  for name, tensor in tensors.items():
    if tensor.type not in _READABLE:
      known = ", ".join(kind.name for kind in _READABLE)
      raise UserError(
        f"{path}: tensor {shown(name)} has quantization {tensor.type.name}; one of {known} can be read"
      )


def _stored(
  path: pathlib.Path,
  architecture_name: str,
  tensors: Mapping[str, gguf_header.Tensor],
  config: Mapping[str, Any],
) -> dict[str, "_Stored"]:
  """Every tensor of the file, by Hugging Face's name.

  Raises:
    UserError: a tensor is unknown to the architecture, or does not consist of whole heads.
  """
  architecture = gguf_names.ARCHITECTURES[architecture_name]
  result = {}
  for name, tensor in tensors.items():
    hf_name = architecture.hf_name(name)
    if hf_name is None or len(tensor.shape) > 2:
      raise UserError(
        f"{path}: tensor {shown(name)} of shape {tensor.shape} is none of architecture"
        f" {architecture_name!r}"
      )
    rotary_dim = config["head_dim"] if architecture.is_permuted(name) else 0
    if rotary_dim and tensor.shape[0] % rotary_dim:
      raise UserError(
        f"{path}: tensor {shown(name)} of shape {tensor.shape} must have rows of whole heads of"
        f" {rotary_dim}"
      )
    result[hf_name] = _Stored(path, name, tensor, rotary_dim, architecture.is_transposed(name))
  return result


@dataclasses.dataclass(frozen=True)
class _Stored:
  """One tensor in a file, and what brings it into Hugging Face's layout."""

  path: pathlib.Path
  name: str
  tensor: gguf_header.Tensor
  rotary_dim: int  # the head size if the rows are permuted for llama.cpp's rotary pairs, else 0
  transposed: bool

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

  def read(self) -> np.ndarray:
    """The tensor as float32. Little memory is needed beside the result.

    Raises:
      UserError: the file was cut off since it was opened.
    """
    tensor = self.tensor
    value = np.empty((tensor.num_rows, tensor.shape[-1]), np.float32)
    # Quantised blocks lie within rows, so any number of rows can be dequantised. The rotary permutation moves rows
    # within a head, so a chunk holds whole heads.
    heads = self.rotary_dim or 1
    step = max(_CHUNK // tensor.shape[-1] // heads, 1) * heads
    start = 0
    for raw in _raw_rows(self.path, self.name, tensor, step):
      rows = gguf.dequantize(raw, tensor.type)
      if self.rotary_dim:
        rows = gguf_names.split_halves(rows, self.rotary_dim, len(tensor.shape))
      value[start : start + len(raw)] = rows
      start += len(raw)
    value = value.reshape(tensor.shape)
    return value.T if self.transposed else value


def _raw_rows(
  path: pathlib.Path, name: str, tensor: gguf_header.Tensor, step: int
) -> Iterator[np.ndarray]:
  """The tensor's bytes, uint8 [rows, bytes of a row], at most `step` rows at a time.

  Raises:
    UserError: the file ends before the tensor does.
  """
  with path.open("rb") as file:
    file.seek(tensor.offset)
    for start in range(0, tensor.num_rows, step):
      count = min(step, tensor.num_rows - start)
      raw = np.fromfile(file, np.uint8, count * tensor.row_bytes)
      if raw.size != count * tensor.row_bytes:
        raise UserError(f"{path} was cut off while tensor {name!r} was read")
      yield raw.reshape(count, tensor.row_bytes)


def _is_tied_copy(path: pathlib.Path, tensors: Mapping[str, gguf_header.Tensor]) -> bool:
  """Whether output.weight holds the same bytes as token_embd.weight, which are compared in chunks."""
  head, table = tensors.get("output.weight"), tensors.get("token_embd.weight")
  if head is None or table is None or (head.type, head.shape) != (table.type, table.shape):
    return False
  step = max(_CHUNK // head.row_bytes, 1)
  pairs = zip(
    _raw_rows(path, "output.weight", head, step), _raw_rows(path, "token_embd.weight", table, step)
  )
  return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


class _Keys:
  """Typed access to a file's metadata; every error names the file and the key."""

  def __init__(self, path: pathlib.Path, values: Mapping[str, Any]):
    self.path, self.values = path, values

  def get(self, key: str, kind: type, default: Any = None):
    """The value of a key, or `default` if the file does not have it.

    Raises:
      UserError: the value has another type, or it is missing and there is no default.
    """
    value = self.values.get(key, default)
    if value is None:
      raise UserError(f"{self.path}: metadata key {key!r} is missing")
    # `type`, not isinstance, below: a bool is an int to isinstance.
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise UserError(
        f"{self.path}: metadata key {key!r} must be one value of type {kind.__name__},"
        f" got {shown(value)}"
      )
    return value


def _llama_config(keys: _Keys, name: str, tensors: Mapping[str, gguf_header.Tensor]) -> dict:
  """The config.json of architecture `llama` (Llama and Mistral) or `qwen2`.

  Raises:
    UserError: a key is missing or has another type, or the network is not supported.
  """
  get = lambda key, kind, default=None: keys.get(f"{name}.{key}", kind, default)
  num_heads, width = get("attention.head_count", int), get("embedding_length", int)
  if not 0 < num_heads <= width:
    raise UserError(
      f"{keys.path}: {name}.attention.head_count={num_heads} must be positive and at most"
      f" {name}.embedding_length={width}"
    )
  head_dim = get("attention.key_length", int, width // num_heads)
  for key in ("attention.value_length", "rope.dimension_count"):
    if get(key, int, head_dim) != head_dim:
      raise UserError(
        f"{keys.path}: {name}.{key}={get(key, int)} must equal the width of a head, {head_dim}"
        f" ({name}.attention.key_length): heads that are rotated in part are not supported"
      )
  freqs = tensors.get(gguf_names.ROPE_FREQS) if name == "llama" else None
  read_freqs = None if freqs is None else lambda: _read_freqs(keys.path, freqs, head_dim)
  turning = rotary.from_gguf(get, keys.values, name, str(keys.path), head_dim, read_freqs)
  # In GGUF Mistral is no architecture of its own, but a `llama` with a sliding window.
  window, length = get("attention.sliding_window", int, 0), get("context_length", int)
  if window and name != "llama":
    if window < length:
      raise UserError(
        f"{keys.path}: {name}.attention.sliding_window={window} must reach over"
        f" {name}.context_length={length}"
      )
    window = 0
  config = {
    "model_type": "mistral" if window else name,
    "vocab_size": get("vocab_size", int, _vocab_size(keys, tensors)),
    "hidden_size": width,
    "intermediate_size": get("feed_forward_length", int),
    "num_hidden_layers": get("block_count", int),
    "num_attention_heads": num_heads,
    "num_key_value_heads": get("attention.head_count_kv", int, num_heads),
    "head_dim": head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": length,
    "rms_norm_eps": gguf_names.decimal(get("attention.layer_norm_rms_epsilon", float)),
    **rotary.to_config(turning),
    "tie_word_embeddings": "output.weight" not in tensors,
  }
  if window:
    config["sliding_window"] = window
  # GGUF has no key for biases: they are there or not. Qwen2 has them on queries, keys and values by definition.
  if name == "llama":
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
  return config


def _read_freqs(path: pathlib.Path, tensor: gguf_header.Tensor, head_dim: int) -> np.ndarray:
  """rope_freqs.weight; of another shape than [head_dim / 2] it is not read, and an empty array stands for it."""
  if tensor.shape != (head_dim // 2,):
    return np.empty(0, np.float32)
  return _Stored(path, gguf_names.ROPE_FREQS, tensor, 0, False).read()


def _gpt2_config(keys: _Keys, name: str, tensors: Mapping[str, gguf_header.Tensor]) -> dict:
  """The config.json of architecture `gpt2`; raises UserError for a missing key or one of another type."""
  get = lambda key, kind: keys.get(f"{name}.{key}", kind)
  return {
    "model_type": "gpt2",
    "vocab_size": _vocab_size(keys, tensors),
    "n_positions": get("context_length", int),
    "n_embd": get("embedding_length", int),
    "n_layer": get("block_count", int),
    "n_head": get("attention.head_count", int),
    "n_inner": get("feed_forward_length", int),
    "activation_function": "gelu_new",
    "layer_norm_epsilon": gguf_names.decimal(get("attention.layer_norm_epsilon", float)),
    "tie_word_embeddings": "output.weight" not in tensors,
  }


def _vocab_size(keys: _Keys, tensors: Mapping[str, gguf_header.Tensor]) -> int:
  """Rows of the embedding table; raises UserError if there is none."""
  if "token_embd.weight" not in tensors:
    raise UserError(f"{keys.path}: tensor 'token_embd.weight' is missing")
  return tensors["token_embd.weight"].shape[0]


# Metadata keys without the architecture, which is their first part. rotary.py judges those of `rope.`.
_READ = {
  *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
  *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
  *("attention.layer_norm_epsilon", "attention.key_length", "attention.value_length"),
  *("attention.sliding_window", "expert_count"),
}
# Keys by which llama.cpp computes something else -> the values with which they change nothing.
_MUST_BE = {
  "expert_count": (0,),
  "expert_used_count": (0,),
  "use_parallel_residual": (False,),
  "attention.causal": (True,),
  "attention.clamp_kqv": (0,),
  "attention.max_alibi_bias": (0,),
  "attention.scale": (0,),
  "attn_logit_softcapping": (0,),
  "final_logit_softcapping": (0,),
  "logit_scale": (0, 1),
  "embedding_scale": (0, 1),
  "residual_scale": (0, 1),
}
_HARMLESS = {"tensor_data_layout"}  # a note of the converter's


def _unread_keys(keys: _Keys, name: str, metadata: Mapping[str, Any]) -> list[str]:
  """The architecture's keys that nothing reads; those that would change the logits are refused.

  Raises:
    UserError: a key of `_MUST_BE` has another value.
  """
  unread = []
  for key, value in metadata.items():
    part = key.removeprefix(f"{name}.")
    if part == key or part.startswith("rope."):
      continue
    if part in _MUST_BE and not any(value == allowed for allowed in _MUST_BE[part]):
      only = " or ".join(map(repr, _MUST_BE[part]))
      raise UserError(f"{keys.path}: {key}={shown(value)} is not supported, only {only}")
    if part not in (*_READ, *_MUST_BE, *_HARMLESS):
      unread.append(key)
  return unread
