"""Reads the header of a GGUF file: its metadata, and the location of each tensor.

Called by models/interop/gguf_file.py for weights, and by tokenizer.py for the tokenizer inside such a file. Of the
`gguf` package, only the table of types is used: the package's own reader takes seconds for a vocabulary, and does not
notice when a file is truncated.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import itertools
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from instructjax.core import foreign
from instructjax.core.errors import UserError
from instructjax.core.foreign import shown

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# A vocabulary of a million tokens needs four arrays of a million items. More would fill the memory before weights do.
_MAX_ITEMS = 1 << 22  # of all arrays together
_MAX_ENTRIES = 1 << 17  # of keys, and of tensors; a model has hundreds
_MAX_DIMS = 4  # as in llama.cpp
_ALIGNMENT = 32  # alignment of the tensors' data if the file does not state one, in bytes
# Type ids of values, from the format's description. _SCALARS maps the other ids to codes of the struct module.
_STRING, _ARRAY = 8, 9
_SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
_WIDTHS = {kind: struct.calcsize("<" + code) for kind, code in _SCALARS.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """The location of one tensor and how it is stored."""

  type: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # in NumPy's order: the last dimension is contiguous
  offset: int  # bytes from the start of the file
  row_bytes: int  # bytes of one row along the last dimension

  @property
  def num_rows(self) -> int:
    return math.prod(self.shape[:-1])


@dataclasses.dataclass(frozen=True)
class Header:
  """Everything in a GGUF file except the weights."""

  metadata: dict[str, Any]  # values are numbers, booleans, strings, or lists of one of these types
  tensors: dict[str, Tensor]


def read(path: str | os.PathLike) -> Header:
  """Reads and checks the header. Every tensor that it lists is inside the file.

  Raises:
    UserError: the file cannot be read, is not a GGUF file of a known version and byte order, or is damaged or
      truncated, or two tensors share bytes. The message names the file and the place.
  """
  path = pathlib.Path(path)
  foreign.require_file(path)
  try:
    with path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      if size < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
        raise UserError(f"{path} is not a GGUF file: it must begin with the letters GGUF")
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(path, data))
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from error


class _Cursor:
  """Reads values one after another.

  All methods raise UserError if the file is damaged or ends too early. `inside` says in words what is being read, for
  the message.
  """

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self.path, self.data = path, data
    self.position = len(_MAGIC)
    self.inside = "the header"
    self.items = 0  # in arrays so far

  def error(self, problem: str) -> UserError:
    return UserError(f"{self.path} is damaged or cut off: {problem}")

  def take(self, count: int) -> bytes:
    end = self.position + count
    if end > len(self.data):
      raise self.error(f"it ends inside {self.inside}")
    taken, self.position = self.data[self.position : end], end
    return taken

  def number(self, code: str):
    return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

  def string(self) -> str:
    raw = self.take(self.number("Q"))
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError as error:
      raise self.error(f"{self.inside} holds text that is not UTF-8") from error

  def count(self, most: int, what: str) -> int:
    found = self.number("Q")
    if found > most:
      raise self.error(f"it says that it has {found} {what}, and at most {most} are read")
    return found

  def value(self):
    kind = self.number("I")
    if kind != _ARRAY:
      return self._scalar(kind)
    kind, count = self.number("I"), self.number("Q")
    if count * _WIDTHS.get(kind, 8) > len(self.data) - self.position:
      raise self.error(f"it ends inside {self.inside}")
    self.items += count
    if self.items > _MAX_ITEMS:
      raise self.error(f"{self.inside} and those before it have {self.items} items in arrays")
    # numpy decodes a whole array at once. A vocabulary has one score and one type per token, of which there may be over
    # a hundred thousand.
    if kind in _SCALARS:
      dtype = np.dtype("<" + _SCALARS[kind] if kind != 7 else "?")
      return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
    return [self._scalar(kind) for _ in range(count)]

  def _scalar(self, kind: int):
    if kind == _STRING:
      return self.string()
    if kind not in _SCALARS:
      raise self.error(f"{self.inside} has the unknown value type {kind}")
    return self.number(_SCALARS[kind])


def _parse(cursor: _Cursor) -> Header:
  version = cursor.number("I")
  # Versions are small numbers. If the low half is 0, the bytes are in the other order.
  if version & 0xFFFF == 0:
    raise UserError(
      f"{cursor.path} is a big-endian GGUF file; convert it to little-endian"
      " (llama.cpp's gguf_convert_endian.py)"
    )
  if version not in _VERSIONS:
    raise UserError(f"{cursor.path} is GGUF version {version}; versions 2 and 3 can be read")
  num_tensors = cursor.count(_MAX_ENTRIES, "tensors")
  num_keys = cursor.count(_MAX_ENTRIES, "metadata keys")
  metadata = {}
  for index in range(num_keys):
    cursor.inside = f"the name of metadata key {index + 1} of {num_keys}"
    key = cursor.string()
    cursor.inside = f"metadata key {shown(key)}"
    if key in metadata:
      raise cursor.error(f"{cursor.inside} is there twice")
    metadata[key] = cursor.value()
  entries = [_tensor_entry(cursor, index, num_tensors) for index in range(num_tensors)]
  # Offsets of tensors count from the end of the header, rounded up to the alignment.
  alignment = metadata.get("general.alignment", _ALIGNMENT)
  if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
    raise cursor.error(f"general.alignment={shown(alignment)} must be a positive power of two")
  start = -(-cursor.position // alignment) * alignment
  tensors = {}
  for name, kind, shape, offset in entries:
    if name in tensors:
      raise cursor.error(f"tensor {shown(name)} is there twice")
    tensors[name] = _tensor(cursor, name, kind, shape, start + offset)
  _require_apart(cursor, tensors)
  return Header(metadata, tensors)


def _require_apart(cursor: _Cursor, tensors: dict[str, Tensor]):
  """Raises UserError if two tensors share bytes: then one of them is not where it was written."""
  ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
  for (name, tensor), (after, other) in itertools.pairwise(ordered):
    if other.offset < tensor.offset + tensor.num_rows * tensor.row_bytes:
      raise cursor.error(f"tensors {shown(name)} and {shown(after)} share bytes")


def _tensor_entry(cursor: _Cursor, index: int, count: int) -> tuple[str, int, tuple[int, ...], int]:
  cursor.inside = f"the name of tensor {index + 1} of {count}"
  name = cursor.string()
  cursor.inside = f"the entry of tensor {shown(name)}"
  rank = cursor.number("I")
  if rank > _MAX_DIMS:
    raise cursor.error(f"{cursor.inside} has {rank} dimensions, and at most {_MAX_DIMS} are read")
  dims = [cursor.number("Q") for _ in range(rank)]
  # GGUF lists the contiguous dimension first, NumPy lists it last.
  return name, cursor.number("I"), tuple(reversed(dims)), cursor.number("Q")


def _tensor(cursor: _Cursor, name: str, kind: int, shape: tuple[int, ...], offset: int) -> Tensor:
  try:
    kind = gguf.GGMLQuantizationType(kind)
  except ValueError as error:
    raise UserError(
      f"{cursor.path}: tensor {shown(name)} has type {kind}, which the installed gguf package does not know"
    ) from error
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  if not shape or 0 in shape or shape[-1] % block:
    raise cursor.error(
      f"tensor {shown(name)} has shape {shape}; {kind.name} needs rows of a multiple of {block}"
    )
  tensor = Tensor(kind, shape, offset, shape[-1] // block * block_bytes)
  end = offset + tensor.num_rows * tensor.row_bytes
  if end > len(cursor.data):
    raise cursor.error(
      f"tensor {shown(name)} reaches to byte {end}, and the file has {len(cursor.data)}"
    )
  return tensor
