"""Checksums of the files that a run reads: whoever resumes or reuses a stage must read what it was made with.

Called by stages/contents.py. A file is hashed once: its checksum is remembered in a file of the workdir for as long as
the file's size, times and inode stay the same. A file that was only touched is hashed again, and has the same checksum.

The content counts, not the place: files may be moved or renamed, as long as they are read in the same order.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from instructjax.data import file_places

_SHOWN = 8  # hex digits of each file's checksum that a fingerprint holds, so that a message can name the file
# Seconds after which a file system's clock has surely moved on, see `_wait_until_settled`.
_SETTLED = 0.02
_BLOCK = 1 << 22  # bytes hashed at a time
_SAVE_EVERY = 5.0  # seconds of hashing that a killed process may lose


@dataclasses.dataclass(frozen=True)
class Content:
  """What lies behind one name in a config.

  Attributes:
    how: how the files are read: the name without its path. Where there are no files, what stands for them.
    files: paths, in the order in which they are read.
    digests: SHA-256 of each file's bytes as they lie on disk, in hex.
  """

  how: str
  files: tuple[str, ...]
  digests: tuple[str, ...]

  @property
  def checksum(self) -> str:
    """One checksum for all; a single file's is what `sha256sum` prints."""
    if not self.files:
      return self.how
    if len(self.files) == 1:
      return "sha256:" + self.digests[0]
    return "sha256:" + hashlib.sha256("\n".join(self.digests).encode()).hexdigest()

  @property
  def fingerprint(self) -> str:
    """JSON that is equal for equal contents, wherever they lie; `finished.require_same_run` explains differences."""
    shown = [digest[:_SHOWN] for digest in self.digests]
    return json.dumps({"how": self.how, "checksum": self.checksum, "files": shown}, sort_keys=True)


class FileChecksums:
  """Checksums of files by path, kept in a file.

  Args:
    memory: the file; made when there is something to remember. Entries that are damaged are forgotten, and if the file
      cannot be written, nothing is remembered.
    progress: called again and again while files are hashed, which may take hours.
  """

  def __init__(self, memory: pathlib.Path, progress: Callable[[], None]):
    self._memory, self._progress = memory, progress
    self._known = _read(memory)
    self._is_saved, self._saved_at = True, time.monotonic()

  def content(self, how: str, files: Iterable[str | os.PathLike]) -> Content:
    """The content of these files.

    Raises:
      OSError: a file cannot be read.
    """
    paths = tuple(str(os.fspath(path)) for path in files)
    digests = tuple(self._digest(path) for path in paths)
    if not self._is_saved:
      self._save()
    return Content(how, paths, digests)

  def known(self, path: str) -> str | None:
    """The remembered checksum of a file as it is now; None if there is none.

    Raises:
      OSError: there is no such file.
    """
    place = os.path.abspath(path)
    known = self._known.get(place)
    return known[-1] if known and known[:-1] == file_places.state(place) else None

  def learn(self, path: str, identity: str, digest: str):
    """Remembers what another process found for a file, unless it has been written since.

    Args:
      path: the file.
      identity: of the file that was hashed, see `file_places.identity`.
      digest: its SHA-256 in hex.
    """
    place = os.path.abspath(path)
    with contextlib.suppress(OSError):  # it is gone: whoever reads it meets the error
      state = file_places.state(place)
      if file_places.identity(place) == identity and file_places.state(place) == state:
        self._known[place], self._is_saved = [*state, digest], False

  def _digest(self, path: str) -> str:
    place = os.path.abspath(path)
    if known := self.known(place):
      return known
    state = file_places.state(place)
    _wait_until_settled(state)
    digest = _hash(place, self._progress)
    # Else it is being written, and this is the checksum of no state of it.
    if file_places.state(place) == state:
      self._known[place], self._is_saved = [*state, digest], False
      if time.monotonic() - self._saved_at > _SAVE_EVERY:
        self._save()
    return digest

  def _save(self):
    """Writes what is known, together with what other processes have written meanwhile."""
    self._known = _read(self._memory) | self._known
    entries = {place: [*known, _check(place, known)] for place, known in self._known.items()}
    self._is_saved, self._saved_at = True, time.monotonic()
    # Processes of one run may write at the same time, each into a file of its own.
    scratch = self._memory.with_suffix(f".{socket.gethostname()}.{os.getpid()}")
    try:
      self._memory.parent.mkdir(parents=True, exist_ok=True)
      scratch.write_text(json.dumps(entries, indent=0) + "\n")
      os.replace(scratch, self._memory)
    except OSError:  # the disk is full, say; then the files are hashed again next time
      with contextlib.suppress(OSError):
        scratch.unlink()


def _hash(path: str, progress: Callable[[], None]) -> str:
  digest = hashlib.sha256()
  with open(path, "rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
      progress()
  return digest.hexdigest()


def _wait_until_settled(state: list[int]):
  """Waits until a file that is changed from now on gets another time.

  A clock of file times moves in steps of some milliseconds. Without this, a file that is hashed and changed within one
  step would keep its old checksum.
  """
  age = time.time() - max(state[1], state[2]) / 1e9
  if age < _SETTLED:
    time.sleep(min(_SETTLED, max(0.0, _SETTLED - age)))


def _read(path: pathlib.Path) -> dict[str, list]:
  """The undamaged entries of a memory: path -> size, times, inode and checksum."""
  try:
    entries = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError):
    return {}
  if not isinstance(entries, dict):
    return {}
  return {
    place: entry[:-1]
    for place, entry in entries.items()
    if isinstance(entry, list) and entry and entry[-1] == _check(place, entry[:-1])
  }


def _check(place: str, entry: Any) -> str:
  return hashlib.sha256(json.dumps([place, entry]).encode()).hexdigest()[:16]
