"""Reads GGUF files: weights as llama.cpp stores them, of the architectures in gguf_names.py.

Called through the package. Names, layout and quantisation are translated here, and the config in gguf_config.py, so
that other modules see the file as if it were a Hugging Face folder. Of data it imports the reader of headers only;
never stages.
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
from instructjax.models.interop import gguf_config, gguf_names, source

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
  keys = gguf_config.Keys(path, header.metadata)
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
  unread = gguf_config.unread_keys(keys, name)
  tensors = dict(header.tensors)
  _require_readable(path, tensors)
  # Some files hold a tied head a second time (so do ours). Without the copy the config below says "tied".
  if name in gguf_names.WITH_COPY and _is_tied_copy(path, tensors):
    del tensors["output.weight"]
  config = gguf_config.config(keys, name, tensors, lambda freqs: _read_freqs(path, freqs))
  # The config now says what the rotary tensor said. llama.cpp reads it for llama only: elsewhere it stays, and is
  # refused as unknown.
  if name == "llama":
    tensors.pop(gguf_names.ROPE_FREQS, None)
  stored = _stored(path, name, tensors, config)
  return source.Source(
    path=path,
    config=config,
    shapes={hf_name: one.shape for hf_name, one in stored.items()},
    read_rows=lambda hf_name, start, stop: stored[hf_name].read_rows(start, stop),
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
    heads = config["num_attention_heads"] if architecture.is_fused(name) else 0
    if heads and tensor.shape[0] % (3 * heads):
      raise UserError(
        f"{path}: tensor {shown(name)} of shape {tensor.shape} must have rows of {heads} queries, keys and"
        " values"
      )
    if rotary_dim and tensor.shape[0] % rotary_dim:
      raise UserError(
        f"{path}: tensor {shown(name)} of shape {tensor.shape} must have rows of whole heads of"
        f" {rotary_dim}"
      )
    result[hf_name] = _Stored(
      path,
      name,
      tensor,
      rotary_dim,
      architecture.is_transposed(name),
      heads,
      architecture.is_shifted(name),
    )
  return result


@dataclasses.dataclass(frozen=True)
class _Stored:
  """One tensor in a file, and what brings it into Hugging Face's layout."""

  path: pathlib.Path
  name: str
  tensor: gguf_header.Tensor
  rotary_dim: int  # the head size if the rows are permuted for llama.cpp's rotary pairs, else 0
  transposed: bool
  fused_heads: int = 0  # number of heads if their queries, keys and values are apart, else 0
  is_shifted: bool = False  # whether 1 is added to what Hugging Face stores

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

  def read_rows(self, start: int, stop: int) -> np.ndarray:
    """Rows of the tensor as float32. Little memory is needed beside the result.

    A vector, and a matrix whose rows the file does not hold one after the other, is read whole.

    Args:
      start, stop: the first row in Hugging Face's layout, and the one after the last.
    Raises:
      UserError: the file was cut off since it was opened.
    """
    if self.transposed or self.fused_heads or len(self.tensor.shape) == 1:
      return self._read(0, self.tensor.num_rows)[start:stop]
    # The rotary permutation moves rows within a head, so whole heads are read.
    heads = self.rotary_dim or 1
    first = start // heads * heads
    return self._read(first, -(-stop // heads) * heads)[start - first : stop - first]

  def _read(self, first: int, last: int) -> np.ndarray:
    """The rows `first` to `last` as they lie in the file, brought into Hugging Face's layout."""
    tensor = self.tensor
    value = np.empty((last - first, tensor.shape[-1]), np.float32)
    # Quantised blocks lie within rows, so any number of rows can be dequantised, as long as they are whole heads.
    heads = self.rotary_dim or 1
    step = max(_CHUNK // tensor.shape[-1] // heads, 1) * heads
    start = 0
    for raw in _raw_rows(self.path, self.name, tensor, step, first, last):
      rows = gguf.dequantize(raw, tensor.type)
      if self.rotary_dim:
        rows = gguf_names.split_halves(rows, self.rotary_dim, len(tensor.shape))
      value[start : start + len(raw)] = rows
      start += len(raw)
    value = value.reshape(-1, *tensor.shape[1:])
    if self.fused_heads:
      value = gguf_names.split_fused(value, self.fused_heads)
    if self.is_shifted:
      value -= 1
    return value.T if self.transposed else value


def _read_freqs(path: pathlib.Path, tensor: gguf_header.Tensor) -> np.ndarray:
  """rope_freqs.weight, as float32."""
  return _Stored(path, gguf_names.ROPE_FREQS, tensor, 0, False).read_rows(0, tensor.shape[0])


def _raw_rows(
  path: pathlib.Path,
  name: str,
  tensor: gguf_header.Tensor,
  step: int,
  first: int = 0,
  last: int | None = None,
) -> Iterator[np.ndarray]:
  """The bytes of rows `first` to `last`, uint8 [rows, bytes of a row], at most `step` rows at a time.

  Raises:
    UserError: the file ends before the tensor does.
  """
  with path.open("rb") as file:
    file.seek(tensor.offset + first * tensor.row_bytes)
    end = tensor.num_rows if last is None else last
    for start in range(first, end, step):
      count = min(step, end - start)
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
