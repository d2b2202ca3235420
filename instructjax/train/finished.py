"""What a finished stage leaves: its done.json, and the check that it was made with the same settings.

Called by the stages, by weights.py and by what comes after training. Also holds the lock of a workdir.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping

import jax

from instructjax.core.errors import UserError
from instructjax.train import reading

_DONE = "done.json"
_LOCK = ".lock"


def write_done(directory: pathlib.Path, result: dict):
  """Marks a stage as finished, with its result; the file is whole or absent."""
  if jax.process_index() != 0:
    return
  path = pathlib.Path(directory) / _DONE
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix(".tmp")
  scratch.write_text(json.dumps(result, indent=1) + "\n")
  os.replace(scratch, path)


def read_done(directory: pathlib.Path) -> dict | None:
  """The result of a finished stage, None when it is not finished."""
  path = pathlib.Path(directory) / _DONE
  if not path.is_file():
    return None
  return reading.read(path, lambda: json.loads(path.read_text()))


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this run: two would overwrite each other. A dying run frees it."""
  if jax.process_index() != 0:
    yield
    return
  path = pathlib.Path(workdir) / _LOCK
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise UserError(
        f"{workdir} is in use by another run ({file.read().strip()}): wait for it, stop it, or use"
        " another --workdir"
      ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def require_same_run(directory: pathlib.Path, saved: Mapping[str, str], current: Mapping[str, str]):
  """Refuses to go on from, or to reuse, what was made with something else.

  Args:
    directory: of the stage.
    saved, current: part -> hash, or a config block as JSON.

  Raises:
    UserError: naming the first part that differs, and in a config block the fields.
  """
  for part in sorted(saved.keys() | current.keys()):
    old, new = (parts.get(part, "none") for parts in (saved, current))
    if old != new:
      raise UserError(
        f"cannot go on with {directory}: it was made with another {part} ({_difference(old, new)})."
        f" Use another --workdir, or the {part} it was made with."
      )


def _difference(old: str, new: str) -> str:
  """`field: old there, new here` of two config blocks as JSON; of hashes their first digits."""
  try:
    before, after = json.loads(old), json.loads(new)
  except ValueError:
    return f"{old[:8]}, this run has {new[:8]}"
  if not (isinstance(before, dict) and isinstance(after, dict)):
    return f"{before} there, {after} here"
  fields = sorted(before.keys() | after.keys())
  changed = [name for name in fields if before.get(name) != after.get(name)]
  return "; ".join(f"{name}: {before.get(name)} there, {after.get(name)} here" for name in changed)
