"""The token cache: what was tokenized once is opened by every later start, and by every process.

Called by stages/run_data.py. A folder of the cache is made under another name and renamed when it is whole, so that a
killed run leaves nothing that could be taken for it. One process makes it; the others wait, and find it. If that one
dies, the next takes over. What is damaged is made anew.

What nobody has opened for 30 days is removed when something new is made: other settings, data or versions have other
places, and would fill the disk. A run that still read it would tokenize again.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from instructjax.core.errors import UserError
from instructjax.core.structs import PackedBatch
from instructjax.data import token_store
from instructjax.data.packing import Damaged, PackedRows
from instructjax.data.token_store import Encoded, TokenStore

logger = logging.getLogger(__name__)

_FORMAT = 1
_TELL_AFTER, _TELL_EVERY = 10.0, 60.0  # seconds of tokenizing or waiting before a line says so
_KEPT = 30 * 24 * 3600.0  # seconds for which something stays that nobody opens
# Folders that may be removed, with rows and what killed processes left; the cache may lie among others.
_OURS = re.compile(r"(documents|demonstrations)-[0-9a-f]{20}(-rows-\d+)?(\..+\.partial)?")
_POLL = 0.2  # seconds between two looks whether another process is done

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Tokenized:
  """What a source's records become.

  Attributes:
    sequences: an iterable of ids, each time it is asked for.
    count: number of records, to say how far it is.
    left_out: what is left out, as `tokenize.LeftOut`; known when `sequences` is exhausted.
  """

  sequences: Iterable[Encoded]
  count: int
  left_out: Mapping[str, Sequence]


@functools.cache
def code() -> str:
  """A hash of the code that reads and tokenizes records, and of the libraries that encode text."""
  digest = hashlib.sha256()
  for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
    digest.update(path.read_bytes())
  for name in ("jinja2", "sentencepiece", "tokenizers"):
    digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
  return digest.hexdigest()


class CachedRows:
  """Packed rows in the cache, which are made anew if they are found damaged. Attributes as in `PackedRows`."""

  def __init__(self, cache: "CachedTokens", length: int, splits: bool):
    self._cache, self._length, self._splits = cache, length, splits
    self._rows = self._open()
    self.num_rows, self.checksum = self._rows.num_rows, self._rows.checksum

  def gather(self, row_B: np.ndarray) -> PackedBatch:
    """Makes a batch of these rows.

    Raises:
      UserError: they are damaged again right after they were made anew, or are others then.
    """
    # Opened anew before it is made anew: another process may have done that already.
    for mend in (lambda why: None, self._cache.drop, None):
      try:
        if self._rows.checksum == self.checksum:
          return self._rows.gather(row_B)
        why = "it holds other rows"
      except Damaged as error:
        why = str(error)
      if mend:
        mend(why)
        self._rows = self._open()
    raise UserError(
      f"{self._cache.folder} was damaged, and made anew it is another: check the disk and the data"
    )

  def _open(self) -> PackedRows:
    return self._cache.packed(self._length, self._splits)


class CachedTokens:
  """One kind and split of a run's records as token ids, in a folder of the cache.

  Args:
    root: the cache.
    what: words for messages, as `documents (train)`.
    vocab_size: one past the largest id.
    about: everything that the ids depend on, as JSON values. It decides the name of the folder.
    tokenize: reads and tokenizes the records. It is called only if the folder has to be made.
    progress: called again and again during work that may take hours: tokenizing, and waiting for a process that does.
  """

  def __init__(
    self,
    root: pathlib.Path,
    what: str,
    vocab_size: int,
    about: Mapping[str, Any],
    tokenize: Callable[[], Tokenized],
    progress: Callable[[], None],
  ):
    self._what, self._vocab_size, self._tokenize = what, vocab_size, tokenize
    self._progress = progress
    self._about = {"format": _FORMAT, **about}
    key = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()
    self.folder = root / f"{what.split()[0]}-{key[:20]}"

  def store(self) -> TokenStore:
    """The ids, tokenized if they are not in the cache.

    Raises:
      UserError: the records cannot be read, or the cache cannot be written.
    """
    return _open_or_make(
      self.folder, self._what, token_store.open_store, self._write, self._progress
    )

  def sequences(self) -> TokenStore:
    """The ids, all of them checked.

    Raises:
      UserError: see `store`.
    """
    store = self.store()
    try:
      token_store.check_store(self.folder)
    except Damaged as error:
      self.drop(str(error))
      store = self.store()
    return store

  def rows(self, length: int, *, splits: bool) -> CachedRows:
    """The ids packed into rows of `length` tokens; `splits` as in `packing.pack_rows`.

    Raises:
      UserError: see `store`; or a sequence is longer than a row and not to be split.
    """
    return CachedRows(self, length, splits)

  def packed(self, length: int, splits: bool) -> PackedRows:
    """The rows as they lie in the cache, packed if they are not there yet."""
    store = self.store()
    folder = self.folder.with_name(f"{self.folder.name}-rows-{length}")

    def write(scratch: pathlib.Path):
      rows = self.sequences().pack(length, self._vocab_size, splits=splits)
      try:
        token_store.write_rows(scratch, rows)
      except OSError as error:
        raise _Full(rows.num_bytes) from error

    open_ = lambda path: token_store.open_rows(path, store)
    return _open_or_make(folder, f"{self._what} in rows", open_, write, self._progress)

  def drop(self, why: str):
    """Takes the folder and its rows out of the cache, because they are damaged."""
    logger.warning("the token cache of %s is damaged (%s): it is made anew", self._what, why)
    for folder in self.folder.parent.glob(f"{self.folder.name}*"):
      if folder.is_dir() and not folder.name.endswith(_PARTIAL):
        _remove(folder)

  def _write(self, scratch: pathlib.Path):
    told = time.monotonic() + _TELL_AFTER
    tokenized = self._tokenize()
    with token_store.Writer(scratch, self._vocab_size) as writer:
      for number, sequence in enumerate(tokenized.sequences, start=1):
        self._progress()
        try:
          writer.add(sequence)
        except OSError as error:
          raise _Full(writer.num_bytes * tokenized.count / number) from error
        if number % 1000 == 0 and time.monotonic() > told:
          logger.warning("tokenizing %s: %d of %d", self._what, number, tokenized.count)
          told = time.monotonic() + _TELL_EVERY
      try:
        writer.finish(tokenized.left_out, self._about)
      except OSError as error:
        raise _Full(writer.num_bytes) from error


class _Full(Exception):
  """The disk is full; the argument is how many bytes are needed."""


_PARTIAL = ".partial"


def _open_or_make(
  folder: pathlib.Path,
  what: str,
  open_: Callable[[pathlib.Path], _T | None],
  make: Callable[[pathlib.Path], None],
  progress: Callable[[], None],
) -> _T:
  """What lies in a folder of the cache, made first if it is not there or is damaged.

  Args:
    folder: the folder.
    what: words for messages.
    open_: opens it; None if there is none.
    make: makes it under the path that it is given.
    progress: see `CachedTokens`.
  Raises:
    UserError: it cannot be written.
  """
  with contextlib.suppress(Damaged):
    if (found := open_(folder)) is not None:
      _mark_used(folder)
      return found
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _sole_writer(folder.with_name(folder.name + ".lock"), what, progress):
      try:
        if (found := open_(folder)) is not None:  # another process made it meanwhile
          return found
      except Damaged as error:
        logger.warning("the token cache of %s is damaged (%s): it is made anew", what, error)
        _remove(folder)
      _remove_old(folder.parent)
      scratch = _scratch(folder)
      try:
        make(scratch)
        _sync(scratch)
        os.replace(scratch, folder)
        _sync(folder.parent)
      finally:
        shutil.rmtree(scratch, ignore_errors=True)
      found = open_(folder)
  except (OSError, _Full) as error:
    cause = error.__cause__ if isinstance(error, _Full) else error
    why = getattr(cause, "strerror", None) or str(cause)
    need = f"; it needs about {error.args[0] / 2**20:.0f} MiB" if isinstance(error, _Full) else ""
    raise UserError(
      f"cannot write {folder}, the token cache of {what}: {why}{need}. Make room, or name a folder"
      " on another disk with --config.data.token_cache"
    ) from error
  except Damaged as error:
    raise UserError(
      f"{folder} was written and reads as something else ({error}): check the disk"
    ) from error
  if found is None:
    raise UserError(f"{folder} was removed while it was written; run the same command again")
  return found


def _mark_used(folder: pathlib.Path):
  """Sets the folder's time to now, where it may be written."""
  with contextlib.suppress(OSError):
    os.utime(folder)


