"""The manifest of a checkpoint: the size and the checksum of each of its files.

Called by checkpoint.py, which writes it as the last file of a checkpoint and asks it before a checkpoint is read.
Orbax checks neither that all files are there nor what most of them hold: of a file with one flipped bit it loads other
numbers.

A file's checksum is the SHA-256 of the sums of its pages, and of the sums of its columns: a page is 512 words of 64
bits, and the columns are the words at the same place of all pages of a chunk. One flipped bit always changes a sum. It
guards against faults, not against forgery, and reads 11 GB a second on one core of an EPYC, where CRC-32 reads 3.4 and
SHA-256 1.8: a checkpoint is summed at every save.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import io
import json
import os
import pathlib
import time
import typing
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructjax.core.errors import UserError, may_pass, reason

_T = TypeVar("_T")
Sums = dict[str, tuple[int, str]]  # path in the folder -> size, checksum

NAME = "manifest.json"
_PAGE = 512  # words of 8 bytes
_CHUNK = 256 * _PAGE  # words read at once
_NOTHING = 2**31 - 1  # the number of no fault; int32, in which JAX gathers
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds after which a read that failed is tried again
_THREADS = 8  # NumPy and files let go of Python's lock, so threads read and sum at the same time

Fault = Literal["is missing", "has another size than was saved", "has other bytes than were saved"]
MISSING, OTHER_SIZE, OTHER_BYTES = _FAULTS = typing.get_args(Fault)


@dataclasses.dataclass(frozen=True)
class Damage:
  """What is wrong with a checkpoint's folder.

  Attributes:
    path: the file.
    fault: what is wrong with it.
  """

  path: pathlib.Path
  fault: Fault

  def __str__(self) -> str:
    return f"{self.path} {self.fault}"


def write(folder: pathlib.Path, sums_of: Callable[[pathlib.Path, list[str]], Sums] | None = None):
  """Sums all files below `folder` and writes the manifest into it; renamed into place, so it is whole or absent.

  Args:
    folder: of the checkpoint.
    sums_of: sums files in a folder, given by their paths in it; `sums` where there is none.
  Raises:
    OSError: a file cannot be read, or the manifest cannot be written.
  """
  names = sorted(
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file() and path != folder / NAME
  )
  text = _text((sums_of or sums)(folder, names))
  scratch = folder / f"{NAME}.tmp"
  scratch.write_text(text, encoding="utf-8")
  os.replace(scratch, folder / NAME)


def sums(folder: pathlib.Path, names: Sequence[str]) -> Sums:
  """Reads files, given by their paths in a folder.

  Raises:
    OSError: one cannot be read.
  """
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def size(folder: pathlib.Path) -> int:
  """Bytes of a checkpoint's files, by its manifest; 0 if that cannot be read."""
  files = _read(folder)
  return 0 if isinstance(files, Damage) else sum(size for size, _ in files.values())


def find_half(folder: pathlib.Path) -> Damage | None:
  """Whether parts are missing: looks at names and sizes only, so it costs nothing."""
  files = _read(folder)
  if isinstance(files, Damage):
    return files
  for name, (size, _) in files.items():
    fault = _fault_of_size(folder / name, size)
    if fault:
      return Damage(folder / name, fault)
  return None


def find_fault(folder: pathlib.Path, name: str) -> Damage | None:
  """Compares one file, given by its path in the folder, with the manifest."""
  files = _read(folder)
  if isinstance(files, Damage):
    return files
  fault = _fault(folder / name, *files[name]) if name in files else MISSING
  return Damage(folder / name, fault) if fault else None


def find_damage(folder: pathlib.Path) -> Damage | None:
  """Reads every file and compares it with the manifest.

  Several processes share the files and get the same answer, so all of them must call this.

  Returns:
    The first damaged file, in the order of their names; None if the folder is as it was saved.
  """
  files = _read(folder)
  # A process that cannot read the manifest takes part all the same: the others wait for it.
  listed = [] if isinstance(files, Damage) else list(files)
  share = range(jax.process_index(), len(listed), jax.process_count())
  found = 0 if isinstance(files, Damage) else _first_fault(folder, files, listed, share)
  first = int(np.min(multihost_utils.process_allgather(np.int32(found))))
  if first == 0:
    return files if isinstance(files, Damage) else Damage(folder / NAME, OTHER_BYTES)
  if first == _NOTHING:
    return None
  index, fault = divmod(first - 1, len(_FAULTS))
  return Damage(folder / listed[index], _FAULTS[fault])


