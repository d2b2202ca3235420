"""Token ids of many sequences on disk, end to end in one file, of which a batch reads its own.

Called by token_cache.py. A store is a folder:
  tokens: the ids, little-endian uint16, or uint32 for vocabularies of more than 65,536 ids.
  ends: where each sequence ends among the ids.
  unweighted: the number of leading tokens of each sequence that carry no loss, if it holds demonstrations.
  header.json: types, sizes and checksums of the other files, and its own checksum.
Rows that were packed for one length are a folder too, with a file for each array of `packing.PackedRows`.

Ids are read with `pread`, not mapped: pages of a mapped file would count as this process's memory.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.data import packing
from instructjax.data.packing import Damaged, PackedRows

_TOKENS, _ENDS, _UNWEIGHTED, _HEADER = "tokens", "ends", "unweighted", "header.json"
_BLOCK = 1 << 22  # bytes written or checked at a time
_INDEX = ("start_N", "size_N", "num_unweighted_N", "first_R", "crc_R")


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Token ids, and how many of them carry no loss."""

  ids: list[int]
  num_unweighted: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
  """Token ids of many sequences.

  Attributes:
    end_S: where each sequence ends among the ids of all.
    num_unweighted_S: number of leading tokens of each sequence that carry no loss; None for 0.
    read: (start, stop) -> the bytes of those ids.
    dtype: type of the ids there.
    left_out: reason -> how many records were left out, and where the first one stood.
  """

  end_S: np.ndarray
  num_unweighted_S: np.ndarray | None
  read: packing.Read
  dtype: np.dtype
  left_out: Mapping[str, Sequence]

  @property
  def num_tokens(self) -> int:
    return int(self.end_S[-1]) if len(self.end_S) else 0

  def __len__(self) -> int:
    return len(self.end_S)

  def __getitem__(self, number: int) -> Encoded:
    start = int(self.end_S[number - 1]) if number else 0
    ids = np.frombuffer(self.read(start, int(self.end_S[number])), self.dtype).tolist()
    unweighted = self.num_unweighted_S
    return Encoded(ids, 0 if unweighted is None else int(unweighted[number]))

  def __iter__(self) -> Iterator[Encoded]:
    return (self[number] for number in range(len(self)))

  def pack(self, length: int, vocab_size: int, *, splits: bool) -> PackedRows:
    """See `packing.pack_rows`."""
    return packing.pack_rows(
      self.read,
      self.dtype,
      self.end_S,
      self.num_unweighted_S,
      length=length,
      vocab_size=vocab_size,
      splits=splits,
    )


