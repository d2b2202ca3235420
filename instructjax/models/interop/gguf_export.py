"""Writes GGUF files that llama.cpp loads: language models of the architectures in gguf_names.py.

Called through the package. Never imports data or stages: the caller gives the tokenizer as metadata.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import gguf
import numpy as np

from instructjax.core import errors
from instructjax.core.errors import UserError
from instructjax.core.network import NetworkConfig, RopeScalingConfig
from instructjax.core.structs import Params
from instructjax.models import transformer
from instructjax.models.interop import gguf_names, hf_config, hf_keys, rotary, transfer
from instructjax.models.interop.stored import Stored

GgufType = Literal["f16", "q8_0"]  # of a file's matrices

_Type = gguf.GGMLQuantizationType
_KINDS = {
  "f16": (_Type.F16, gguf.LlamaFileType.MOSTLY_F16),
  "q8_0": (_Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_VALUE_TYPES = {
  bool: gguf.GGUFValueType.BOOL,
  int: gguf.GGUFValueType.UINT32,
  float: gguf.GGUFValueType.FLOAT32,
  str: gguf.GGUFValueType.STRING,
  list: gguf.GGUFValueType.ARRAY,
}


def write_file(
  path: str | os.PathLike,
  model: transformer.Model,
  params: Params | Stored,
  tokenizer_metadata: Mapping[str, Any],
  kind: GgufType = "f16",
  *,
  name: str = "instructjax",
):
  """Writes a file that llama.cpp loads, holding one tensor at a time in memory.

  Args:
    path: the new file; it appears when it is complete.
    model: with an 'lm' head.
    params: its parameters, on any devices, or where they are stored.
    tokenizer_metadata: by GGUF's own keys (`tokenizer.ggml.tokens`, `tokenizer.chat_template` ...). Python's int,
      float, bool, str and list become UINT32, FLOAT32, BOOL, STRING and ARRAY.
    kind: how matrices are stored. As in llama.cpp itself, vectors and positions stay float32, and a matrix whose rows
      cannot be divided into Q8_0's blocks of 32 is float16.
    name: general.name, which llama.cpp shows.
  Raises:
    UserError: the path exists, llama.cpp has no such model, the tokenizer and the model differ in the number of tokens,
      a weight is not finite or too large for `kind`, or the file cannot be written.
    ValueError: `kind` is none of those, tensor_table.py or gguf_names.py does not know this network, or `params` are
      those of another.
  """
  path = pathlib.Path(path)
  _require_writable(path, model, tokenizer_metadata, kind)
  family = hf_config.to_hf_config(model.network, model.vocab_size, model.head)["model_type"]
  arch = gguf_names.OF_FAMILY.get(family, family)
  _require_built_in(path, model.network, arch)
  # The file's header lists every tensor's shape and size, so all entries are known before the first tensor is made.
  entries = list(_entries(model, params, arch, kind))
  with errors.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_name(path.name + ".tmp")
  writer = gguf.GGUFWriter(scratch, arch)
  _add_metadata(writer, model, arch, kind, name, tokenizer_metadata)
  for entry in entries:
    writer.add_tensor_info(entry.name, entry.shape, np.dtype("f4"), entry.num_bytes, entry.type)
  try:
    with contextlib.closing(writer):
      with errors.writing(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
      for entry in entries:
        # Outside of `writing`: a weight that cannot be encoded is no failed write.
        data = _encode(path, entry)
        with errors.writing(path):
          writer.write_tensor_data(data)
    with errors.writing(path):
      os.replace(scratch, path)
  finally:
    scratch.unlink(missing_ok=True)


def _require_writable(
  path: pathlib.Path, model: transformer.Model, tokenizer_metadata: Mapping[str, Any], kind: str
):
  """Refuses what the user can mend before anything is computed.

  Raises:
    UserError: see `write_file`.
    ValueError: `kind` is none of GgufType.
  """
  if kind not in _KINDS:
    raise ValueError(f"kind={kind!r} of a GGUF file must be one of {', '.join(_KINDS)}")
  if model.head != "lm":
    raise UserError(
      f"{path}: a reward or value model cannot be written as GGUF, llama.cpp has no place for its"
      " head; write a Hugging Face folder"
    )
  if path.exists():
    raise UserError(f"{path} exists and is never overwritten; give another path or move it away")
  num_tokens = len(tokenizer_metadata["tokenizer.ggml.tokens"])
  if num_tokens != model.vocab_size:
    raise UserError(
      f"{path}: the tokenizer's {num_tokens} tokens must be the model's vocab_size={model.vocab_size}"
    )


def _require_built_in(path: pathlib.Path, cfg: NetworkConfig, arch: str):
  """Compares a network with what llama.cpp has built in for its architecture: no key of the file could tell it.

  Raises:
    UserError: they differ; the message names the switch.
  """

  def require(is_so: bool, switch: str, rule: str):
    if not is_so:
      raise UserError(
        f"{path}: {switch} cannot be written as GGUF: llama.cpp {rule}; write a Hugging Face folder"
      )

  every = lambda pattern: (pattern * cfg.num_layers)[: cfg.num_layers]
  pattern = f"layer_pattern={cfg.layer_pattern!r}"
  if cfg.rope_scaling.kind == "llama3":
    require(
      arch == "llama",
      "rope_scaling.kind='llama3'",
      f"reads divisors of frequencies for llama only, and this is {arch}",
    )
  if cfg.rope_scaling.kind == "yarn":
    scaling, fits = cfg.rope_scaling, arch != "gemma3" or not cfg.rope_scaling.attention_factor
    require(
      (scaling.low_freq_factor, scaling.high_freq_factor) == rotary.YARN_BETAS,
      f"rope_scaling.low_freq_factor={scaling.low_freq_factor:g}, high_freq_factor={scaling.high_freq_factor:g}",
      "has 1 and 32 built in for yarn",
    )
    require(
      fits,
      f"rope_scaling.attention_factor={scaling.attention_factor:g}",
      "multiplies local layers by it too",
    )
  if arch != "gemma3":
    window = cfg.attention_window
    require(not hf_keys.slides(cfg), f"attention_window={window}", f"has no windows for {arch}")
  if arch == "gptneox":
    require(cfg.mlp == "gelu_exact", f"mlp={cfg.mlp!r}", "knows one gelu of gptneox, gelu_exact")
  if arch == "smollm3":
    wanted = gguf_names.SMOLLM3_PATTERN
    require(
      every(cfg.layer_pattern).replace("L", "G") == every(wanted),
      pattern,
      f"has {wanted} for smollm3",
    )
    require(not cfg.use_bias, "use_bias=True", "has no biases for smollm3")
  if arch == "gemma3":
    wanted, base = gguf_names.GEMMA3_PATTERN, gguf_names.GEMMA3_LOCAL_BASE
    scalar = gguf_names.gemma3_scalar(cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.head_dim)
    found = cfg.query_pre_attn_scalar or cfg.head_dim
    require(every(cfg.layer_pattern) == every(wanted), pattern, f"has {wanted} for gemma3")
    local = f"rope_local_base={cfg.rope_local_base:g}"
    require(cfg.rope_local_base == base, local, f"has {base:g} for gemma3")
    require(found == scalar, f"query_pre_attn_scalar={found}", f"has {scalar} for this gemma3")


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One tensor to be written: its name, shape and type in the file, and a function that makes its value."""

  name: str
  shape: tuple[int, ...]
  type: gguf.GGMLQuantizationType
  make: Callable[[], np.ndarray]  # the value in `shape`

  @property
  def num_bytes(self) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
    return math.prod(self.shape) // block * block_bytes