def _first_fault(folder: pathlib.Path, files: Sums, listed: list[str], share: range) -> int:
  """A number for the first fault among this process's share: 1 + index * 3 + fault, or _NOTHING."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    faults = pool.map(lambda index: _fault(folder / listed[index], *files[listed[index]]), share)
    for index, fault in zip(share, faults, strict=True):
      if fault:
        return 1 + index * len(_FAULTS) + _FAULTS.index(fault)
  return _NOTHING


def _fault(path: pathlib.Path, size: int, checksum: str) -> Fault | None:
  # The size first: a file that was cut off need not be read.
  fault = _fault_of_size(path, size)
  if fault:
    return fault
  try:
    return None if _tried(lambda: _sum(path), path) == (size, checksum) else OTHER_BYTES
  except (FileNotFoundError, NotADirectoryError):
    return MISSING
  except UserError as error:
    if getattr(error.__cause__, "errno", None) == errno.EIO:
      return OTHER_BYTES  # again and again: a disk that cannot read its own sector
    raise


def _fault_of_size(path: pathlib.Path, size: int) -> Fault | None:
  try:
    return None if _tried(path.stat, path).st_size == size else OTHER_SIZE
  except (FileNotFoundError, NotADirectoryError):
    return MISSING


def _tried(read: Callable[[], _T], path: pathlib.Path) -> _T:
  """What `read` returns. It is tried again for a while: a mount that fails for a moment has lost no file.

  Raises:
    FileNotFoundError, NotADirectoryError: the file is not there.
    UserError: it cannot be read for another reason.
  """
  pauses = iter(_PAUSES)
  while True:
    try:
      return read()
    except (FileNotFoundError, NotADirectoryError):
      raise
    except OSError as error:
      pause = next(pauses, None)
      if pause is None or not may_pass(error):
        raise UserError(
          f"cannot read {path}: {reason(error)}; run the same command again"
        ) from error
    time.sleep(pause)


def _sum(path: pathlib.Path) -> tuple[int, str]:
  """A file's size and checksum."""
  digest, size = hashlib.sha256(), 0
  buffer = bytearray(8 * _CHUNK)
  view, chunk = memoryview(buffer), np.frombuffer(buffer, "<u8")
  with open(path, "rb", buffering=0) as file:
    while count := _fill(file, view):
      size += count
      pages = -(-count // (8 * _PAGE))
      view[count : pages * 8 * _PAGE] = bytes(pages * 8 * _PAGE - count)
      words = chunk[: pages * _PAGE].reshape(pages, _PAGE)
      for axis in (1, 0):
        digest.update(words.sum(axis, dtype=np.uint64).astype("<u8").tobytes())
  return size, digest.hexdigest()


def _fill(file: io.FileIO, view: memoryview) -> int:
  """Reads until the view is full or the file ends: one read may give less, and chunks must be the same each time."""
  filled = 0
  while count := file.readinto(view[filled:]):
    filled += count
  return filled


def _text(files: Sums) -> str:
  rows = {name: list(row) for name, row in sorted(files.items())}
  own = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
  return json.dumps({"checksum": own, "files": rows}, indent=1) + "\n"


def _read(folder: pathlib.Path) -> Sums | Damage:
  """Path in the folder -> (size, checksum), or what is wrong with the manifest if it is not as it was written."""
  path = folder / NAME
  try:
    text = _tried(lambda: path.read_text(encoding="utf-8"), path)
    files = {name: (row[0], row[1]) for name, row in json.loads(text)["files"].items()}
    # Written again it must be the same to the letter, its own checksum included.
    return files if _text(files) == text else Damage(path, OTHER_BYTES)
  except (FileNotFoundError, NotADirectoryError):
    return Damage(path, MISSING)
  except UserError:  # which is a ValueError too
    raise
  except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
    return Damage(path, OTHER_BYTES)
