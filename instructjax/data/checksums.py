"""Checksums of files, for the provenance of the stages that read them.

Called by readers.py, whose sources say which of their files hold the records. Within a process every file is hashed
once, no matter how many stages and kinds of record use it.
"""

import functools
import hashlib
import os
from collections.abc import Iterable


def of_file(path: str) -> str:
  """The checksum of a file's bytes as they lie on disk, compressed or not.

  Raises:
    OSError: the file cannot be read.
  """
  return "sha256:" + _sha256(path, *_state(path))


def of_files(paths: Iterable[str]) -> str:
  """One checksum for the names and contents of several files, in order.

  Raises:
    OSError: a file cannot be read.
  """
  digest = hashlib.sha256()
  # Base names only, so that a folder has the same checksum wherever it is.
  for path in paths:
    digest.update(f"{os.path.basename(path)} {_sha256(path, *_state(path))}\n".encode())
  return "sha256:" + digest.hexdigest()


def _state(path: str) -> tuple[int, int]:
  """A file's size and modification time. If either has changed, the file is hashed again."""
  found = os.stat(path)
  return found.st_size, found.st_mtime_ns


@functools.cache
def _sha256(path: str, size: int, changed: int) -> str:
  del size, changed  # only part of the cache key
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
