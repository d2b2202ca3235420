"""A workdir in a bucket: a folder of this machine, and its copy under gs://, which is the one that counts.

Called by main. Everything of a run works on the local folder, as an object store has neither renaming nor locks nor
memory maps. What has changed is copied every PERIOD seconds and at the end. Files that say that something is whole, a
stage's done.json and a checkpoint's manifest.json, come after everything that they speak of; when something is deleted,
they go first. So whatever moment a machine is lost at, the bucket holds a workdir that a run can go on from.

A run that begins writes its name into the bucket. One that finds another name there writes nothing more. A run that
comes back to its folder goes on with what is there if the bucket is as the folder's own runs have left it, be it in the
middle of a copy; else the folder becomes what the bucket holds.

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
from collections.abc import Generator
from typing import Any, Self

import jax

from instructjax.core import terminal
from instructjax.core.errors import Preempted, UserError, Waiting, may_pass, one_line, reason
from instructjax.core.foreign import shown
from instructjax.parallel import distributed
from instructjax.train import finished, manifest, mirrored_files

PERIOD = 30.0  # seconds between two copies
_APART = "give each run a folder that lies in no other run's"


class _TakenOver(UserError):
  """Another run has begun in the workdir."""


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
    self._id = self._place = uuid.uuid4().hex  # of this run, and of the folder, which may be older
    # path -> [size, time of the local file, the bucket's token]: what is the same on both sides. Where the token is "",
    # it was being copied or removed, and what the bucket has of it is this folder's own doing.
    self._record: dict[str, list] = {}
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

  def __enter__(self) -> Self:
    distributed.at(f"copying from {self._url}")
    with self._told("read"):
      self._folder.mkdir(parents=True, exist_ok=True)
      self._read_record()
      self._require_alone()
      before = self._owner()
    # Before anything is read: a run that is still at work there writes nothing more once it sees this.
    with self._told("written"):
      place = {"host": socket.gethostname(), "process": os.getpid(), "folder": self._place}
      self._fs.pipe_file(
        f"{self._root}/{mirrored_files.OWNER}", json.dumps({"id": self._id, **place}).encode()
      )
    with self._told("read"):
      self._pull(before)
    terminal.say(
      f"workdir {self._url}: this machine works in {self._folder} and copies it every {PERIOD:.0f} s and at the end;"
      " compiled/ and cache/ stay here"
    )
    self._thread.start()
    return self

  def __exit__(self, kind, error, traceback):
    # Even a run that was told to stop has time for this, as for a checkpoint.
    distributed.at(f"copying to {self._url}", save=True)
    if isinstance(error, KeyboardInterrupt):
      terminal.say(f"copying what is left to {self._url}; Ctrl-C again ends without")
    self._stop.set()
    self._thread.join()
    try:
      with self._told("written"):
        self.push()
    except UserError as failure:
      # To start a run again that was taken over would take it over in turn: that is no way to stop.
      is_stopped = isinstance(error, Preempted | Waiting)
      if error is None or (is_stopped and isinstance(failure, _TakenOver)):
        raise
      terminal.say(str(failure))  # the other error explains more, and has its own exit code

  @contextlib.contextmanager
  def _told(self, what: str):
    """Turns whatever a library raises over the bucket into one UserError."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # OSError, HTTP and login errors have no common class
      raise UserError(
        f"{self._url} cannot be {what}: {type(error).__name__}: {reason(error)}. The bucket must exist, and the account"
        f" must be allowed to read, write and delete objects there; what the run has written lies in {self._folder},"
        " and the same command on this machine goes on from there"
      ) from error

  def _work(self):
    told = ""
    while not self._stop.wait(PERIOD):
      try:
        self.push()
        told = ""
      except _TakenOver as error:
        terminal.say(str(error))
        os.kill(os.getpid(), signal.SIGTERM)  # the run saves on this machine, and ends
        return
      except Exception as error:  # a network that fails for a while: the next time, or the end
        if told != (told := reason(error)):  # once, not every PERIOD
          terminal.say(f"{self._url} could not be written, and is tried again: {told}")

  # --- in -------------------------------------------------------------------------------------------

  def _there(self) -> dict[str, tuple[int, str]]:
    """Path -> (size, token) of the objects that are mirrored.

    Raises:
      UserError: there are others than a run's.
    """
    self._fs.invalidate_cache()
    try:
      found = self._fs.find(self._root, detail=True)
    except FileNotFoundError:
      return {}
    start = len(self._root.lstrip("/")) + 1
    objects = {name.lstrip("/")[start:]: info for name, info in found.items()}
    result = {}
    for name, info in objects.items():
      path = pathlib.PurePosixPath(name)
      if not name or name.endswith("/"):  # a folder, as the console and mounts make them
        continue
      if path.name == mirrored_files.OWNER and len(path.parts) > 1:
        raise UserError(
          f"{self._url} holds the workdir of another run, {shown(str(path.parent))}; {_APART}"
        )
      if path.is_absolute() or ".." in path.parts or str(path) != name or not name.isprintable():
        raise UserError(f"{self._url} holds an object of the name {shown(name)}, which is no run's")
      if not {*path.parts} & {*mirrored_files.OWN}:
        result[name] = (int(info["size"]), mirrored_files.token(info))
    return result

  def _pull(self, before: dict[str, Any]):
    """Makes the local folder what the bucket holds, unless it is what this machine went on from there with.

    Args:
      before: the owner of the workdir before this run.
    """
    there = self._there()
    if self._is_ahead(there, before):
      return
    if self._record and any(self._is_changed(name) for name in self._here()):
      terminal.say(
        f"{self._url} has changed since this machine copied to it: what {self._folder} has besides is given up"
      )
    # If this machine is lost meanwhile, the folder is nothing that could be gone on with.
    self._record = {}
    self._save_record()
    for path in list(self._folder.iterdir()):
      if path.name not in mirrored_files.OWN:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, (size, token) in there.items():
      if not mirrored_files.is_whole(name, there):  # of a checkpoint whose upload was broken off
        if mirrored_files.step(name).isdigit():
          self._record[name] = [0, 0, ""]  # the next push removes it
        continue
      path = self._folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      self._fs.get_file(f"{self._root}/{name}", str(path))
      distributed.progress()
      state = path.stat()
      self._record[name] = [size, state.st_mtime_ns, token]
      if state.st_size != size:
        raise UserError(f"{self._url}/{name} has {size} bytes, and {state.st_size} came; run again")
    self._save_record()

  def _is_ahead(self, there: dict[str, tuple[int, str]], before: dict[str, Any]) -> bool:
    """Whether nobody else has written since this folder was copied: what it has besides is its own, and newer."""
    known = {name: token for name, (_, _, token) in self._record.items() if token}
    unsure = self._record.keys() - known.keys()
    if known != {name: token for name, (_, token) in there.items() if name not in unsure}:
      return False
    if unsure and before.get("folder") != self._place:
      return False
    # A folder that somebody has emptied of all but hidden files is no run that has deleted everything.
    return not known or any((self._folder / name).exists() for name in known)

  # --- out ------------------------------------------------------------------------------------------

  def push(self):
    """Copies what has changed.

    Raises:
      UserError: another run has taken the workdir over.
    """
    self._require_own()
    # What a marker speaks of was written before it: it is in the listing after the one that has the marker.
    for_done, for_manifests, for_rest = [self._here() for _ in range(3)]
    markers = [name for name in for_manifests if mirrored_files.last(name) == manifest.NAME]
    markers += [name for name in for_done if mirrored_files.last(name) == finished.DONE]
    rest = [name for name in for_rest if not mirrored_files.is_marker(name)]
    listed = {*for_done, *for_manifests, *for_rest}
    gone = [name for name in self._record if name not in listed]
    changed = [name for name in (*rest, *markers) if self._is_changed(name)]
    if not gone and not changed:
      return
    for name in (*gone, *changed):
      self._record.setdefault(name, [0, 0, ""])[2] = ""
    self._save_record()
    try:
      self._remove([name for name in gone if mirrored_files.last(name) == finished.DONE])
      lost = self._copy_all(changed, [*(listed - {*for_rest})])
      # An old checkpoint goes only when the new one is there.
      if not lost:
        self._remove(
          sorted((name for name in gone if name in self._record), key=mirrored_files.comes_late)
        )
    finally:
      self._save_record()

  def _copy_all(self, names: list[str], lost: list[str]) -> list[str]:
    """Copies files in order.

    Args:
      names: the files, markers last.
      lost: others, that were deleted or renamed while the folder was listed.
    Returns:
      `lost`, and those that were deleted or renamed since.
    """
    lost = list(lost)
    for name in names:
      if mirrored_files.last(name) == manifest.NAME:
        folder = name.removesuffix(manifest.NAME)
        if any(other.startswith(folder) for other in lost):
          terminal.say(
            f"{self._folder / folder} was deleted before it was copied. If that goes on, copies take longer than"
            " checkpoints stay: raise checkpoint.every_steps or checkpoint.keep"
          )
          continue
      if mirrored_files.is_marker(name):
        self._require_own()
      try:
        self._copy(name)
      except FileNotFoundError:
        if (self._folder / name).exists():  # it is the bucket that is not there
          raise
        lost.append(name)
      if self._stop.is_set():  # else this is beside the run, whose own headway alone counts
        distributed.progress()
    return lost

  def _remove(self, names: list[str]):
    if names:
      self._require_own()
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        self._fs.rm_file(f"{self._root}/{name}")
      del self._record[name]

  def _copy(self, name: str):
    path, remote = self._folder / name, f"{self._root}/{name}"
    state = path.stat()
    self._fs.put_file(str(path), remote)
    self._fs.invalidate_cache()
    # A file that grew meanwhile is copied again the next time.
    found = self._fs.find(remote, detail=True)  # `info` spells it otherwise in some file systems
    token = next(
      (mirrored_files.token(info) for path, info in found.items() if path.endswith(remote)), ""
    )
    self._record[name] = [state.st_size, state.st_mtime_ns, token]

  def _is_changed(self, name: str) -> bool:
    """Whether a local file is to be copied."""
    size, time, token = self._record.get(name, (0, 0, ""))
    try:
      state = (self._folder / name).stat()
    except FileNotFoundError:  # `_copy` finds it out
      return True
    return not token or (size, time) != (state.st_size, state.st_mtime_ns)

  def _here(self) -> list[str]:
    """Paths of the local files that are mirrored; of checkpoints, the whole ones'."""
    return [
      str(path.relative_to(self._folder)) for path in sorted(mirrored_files.files(self._folder))
    ]

  def _owner(self) -> dict[str, Any]:
    """What the run that began last says of itself; {} if there is none."""
    self._fs.invalidate_cache()
    try:
      return json.loads(self._fs.cat_file(f"{self._root}/{mirrored_files.OWNER}"))
    except FileNotFoundError:
      return {}

  def _require_own(self):
    """Raises UserError if another run has begun in the workdir since this one did."""
    owner = self._owner()
    if not owner:
      raise FileNotFoundError(f"{self._url}/{mirrored_files.OWNER} is gone")
    if owner["id"] != self._id:
      other = f"process {owner['process']} on {owner['host']}"
      raise _TakenOver(
        f"{self._url} was taken over by another run ({shown(other)}), which goes on from the last copy; this"
        f" run ends, and what it did since lies in {self._folder}"
      )

  def _require_alone(self):
    """Raises UserError if the workdir lies in that of another run, which would copy and delete its files too."""
    for folder in pathlib.PurePosixPath(self._root).parents:
      is_there = False
      with contextlib.suppress(Exception):  # an account may be allowed to read its own folder only
        is_there = bool(folder.name) and self._fs.exists(f"{folder}/{mirrored_files.OWNER}")
      if is_there:
        raise UserError(
          f"{self._url} lies in the workdir of another run, {shown(folder.name)}; {_APART}"
        )

  def _read_record(self):
    """Reads what was copied before.

    Raises:
      UserError: the folder holds something else than a copy of this workdir.
    """
    url = ""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
      record = json.loads((self._folder / mirrored_files.RECORD).read_text())
      url, self._place, self._record = record["url"], record["folder"], record["files"]
    if url != self._url and any(
      path.name not in mirrored_files.OWN for path in self._folder.iterdir()
    ):
      raise UserError(
        f"{self._folder} holds other files than a copy of {self._url}, which it would become: give another --scratch"
      )
    if url != self._url:
      self._place, self._record = self._id, {}
      self._save_record()

  def _save_record(self):
    scratch = self._folder / f"{mirrored_files.RECORD}.tmp"
    record = {"url": self._url, "folder": self._place, "files": self._record}
    scratch.write_text(json.dumps(record))
    os.replace(scratch, self._folder / mirrored_files.RECORD)


