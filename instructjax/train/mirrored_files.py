"""What of a workdir is copied to its bucket, and in which order, told from the files' names. Called by mirror.py."""

import pathlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

from instructjax.train import damaged, finished, manifest

OWNER = "owner.json"  # says which run the copy belongs to
RECORD = ".mirrored.json"  # in the local folder: what was copied, and what the bucket calls it
# Files and folders of these names stay on this machine.
OWN = ("compiled", "cache", RECORD, ".lock", OWNER)
_MARKERS = (finished.DONE, manifest.NAME)


def is_marker(name: str) -> bool:
  """Whether a file says that others are whole."""
  return last(name) in _MARKERS


def last(name: str) -> str:
  """The name without its folders."""
  return name.rpartition("/")[2]


def comes_late(name: str) -> bool:
  """The order of removal: markers first."""
  return not is_marker(name)


def files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The files below a folder that are mirrored."""
  try:
    paths = list(folder.iterdir())
  except FileNotFoundError:  # deleted since its parent was listed
    return
  for path in paths:
    is_temporary = path.suffix == ".tmp" or ".orbax-checkpoint-tmp" in path.name
    # A checkpoint that is being written, or one that was put aside because it is damaged.
    is_step = path.name.isdigit() and (path / manifest.NAME).is_file()
    is_half = folder.name == damaged.FOLDER and not is_step
    if path.name in OWN or is_temporary or is_half:
      continue
    if path.is_dir():
      yield from files(path)
    elif path.is_file():
      yield path


def is_whole(name: str, there: Container[str]) -> bool:
  """Whether an object is no part of a checkpoint without a manifest; `there` has the names of all objects."""
  folder = step(name)
  return (
    not folder
    or f"{name.rpartition(damaged.FOLDER)[0]}{damaged.FOLDER}/{folder}/{manifest.NAME}" in there
  )


def step(name: str) -> str:
  """The folder's name of the checkpoint that a file belongs to; "" if it is none's."""
  parts = name.split("/")
  return parts[parts.index(damaged.FOLDER) + 1] if damaged.FOLDER in parts[:-1] else ""


def token(info: Mapping[str, Any]) -> str:
  """What changes with an object: its generation, or the nearest that a file system has."""
  names = ("generation", "etag", "md5Hash", "created", "mtime")
  return str(next((info[name] for name in names if info.get(name)), ""))
