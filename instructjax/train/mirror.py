"""A workdir in a bucket: a folder of this machine, and its copy under gs://, which is the one that counts.

Called by main. Everything of a run works on the local folder, as an object store has neither renaming nor locks nor
memory maps. What has changed is copied every PERIOD seconds and at the end. Files that say that something is whole, a
stage's done.json and a checkpoint's manifest.json, come after everything that they speak of; when something is deleted,
they go first. So whatever moment a machine is lost at, the bucket holds a workdir that a run can go on from.

Several processes of a run need one folder that all of them share, as they write each checkpoint together; the first of
them copies.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Generator, Iterator
from typing import Any, Self

import jax

from instructjax.core import terminal
from instructjax.core.errors import Preempted, UserError, reason
from instructjax.core.foreign import shown
from instructjax.parallel import distributed
from instructjax.train import damaged, finished, manifest

PERIOD = 30.0  # seconds between two copies
OWNER = "owner.json"  # says which run the copy belongs to
_RECORD = ".mirrored.json"  # in the local folder: what was copied, and what the bucket calls it
_OWN = (
  "compiled",
  "cache",
  _RECORD,
  ".lock",
  OWNER,
)  # stay on this machine: files and folders of these names
_MARKERS = (finished.DONE, manifest.NAME)


class Mirror:
  """Keeps a local folder and a bucket's the same; a context manager, which copies what is left when it is left.

  Args:
    fs: an fsspec file system.
    root: the workdir's path in it.
    url: the workdir as the user named it, for messages.
    folder: the local folder.
  """

  def __init__(self, fs: Any, root: str, url: str, folder: pathlib.Path):
    self._fs, self._root, self._url, self._folder = fs, root.rstrip("/"), url, folder
    self._id = uuid.uuid4().hex
    # path -> [size, time of the local file, the bucket's token], of what is the same on both sides
    self._record: dict[str, list] = {}
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

  def __enter__(self) -> Self:
    distributed.at(f"copying from {self._url}")
    with self._told("read"):
      self._folder.mkdir(parents=True, exist_ok=True)
      self._fs.invalidate_cache()
      self._pull()
      owner = {"id": self._id, "host": socket.gethostname(), "process": os.getpid()}
      self._fs.pipe_file(f"{self._root}/{OWNER}", json.dumps(owner).encode())
    terminal.say(
      f"workdir {self._url}: this machine works in {self._folder} and copies it every {PERIOD:.0f} s and at the end;"
      " compiled/ and cache/ stay here"
    )
    self._thread.start()
    return self

  def __exit__(self, kind, error, traceback):
    distributed.at(f"copying to {self._url}")
    self._stop.set()
    self._thread.join()
    try:
      with self._told("written"):
        self.push()
    except UserError:
      if error is None:  # else that one explains more
        raise

  @contextlib.contextmanager
  def _told(self, what: str):
    """Turns whatever a library raises over the bucket into one UserError."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # OSError, HTTP and login errors have no common class
      raise UserError(
        f"{self._url} cannot be {what}: {type(error).__name__}: {reason(error)}. What the run has written lies in"
        f" {self._folder}; the same command on this machine goes on from there"
      ) from error

  def _work(self):
    while not self._stop.wait(PERIOD):
      try:
        self.push()
      except UserError as error:
        terminal.say(str(error))
        os.kill(os.getpid(), signal.SIGTERM)  # the run saves on this machine, and ends
        return
      except Exception as error:  # a network that fails for a while: the next time, or the end
        terminal.say(f"{self._url} could not be written, and is tried again: {reason(error)}")

  # --- in -------------------------------------------------------------------------------------------

  def _there(self) -> dict[str, tuple[int, str]]:
    """Path -> (size, token) of the objects that are mirrored."""
    self._fs.invalidate_cache()
    try:
      found = self._fs.find(self._root, detail=True)
    except FileNotFoundError:
      return {}
    start = len(self._root.lstrip("/")) + 1
    objects = {name.lstrip("/")[start:]: info for name, info in found.items()}
    return {
      name: (int(info["size"]), _token(info))
      for name, info in objects.items()
      if name and not {*name.split("/")} & {*_OWN}
    }

  def _pull(self):
    """Makes the local folder what the bucket holds, unless it is what this machine went on from there with."""
    there = self._there()
    self._read_record()
    tokens = {name: token for name, (_, token) in there.items()}
    if tokens and {name: row[2] for name, row in self._record.items()} == tokens:
      return  # nobody else has written since this machine did: what it has besides is its own, and newer
    self._record = {}
    for path in list(self._folder.iterdir()):
      if path.name not in _OWN:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in there:
      if ".." in pathlib.PurePosixPath(name).parts or not name.isprintable():
        raise UserError(f"{self._url} holds an object of the name {shown(name)}, which is no run's")
    for name, (size, token) in there.items():
      if not _is_whole(name, there):
        continue  # a checkpoint whose upload was broken off
      path = self._folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      self._fs.get_file(f"{self._root}/{name}", str(path))
      distributed.progress()
      state = path.stat()
      self._record[name] = [size, state.st_mtime_ns, token]
      if state.st_size != size:
        raise UserError(f"{self._url}/{name} has {size} bytes, and {state.st_size} came; run again")
    self._save_record()

  # --- out ------------------------------------------------------------------------------------------

  def push(self):
    """Copies what has changed.

    Raises:
      UserError: another run has taken the workdir over.
    """
    self._require_own()
    # Markers first of all: what they speak of was written before, so the second listing has it.
    markers = [name for name in self._here() if _is_marker(name)]
    here = self._here()
    gone = [name for name in self._record if name not in here]
    self._remove([name for name in gone if name.rpartition("/")[2] == finished.DONE])
    lost = []
    for name in [*(name for name in here if not _is_marker(name)), *markers]:
      folder, _, last = name.rpartition("/")
      if last == manifest.NAME and any(other.startswith(f"{folder}/") for other in lost):
        continue  # the checkpoint was deleted meanwhile
      try:
        self._copy(name)
      except FileNotFoundError:  # deleted or renamed since it was listed
        lost.append(name)
      distributed.progress()
    # An old checkpoint goes only when the new one is there.
    self._remove(sorted((name for name in gone if name in self._record), key=_comes_late))
    for name, (_, token) in self._there().items():
      if name in self._record:
        self._record[name][2] = token
    self._save_record()

  def _remove(self, names: list[str]):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        self._fs.rm_file(f"{self._root}/{name}")
      del self._record[name]

  def _copy(self, name: str):
    path = self._folder / name
    state = path.stat()
    if self._record.get(name, ())[:2] == [state.st_size, state.st_mtime_ns]:
      return
    self._fs.put_file(str(path), f"{self._root}/{name}")
    # A file that grew meanwhile is copied again the next time.
    self._record[name] = [state.st_size, state.st_mtime_ns, ""]

  def _here(self) -> list[str]:
    """Paths of the local files that are mirrored; of checkpoints, the whole ones'."""
    return [str(path.relative_to(self._folder)) for path in sorted(_files(self._folder))]

  def _require_own(self):
    """Raises UserError if another run has begun in the workdir since this one did."""
    self._fs.invalidate_cache()
    owner = json.loads(self._fs.cat_file(f"{self._root}/{OWNER}"))
    if owner["id"] != self._id:
      other = f"process {owner['process']} on {owner['host']}"
      raise UserError(
        f"{self._url} was taken over by another run ({shown(other)}), which goes on from the last copy; this"
        f" run ends, and what it did since lies in {self._folder}"
      )

  def _read_record(self):
    """Reads what was copied before.

    Raises:
      UserError: the folder holds something else than a copy of this workdir.
    """
    try:
      record = json.loads((self._folder / _RECORD).read_text())
      url, self._record = record["url"], record["files"]
    except (OSError, ValueError, TypeError, KeyError):
      url = ""
    if url != self._url and any(path.name not in _OWN for path in self._folder.iterdir()):
      raise UserError(
        f"{self._folder} holds other files than a copy of {self._url}, which it would become: give another --scratch"
      )

  def _save_record(self):
    scratch = self._folder / f"{_RECORD}.tmp"
    scratch.write_text(json.dumps({"url": self._url, "files": self._record}))
    os.replace(scratch, self._folder / _RECORD)