def _entries(
  model: transformer.Model, params: Params | Stored, arch: str, kind: str
) -> Iterator[_Entry]:
  """All tensors in the file's order; nothing is computed yet."""
  architecture, cfg = gguf_names.ARCHITECTURES[arch], model.network
  # Llama 3's scaling is stored as its result: llama.cpp divides each rotary frequency by its factor in this tensor.
  if cfg.position == "rope" and cfg.rope_scaling.kind == "llama3":
    factors = gguf_names.llama3_factors(cfg.rope_scaling, cfg.rope_base, cfg.head_dim)
    yield _Entry(gguf_names.ROPE_FREQS, factors.shape, _Type.F32, lambda: factors)
  tensors = transfer.named_tensors(model, params)
  names = architecture.gguf_names([hf_name for hf_name, _, _ in tensors])
  for name, (_, shape, make) in zip(names, tensors, strict=True):
    if architecture.is_transposed(name):
      shape, make = shape[::-1], functools.partial(_transposed, make)
    if architecture.is_permuted(name):
      make = functools.partial(_interleaved, make, cfg.head_dim)
    if architecture.is_fused(name):
      make = functools.partial(_fused, make, cfg.num_heads)
    if architecture.is_shifted(name):
      make = functools.partial(_shifted, make)
    # A quantised block lies within a row, so Q8_0 needs rows of whole blocks.
    stored = _KINDS[kind][0]
    if len(shape) == 1 or gguf_names.part_of(name) == "position_embd":
      stored = _Type.F32
    elif shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
      stored = _Type.F16
    yield _Entry(name, tuple(shape), stored, make)
    if arch in gguf_names.WITH_COPY and name == "token_embd.weight" and cfg.tie_embeddings:
      # For GPT-2, llama.cpp before 2025 does not tie the head: it expects the table a second time. Of GPT-NeoX it
      # never does.
      yield _Entry("output.weight", tuple(shape), stored, make)