def dtype_of(vocab_size: int) -> np.dtype:
  """The type of ids on disk."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Writer:
  """Writes a store, sequence by sequence.

  Attributes:
    num_bytes: bytes of ids so far.
  """

  def __init__(self, folder: pathlib.Path, vocab_size: int):
    """Makes the folder.

    Raises:
      OSError: it cannot be made.
    """
    self._folder, self._dtype = folder, dtype_of(vocab_size)
    folder.mkdir(parents=True)
    self._file = open(folder / _TOKENS, "wb", buffering=_BLOCK)
    self._ends, self._unweighted = [], []
    self._crc, self.num_bytes = 0, 0

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # What could not be written before cannot be written now either.
    with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
      self._file.close()

  def add(self, sequence: Encoded):
    """Appends a sequence.

    Raises:
      OSError: it cannot be written.
    """
    part = np.array(sequence.ids, self._dtype).tobytes()
    self._file.write(part)
    self._crc = zlib.crc32(part, self._crc)
    self.num_bytes += len(part)
    self._ends.append(self.num_bytes // self._dtype.itemsize)
    self._unweighted.append(sequence.num_unweighted)

  def finish(self, left_out: Mapping[str, Sequence], about: Mapping[str, Any]):
    """Completes the store.

    Args:
      left_out: see `TokenStore`.
      about: what it was made of, for whoever looks into the folder.
    Raises:
      OSError: it cannot be written.
    """
    self._file.flush()
    os.fsync(self._file.fileno())
    arrays = {_ENDS: np.array(self._ends, np.int64)}
    if any(self._unweighted):
      arrays[_UNWEIGHTED] = packing.smallest(np.array(self._unweighted, np.int64))
    crcs = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()} | {
      _TOKENS: self._crc
    }
    header = {"dtype": self._dtype.str, "crcs": crcs, "left_out": left_out, "about": about}
    _write_folder(self._folder, arrays, header)


def open_store(folder: pathlib.Path) -> TokenStore | None:
  """Opens a store without reading its ids; None if there is none.

  Raises:
    Damaged: a file is not there, or has not the size that it had when it was written.
  """
  header = _read_header(folder)
  if header is None:
    return None
  arrays, dtype = _map_arrays(folder, header), np.dtype(header["dtype"])
  return TokenStore(
    end_S=arrays[_ENDS],
    num_unweighted_S=arrays.get(_UNWEIGHTED),
    read=_reader(folder / _TOKENS, dtype.itemsize),
    dtype=dtype,
    left_out=header["left_out"],
  )


def check_store(folder: pathlib.Path):
  """Reads all files, once, before rows are packed of them. From then on each row has its own checksum.

  Raises:
    Damaged: they are not what was written.
  """
  for name, expected in (_read_header(folder) or {"crcs": {"": 0}})["crcs"].items():
    crc = 0
    try:
      with open(folder / name, "rb") as file:
        while block := file.read(_BLOCK):
          crc = zlib.crc32(block, crc)
    except OSError as error:
      raise Damaged(f"{folder / name}: {error.strerror}") from error
    if crc != expected:
      raise Damaged(f"{folder / name}: its checksum is another")


def write_rows(folder: pathlib.Path, rows: PackedRows):
  """Writes which pieces lie in which row.

  Raises:
    OSError: it cannot be written.
  """
  folder.mkdir(parents=True)
  arrays = {name: getattr(rows, name) for name in _INDEX}
  about = {name: getattr(rows, name) for name in ("length", "vocab_size", "checksum")}
  _write_folder(folder, {k: a for k, a in arrays.items() if a is not None}, {"rows": about})


def open_rows(folder: pathlib.Path, store: TokenStore) -> PackedRows | None:
  """Opens rows that `write_rows` wrote of this store; None if there are none.

  Raises:
    Damaged: a file is not there, or has not the size that it had when it was written.
  """
  header = _read_header(folder)
  if header is None:
    return None
  arrays, about = _map_arrays(folder, header), header["rows"]
  return PackedRows(
    length=about["length"],
    vocab_size=about["vocab_size"],
    read=store.read,
    dtype=store.dtype,
    start_N=arrays["start_N"],
    size_N=arrays["size_N"],
    num_unweighted_N=arrays.get("num_unweighted_N"),
    first_R=arrays["first_R"],
    crc_R=arrays["crc_R"],
    checksum=about["checksum"],
  )


def _reader(path: pathlib.Path, itemsize: int) -> packing.Read:
  """A function that reads ids of the file, which stays open as long as the function is used."""
  descriptor = os.open(path, os.O_RDONLY)

  def read(start: int, stop: int) -> bytes:
    size = (stop - start) * itemsize
    try:
      part = os.pread(descriptor, size, start * itemsize)
    except (OSError, OverflowError) as error:
      raise Damaged(f"{path}: {error}") from error
    if len(part) != size:
      raise Damaged(f"{path}: it ends too early")
    return part

  weakref.finalize(read, os.close, descriptor)
  return read


def _map_arrays(folder: pathlib.Path, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a folder, of which the pages that are used are read."""
  return {
    # An empty file cannot be mapped.
    name: np.memmap(folder / name, dtype, "r") if header["sizes"][name] else np.zeros(0, dtype)
    for name, dtype in header["arrays"].items()
  }


def _write_folder(
  folder: pathlib.Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]
):
  """Writes arrays, and last the header, with the sizes of all files."""
  for name, array in arrays.items():
    _write(folder / name, array.tobytes())
  dtypes = {name: array.dtype.str for name, array in arrays.items()}
  sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
  body = json.dumps({**header, "arrays": dtypes, "sizes": sizes}, indent=1, sort_keys=True)
  outer = {"check": hashlib.sha256(body.encode()).hexdigest(), "header": body}
  _write(folder / _HEADER, json.dumps(outer).encode())


def _write(path: pathlib.Path, content: bytes):
  with open(path, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _read_header(folder: pathlib.Path) -> dict | None:
  """A folder's header; None if there is no such folder.

  Raises:
    Damaged: the header is damaged, or a file has another size than it says.
  """
  if not folder.exists():
    return None
  try:
    outer = json.loads((folder / _HEADER).read_text())
    if outer["check"] != hashlib.sha256(outer["header"].encode()).hexdigest():
      raise ValueError("its header has another checksum")
    header = json.loads(outer["header"])
    for name, size in header["sizes"].items():
      if (found := (folder / name).stat().st_size) != size:
        raise ValueError(f"{name} has {found} bytes, not {size}")
  except (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise Damaged(f"{folder}: {error}") from error
  return header