def _is_marker(name: str) -> bool:
  return name.rpartition("/")[2] in _MARKERS


def _comes_late(name: str) -> bool:
  """The order of removal: markers first."""
  return not _is_marker(name)


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The files below a folder that are mirrored."""
  for path in folder.iterdir():
    is_temporary = path.suffix == ".tmp" or ".orbax-checkpoint-tmp" in path.name
    is_half = folder.name == damaged.FOLDER and not (path / manifest.NAME).is_file()
    if path.name in _OWN or is_temporary or is_half:
      continue
    if path.is_dir():
      yield from _files(path)
    elif path.is_file():
      yield path


def _is_whole(name: str, there: dict[str, tuple[int, str]]) -> bool:
  """Whether an object is no part of a checkpoint without a manifest."""
  parts = name.split("/")
  if damaged.FOLDER not in parts:
    return True
  step = parts[: parts.index(damaged.FOLDER) + 2]
  return "/".join([*step, manifest.NAME]) in there


def _token(info: dict[str, Any]) -> str:
  """What changes with an object: its generation, or the nearest that a file system has."""
  names = ("generation", "etag", "md5Hash", "created", "mtime")
  return str(next((info[name] for name in names if info.get(name)), ""))


@contextlib.contextmanager
def mirrored(url: str, folder: pathlib.Path) -> Generator[None, None, None]:
  """Around a run whose workdir is in a bucket; all processes enter and leave it together.

  Raises:
    UserError: the extra `gcs` is not installed, the bucket cannot be read or written, or the folder has other files.
  """
  first = jax.process_index() == 0
  stopped = None
  with open_bucket(url, folder) if first else contextlib.nullcontext():
    distributed.meet("the workdir is copied from its bucket")
    try:
      yield
    except Preempted as error:
      stopped = error
  # The others wait for the last copy: a process that is left alone is ended after a while.
  distributed.meet("the workdir is copied to its bucket")
  if stopped:
    raise stopped


def open_bucket(url: str, folder: pathlib.Path) -> Mirror:
  """The mirror of a workdir in a bucket.

  Raises:
    UserError: the extra `gcs` is not installed.
  """
  import fsspec

  try:
    fs, root = fsspec.core.url_to_fs(url)
  except ImportError:
    raise UserError(
      f"--workdir={url} needs the gcs extra: pip install 'instructjax[gcs]', or mount the bucket"
    ) from None
  return Mirror(fs, root, url, folder)