def _remove_old(root: pathlib.Path):
  """Removes what nobody has opened for `_KEPT`."""
  before, removed = time.time() - _KEPT, 0
  for path in root.iterdir():
    with contextlib.suppress(OSError):  # another process removes it too, or it may not be removed
      if _OURS.fullmatch(path.name) and path.is_dir() and path.stat().st_mtime < before:
        _remove(path)
        removed += 1
  if removed:
    what = "entry that was" if removed == 1 else "entries that were"
    logger.warning("%s: removed %d %s not used for %d days", root, removed, what, _KEPT // 86400)


def _scratch(folder: pathlib.Path) -> pathlib.Path:
  """A name for this process's half-written folder; removes what dead processes of this host left."""
  # One process of a host at a time is here, so the others' are dead. Where locks do not reach other hosts, those of
  # other hosts may be alive: each has a name of its own.
  host = socket.gethostname()
  for left in folder.parent.glob(f"{folder.name}.{host}.*{_PARTIAL}"):
    shutil.rmtree(left, ignore_errors=True)
  return folder.with_name(f"{folder.name}.{host}.{os.getpid()}{_PARTIAL}")


def _remove(folder: pathlib.Path):
  """Removes a folder in one step: no other process finds half of it."""
  trash = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.old{_PARTIAL}")
  with contextlib.suppress(FileNotFoundError):
    os.replace(folder, trash)
  shutil.rmtree(trash, ignore_errors=True)


@contextlib.contextmanager
def _sole_writer(
  path: pathlib.Path, what: str, progress: Callable[[], None]
) -> Generator[None, None, None]:
  """Waits until no other process holds the lock; the system frees it when a process ends, however it ends."""
  with open(path, "a") as file:
    started, told = time.monotonic(), False
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if not told and time.monotonic() - started > 1:
          logger.warning("waiting for another process that tokenizes %s", what)
          told = True
        progress()  # the other one has a watchdog of its own
        time.sleep(_POLL)
      # A file system without locks; the renaming keeps the cache right without them.
      except OSError:
        break
    yield


def _sync(folder: pathlib.Path):
  """Makes sure that a renamed entry is on disk."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:  # some network mounts do not do this to folders
    pass
  finally:
    os.close(descriptor)
