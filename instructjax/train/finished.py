"""done.json marks a stage as finished and holds its result; also the check of settings, and the lock of a workdir.

Called by the stages, by checkpoint.py and weights.py, by serve/ and by main (the lock).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shlex
import socket
import types
import typing
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax

from instructjax.core import results
from instructjax.core.errors import UserError, writing
from instructjax.core.foreign import named, shown
from instructjax.core.provenance import Provenance
from instructjax.core.stages import STAGES
from instructjax.core.text import printable
from instructjax.train import reading

TOKENIZER = "tokenizer"  # not a stage, but its folder in the workdir has a done.json too
DONE = "done.json"  # marks a stage as finished
_LOCK = ".lock"
_NAMED = 3  # changed files that a message names
_CHECKSUM = "crc32"  # key in done.json, of a checksum of all other keys


class _BadDone(ValueError):
  """The content of a done.json does not fit `Done`."""


@dataclasses.dataclass(frozen=True)
class Done:
  """The content of done.json.

  Attributes:
    stage: name in `core.stages.STAGES`, or TOKENIZER.
    fingerprint: everything that the stage was made with: name -> hash, or a config block as JSON.
    step: step of the checkpoint that later stages start from; None for a stage without checkpoints.
    result: what the stage measured, of the type that the table of stages names.
    provenance: the code, command, data and machine that made the stage; None for the tokenizer.
  """

  stage: str
  fingerprint: Mapping[str, str]
  step: int | None
  result: Any
  provenance: Provenance | None = None

  @property
  def identity(self) -> str:
    """Hash of the fingerprint, which stages that start from this one keep in their own fingerprints.

    A fingerprint holds its parents' identities, so a change far up the line shows in every later stage.
    """
    return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()

  def require_step(self) -> int:
    """`step`, for whoever knows that the stage keeps checkpoints."""
    if self.step is None:
      raise ValueError(f"stage {self.stage} keeps no checkpoints")
    return self.step

  def require_provenance(self) -> Provenance:
    """`provenance`, for whoever knows that this is a stage's."""
    if self.provenance is None:
      raise ValueError(f"{self.stage} does not say where it comes from")
    return self.provenance


def write_done(directory: pathlib.Path, done: Done):
  """Marks a stage as finished. The file is renamed into place, so that it is either whole or absent.

  Raises:
    UserError: the file cannot be written.
  """
  if jax.process_index() != 0:
    return
  path = pathlib.Path(directory) / DONE
  values = dataclasses.asdict(done)
  text = json.dumps({**values, _CHECKSUM: _checksum(values)}, indent=1) + "\n"
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def read_done(directory: pathlib.Path) -> Done | None:
  """Reads a stage's done.json; None if the stage is not finished.

  Raises:
    UserError: the file is damaged or was edited, or another version wrote it: a key is unknown or missing, or a value
      has another type.
  """
  path = pathlib.Path(directory) / DONE
  if not path.is_file():
    return None
  again = (
    f"Run `rm {shlex.quote(str(path))}` and the main job again: what the stage has trained is kept,"
    " and the file is written anew."
  )
  values = reading.read(path, lambda: json.loads(path.read_text(encoding="utf-8")), advice=again)
  try:
    checksum = values.pop(_CHECKSUM, None) if isinstance(values, dict) else None
    stage = values.get("stage") if isinstance(values, dict) else None
    if not isinstance(stage, str) or stage not in [TOKENIZER, *STAGES]:
      raise _BadDone(f"it names no stage, but {shown(stage)}")
    result = results.Nothing if stage == TOKENIZER else STAGES[stage].result
    hints = typing.get_type_hints(Done) | {"result": result}
    done = Done(**_fields(hints, values, ""))
  except _BadDone as error:
    raise UserError(
      f"cannot read {path}: {printable(str(error))}. Another version of instructjax wrote it: use another --workdir"
    ) from error
  if checksum != _checksum(values):
    raise UserError(f"{path} has another content than was saved. {again}")
  return done


def _checksum(values: Mapping[str, Any]) -> int:
  """CRC-32 of the values, however the file lays them out. Against faults and edits by hand, not against forgery."""
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def require_done(directory: pathlib.Path) -> Done:
  """What a stage left that must have finished.

  Raises:
    UserError: it has not, or as `read_done`.
  """
  done = read_done(directory)
  if done is None:
    raise UserError(f"{directory} is not finished: it has no {DONE}; run this stage first")
  return done


