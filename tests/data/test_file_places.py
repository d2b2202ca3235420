"""Places of files: the same file on two hosts has one identity, and a host's own file another on each."""

import os

import pytest

from instructjax.data import file_places
from instructjax.data.file_places import Mount

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / {point} rw,relatime shared:5 - {kind} {source} rw
31 22 0:41 / /elsewhere rw - tmpfs tmpfs rw
"""


@pytest.fixture
def folder(tmp_path):
  path = tmp_path / "shared folder"
  path.mkdir()
  return path


@pytest.fixture
def mounted(tmp_path, folder, monkeypatch):
  """A function that has the folder look like a mount."""

  def pretend(kind="nfs4", source="10.0.0.2:/share", point=folder):
    table = tmp_path / "mountinfo"
    escaped = str(point).replace(" ", r"\040")
    table.write_text(MOUNTS.format(point=escaped, kind=kind, source=source))
    monkeypatch.setattr(file_places, "_MOUNTS", table)

  return pretend


def write(path, content=b"weights", at=1_700_000_000):
  path.write_bytes(content)
  os.utime(path, (at, at))
  return str(path)


def test_the_deepest_mount_holds_a_file(folder, mounted):
  mounted()
  assert file_places.mount_of(write(folder / "a")) == Mount(
    "/", str(folder), "nfs4", "10.0.0.2:/share"
  )
  assert file_places.mount_of(str(folder.parent / "b")).kind == "ext4"
  # A folder whose name only begins like the mount's is not in it.
  assert file_places.mount_of(str(folder) + "2/a").kind == "ext4"


@pytest.mark.parametrize(
  ("kind", "source", "is_remote"),
  [
    ("nfs4", "10.0.0.2:/share", True),
    ("fuse.gcsfuse", "bucket", True),
    ("ext4", "/dev/sda1", False),
    ("virtiofs", "share", False),
    ("fuse.fuse-overlayfs", "fuse-overlayfs", False),
    ("nfs4", "127.0.0.1:/", False),
    ("nfs4", "localhost:/share", False),
    ("nfs4", "[::1]:/share", False),
  ],
)
def test_of_which_file_systems_hosts_see_the_same_files(
  kind, source, is_remote, folder, mounted, monkeypatch, tmp_path
):
  mounted(kind, source)
  path = write(folder / "a")
  here = file_places.identity(path)
  boot = tmp_path / "boot"
  boot.write_text("another host")
  monkeypatch.setattr(file_places, "_BOOT", boot)
  assert (file_places.identity(path) == here) is is_remote


def test_a_remote_file_is_the_same_under_another_mount_point(folder, mounted, tmp_path):
  mounted()
  here = file_places.identity(write(folder / "a"))
  other = tmp_path / "other"
  other.mkdir()
  mounted(point=other)
  assert file_places.identity(write(other / "a")) == here
  assert file_places.identity(write(other / "b")) != here
  assert file_places.identity(write(other / "a", b"longer weights")) != here
  assert file_places.identity(write(other / "a", at=1_700_000_001)) != here


def test_files_of_one_disk_differ(tmp_path):
  one, two = write(tmp_path / "a"), write(tmp_path / "b")
  assert file_places.identity(one) == file_places.identity(one)
  assert file_places.identity(one) != file_places.identity(two)


def test_a_bucket_mounted_anew_gives_other_inodes(folder, mounted):
  path = write(folder / "a")
  for kind, counts in [("fuse.gcsfuse", False), ("nfs4", True)]:
    mounted(kind)
    assert bool(file_places.state(path)[3]) is counts


def test_a_system_without_the_table_tells_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(file_places, "_MOUNTS", tmp_path / "none")
  monkeypatch.setattr(file_places, "_BOOT", tmp_path / "none")
  path = write(tmp_path / "a")
  assert file_places.mount_of(path) is None
  assert file_places.identity(path) == file_places.identity(path)
  assert file_places.state(path)[3] == os.stat(path).st_ino