@contextlib.contextmanager
def mirrored(url: str, folder: pathlib.Path) -> Generator[None, None, None]:
  """Around a run whose workdir is in a bucket; all processes enter and leave it together.

  Raises:
    UserError: the extra `gcs` is not installed, the bucket cannot be read or written, or the folder has other files.
  """
  first = jax.process_index() == 0
  stopped = None
  try:
    with open_bucket(url, folder) if first else contextlib.nullcontext():
      distributed.meet("the workdir is copied from its bucket")
      try:
        yield
      except UserError as error:
        # Else the others' word of the same mistake would end this process within its last copy. A fault of storage is
        # no mistake, with which the others would end for good.
        if not may_pass(error):
          distributed.tell_mistake(one_line(error))
        raise
  except (Preempted, Waiting) as error:
    stopped = error
  # The others wait for the last copy: a process that is left alone is ended after a while.
  distributed.meet("the workdir is copied to its bucket", save=True)
  if stopped:
    raise stopped


def open_bucket(url: str, folder: pathlib.Path) -> Mirror:
  """The mirror of a workdir in a bucket.

  Raises:
    UserError: the extra `gcs` is not installed.
  """
  try:
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
  except ImportError:
    raise UserError(
      f"--workdir={url} needs the gcs extra: pip install 'instructjax[gcs]', or mount the bucket"
    ) from None
  return Mirror(fs, root, url, folder)