def _fields(hints: Mapping[str, Any], values: Any, where: str) -> dict[str, Any]:
  """Converts each value to its type; _BadDone unless the keys are exactly those of the hints."""
  if not isinstance(values, dict):
    raise _BadDone(f"{where.rstrip('.')} is no object")
  unknown, missing = values.keys() - hints.keys(), hints.keys() - values.keys()
  for names, what in ((unknown, "unknown"), (missing, "missing")):
    if names:
      raise _BadDone(
        f"{what} key {', '.join(where + named(name, 60) for name in sorted(names)[:5])}"
      )
  return {name: _typed(hint, values[name], where + name) for name, hint in hints.items()}


def _typed(hint: Any, value: Any, where: str) -> Any:
  """Converts a JSON value to a dataclass, tuple, dict, optional or plain type; _BadDone if it does not fit."""
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    return hint(**_fields(typing.get_type_hints(hint), value, f"{where}."))
  if origin is types.UnionType:  # X | None
    return None if value is None else _typed(inner[0], value, where)
  if origin is tuple and isinstance(value, list):  # tuple[X, ...]
    return tuple(_typed(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
  if origin in (dict, Mapping) and isinstance(value, dict):
    return {name: _typed(inner[1], item, f"{where}.{name}") for name, item in value.items()}
  if hint is float and type(value) is int and abs(value) < 2**53:  # JSON may spell 1.0 as 1
    return float(value)
  if type(value) is not hint:
    raise _BadDone(f"{where}={shown(value)} is not of type {hint}")
  return value


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path) -> Generator[None, None, None]:
  """Holds the workdir for this run, because two runs would overwrite each other's files.

  The operating system frees the lock when the process ends, however it ends.

  Raises:
    UserError: another run holds it.
  """
  if jax.process_index() != 0:
    yield
    return
  path = pathlib.Path(workdir) / _LOCK
  with contextlib.ExitStack() as stack:
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      # Not "w", which would erase the holder's name before the lock is tried. Without a buffer, because closing a file
      # on a full disk would write the buffer a second time, and fail once more.
      file = stack.enter_context(open(path, "ab+", buffering=0))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip()
        raise UserError(
          f"{workdir} is in use by another run ({holder}): wait for it, stop it, or use"
          " another --workdir"
        ) from None
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    yield


def require_same_run(
  directory: pathlib.Path,
  saved: Mapping[str, str],
  current: Mapping[str, str],
  files: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
):
  """Refuses to resume or reuse a stage that was made with other settings or other data.

  Args:
    directory: the stage's folder, for the message.
    saved, current: fingerprints: name -> hash, a config block as JSON, or the JSON of `checksums.Content`.
    files: part of `current` -> the files that it stands for, in the order of their checksums.
  Raises:
    UserError: they differ; it names the first part that does and, in a config block, the fields, or else the files.
  """
  for part in sorted(saved.keys() | current.keys()):
    old, new = (parts.get(part, "none") for parts in (saved, current))
    if old == new:
      continue
    told = _other_content(old, new, files.get(part, ()))
    if told:
      raise UserError(
        f"cannot go on with {directory}: {told}. Put back what it was made with, or use another"
        " --workdir."
      )
    raise UserError(
      f"cannot go on with {directory}: it was made with another {part} ({_difference(old, new)})."
      f" Use another --workdir, or the {part} it was made with."
    )


def _other_content(old: str, new: str, files: Sequence[str]) -> str:
  """Words for what differs between two JSONs of `checksums.Content`; "" if they are none, or name no files."""
  try:
    before, now = json.loads(old), json.loads(new)
    were, are = before["files"], now["files"]
  except (ValueError, TypeError, LookupError):
    return ""
  if not isinstance(were, list) or not files or len(files) != len(are):
    return ""
  if len(were) != len(are):
    return f"it was made with {len(were)} files, where {files[0]} is now the first of {len(are)}"
  changed = [
    f"{file} (sha256 {was} there, {now_is} here)"
    for file, was, now_is in zip(files, were, are)
    if was != now_is
  ]
  if not changed:  # but read in another way
    return f"{files[0]} was read as {before['how']} and is now read as {now['how']}"
  more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
  return f"it was made with another content of {', '.join(changed[:_NAMED])}{more}"


def _difference(old: str, new: str) -> str:
  """Words for what differs: `field: old there, new here` for config blocks, the first digits for hashes.

  Of a block that only one of the two has, as that of adapters, it says just that.
  """
  try:
    before, after = json.loads(old), json.loads(new)
  except ValueError:
    before, after = ("settings" if text.startswith("{") else text[:8] for text in (old, new))
    return f"{before}, this run has {after}"
  if not (isinstance(before, dict) and isinstance(after, dict)):
    return f"{before} there, {after} here"
  fields = sorted(before.keys() | after.keys())
  changed = [name for name in fields if before.get(name) != after.get(name)]
  return "; ".join(f"{name}: {before.get(name)} there, {after.get(name)} here" for name in changed)
