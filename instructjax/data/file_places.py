"""Whether a path on one host and a path on another are one file, judged by where they lie.

Called by checksums.py and by stages/shared_hashing.py, so that a file which several processes read is hashed once.
"""

import dataclasses
import os
import pathlib
import re
import socket

_MOUNTS = pathlib.Path("/proc/self/mountinfo")
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
# File systems whose source names the same server or bucket on every host. Others, such as virtiofs, have names that
# each host gives anew.
_REMOTE = frozenset(
  (
    *("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "beegfs"),
    *("fuse.gcsfuse", "fuse.s3fs", "fuse.glusterfs"),
  )
)
# A tunnel on the host itself: behind it may be another server on each.
_TUNNEL = re.compile(r"(127\.|localhost\b|\[?::1\b)")


@dataclasses.dataclass(frozen=True)
class Mount:
  """A mounted file system.

  Attributes:
    root: the folder of the file system that is mounted.
    point: the folder that it is mounted on.
    kind: its type, such as `nfs4`.
    source: the server, bucket or device.
  """

  root: str
  point: str
  kind: str
  source: str

  @property
  def is_remote(self) -> bool:
    """Whether hosts that mount this source see the same files."""
    return self.kind in _REMOTE and not _TUNNEL.match(self.source)


def mount_of(path: str) -> Mount | None:
  """The file system on which a path lies; None where the system does not tell."""
  try:
    lines = _MOUNTS.read_text().splitlines()
  except (OSError, ValueError):
    return None
  real = os.path.realpath(path)
  found = None
  for line in lines:
    own, _, theirs = line.partition(" - ")
    fields, others = own.split(" "), theirs.split(" ")
    if len(fields) < 5 or len(others) < 2:
      continue
    mount = Mount(*map(_unescaped, (fields[3], fields[4], others[0], others[1])))
    is_above = mount.point == "/" or f"{real}/".startswith(f"{mount.point}/")
    # Of mounts on one folder, the last one covers the others.
    if is_above and (found is None or len(mount.point) >= len(found.point)):
      found = mount
  return found


def _unescaped(text: str) -> str:
  """Undoes the octal escapes of blanks and backslashes."""
  return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def state(path: str) -> list[int]:
  """What changes when a file is written: its size, times and inode. The inode's own time cannot be set back.

  Raises:
    OSError: there is no such file.
  """
  found = os.stat(path)
  mount = mount_of(path)
  # FUSE numbers its inodes anew at each mount.
  is_lasting = mount is None or not mount.kind.startswith("fuse.")
  return [
    found.st_size,
    found.st_mtime_ns,
    found.st_ctime_ns,
    found.st_ino if is_lasting else 0,
  ]


def identity(path: str) -> str:
  """A name that is equal for the same file in the same state, on whatever host, and different for different files.

  A file of a network file system or a bucket is named by that; one of a host's own disk by the host.

  Raises:
    OSError: there is no such file.
  """
  mount, found = mount_of(path), os.stat(path)
  if mount is not None and mount.is_remote:
    inside = os.path.relpath(os.path.realpath(path), mount.point)
    where = f"{mount.kind}:{mount.source}:{os.path.join(mount.root, inside)}"
  else:
    where = f"{_host()}:{found.st_dev}:{found.st_ino}:{found.st_ctime_ns}"
  return f"{where}:{found.st_size}:{found.st_mtime_ns}"


def _host() -> str:
  """The machine on which this process runs, until it is started anew."""
  try:
    return _BOOT.read_text().strip()
  except OSError:
    return socket.gethostname()