def _transposed(make) -> np.ndarray:
  return np.asarray(make()).T


def _fused(make, num_heads: int) -> np.ndarray:
  return gguf_names.fuse(np.asarray(make()), num_heads)


def _shifted(make) -> np.ndarray:
  return np.asarray(make()) + np.float32(1)


def _interleaved(make, head_dim: int) -> np.ndarray:
  return gguf_names.interleave_halves(np.asarray(make()), head_dim)


def _encode(path: pathlib.Path, entry: _Entry) -> np.ndarray:
  """The tensor's value as the bytes of its type.

  Raises:
    UserError: a value is not finite, or too large for the type.
  """
  value = np.asarray(entry.make(), np.float32)
  limit = float(np.finfo(np.float32 if entry.type == _Type.F32 else np.float16).max)
  if entry.type == _Type.Q8_0:
    limit *= 127  # a value is an int8, at most 127, times its block's float16 scale
  if not max(value.max(), -value.min()) <= limit:  # written so that NaN is refused too
    raise UserError(
      f"{path}: tensor {entry.name!r} has values that are not finite or too large for {entry.type.name}"
    )
  return gguf.quantize(value, entry.type)


def _add_yarn(writer: gguf.GGUFWriter, scaling: RopeScalingConfig):
  writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
  writer.add_rope_scaling_factor(scaling.factor)
  writer.add_rope_scaling_orig_ctx_len(scaling.original_length)
  if scaling.attention_factor:
    # llama.cpp multiplies by the default as well.
    default = 0.1 * math.log(scaling.factor) + 1.0
    writer.add_rope_scaling_attn_factors(scaling.attention_factor / default)


def _add_metadata(
  writer: gguf.GGUFWriter,
  model: transformer.Model,
  arch: str,
  kind: str,
  name: str,
  tokenizer_metadata: Mapping[str, Any],
):
  """Adds the keys that llama.cpp reads of such an architecture, and the tokenizer's."""
  cfg = model.network
  writer.add_type(gguf.GGUFType.MODEL)
  writer.add_name(name)
  writer.add_file_type(_KINDS[kind][1])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  writer.add_context_length(cfg.max_length)
  writer.add_embedding_length(cfg.d_model)
  writer.add_block_count(cfg.num_layers)
  writer.add_feed_forward_length(cfg.d_mlp)
  writer.add_head_count(cfg.num_heads)
  writer.add_vocab_size(model.vocab_size)
  if cfg.norm == "layernorm":
    writer.add_layer_norm_eps(cfg.norm_eps)
  else:
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
  if arch == "gptneox":
    writer.add_parallel_residual(cfg.parallel_residual)
  if arch == "gemma3":
    writer.add_sliding_window(cfg.attention_window)
  if cfg.position == "rope":
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_base)
    writer.add_rope_dimension_count(cfg.rotary_dim or cfg.head_dim)
    if cfg.rope_scaling.kind == "linear":
      writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
      writer.add_rope_scaling_factor(cfg.rope_scaling.factor)
    if cfg.rope_scaling.kind == "yarn":
      _add_yarn(writer, cfg.rope_scaling)
  for key, value in tokenizer_metadata.items():
    if value not in ("", []):  # GGUF has no empty arrays
      writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
