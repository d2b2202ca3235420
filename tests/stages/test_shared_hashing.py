"""Files that several processes read: each is hashed once, and all know its checksum."""

import hashlib
import os
import threading

import pytest

from instructjax.data import checksums, file_places
from instructjax.data.checksums import FileChecksums
from instructjax.stages import shared_hashing
from tests.parallel.store import teams


@pytest.fixture
def hashed(monkeypatch):
  """(process, name) of each file that was hashed, the process by the name of its thread."""
  found = []
  hash_ = checksums._hash

  def spy(path, progress):
    found.append((threading.current_thread().name, os.path.basename(path)))
    return hash_(path, progress)

  monkeypatch.setattr(checksums, "_hash", spy)
  return found


def share(memories, paths) -> list[FileChecksums]:
  """Runs one thread for each process, with its own memory and its own list of paths."""
  known = [FileChecksums(memory, lambda: None) for memory in memories]

  def one(team):
    shared_hashing.share(team, "weights", known[team.process], map(str, paths[team.process]))

  threads = [
    threading.Thread(target=one, args=(team,), name=f"process {team.process}")
    for team in teams(len(paths))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
    assert not thread.is_alive()
  return known


def write(folder, *sizes):
  paths = [folder / f"{i}.safetensors" for i in range(len(sizes))]
  for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
    path.write_bytes(bytes([i]) * size)
  return paths


def memories(tmp_path, n):
  return [tmp_path / f"memory{i}.json" for i in range(n)]


def test_each_file_is_hashed_by_one_and_known_to_all(tmp_path, hashed):
  paths = write(tmp_path, 50, 40, 30, 20)
  known = share(memories(tmp_path, 3), [paths] * 3)
  # By hand: 50, 40 and 30 go to the first three; the 20 to the third, who has the least.
  assert sorted(hashed) == [
    ("process 0", "0.safetensors"),
    ("process 1", "1.safetensors"),
    ("process 2", "2.safetensors"),
    ("process 2", "3.safetensors"),
  ]
  hashed.clear()
  right = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
  for one in known:
    assert one.content("hf", paths).digests == right
  assert not hashed


def test_what_one_process_remembers_nobody_hashes(tmp_path, hashed):
  paths, places = write(tmp_path, 50, 40), memories(tmp_path, 3)
  digests = FileChecksums(places[2], lambda: None).content("hf", paths).digests
  hashed.clear()
  known = share(places, [paths] * 3)
  assert not hashed
  assert known[0].content("hf", paths).digests == digests


def test_copies_on_disks_of_their_own_are_hashed_each(tmp_path, hashed):
  folders = [tmp_path / "a", tmp_path / "b"]
  for folder in folders:
    folder.mkdir()
  paths = [write(folder, 50) for folder in folders]
  share(memories(tmp_path, 2), paths)
  assert sorted(who for who, _ in hashed) == ["process 0", "process 1"]


def test_a_file_that_one_process_does_not_see_is_left_out(tmp_path, hashed):
  paths = write(tmp_path, 50, 40)
  known = share(memories(tmp_path, 2), [paths, [paths[0], tmp_path / "none"]])
  assert sorted(name for _, name in hashed) == ["0.safetensors", "1.safetensors"]
  with pytest.raises(FileNotFoundError):
    known[1].content("hf", [tmp_path / "none"])


def test_a_file_that_was_written_since_is_not_taken_over(tmp_path, hashed):
  (path,) = write(tmp_path, 50)
  before = file_places.identity(str(path))
  path.write_bytes(b"others")
  known = FileChecksums(tmp_path / "memory.json", lambda: None)
  known.learn(str(path), before, "0" * 64)
  assert known.content("hf", [path]).digests == (hashlib.sha256(b"others").hexdigest(),)


def test_a_file_that_is_written_while_it_is_hashed_is_met_by_each(tmp_path, monkeypatch):
  (path,) = write(tmp_path, 50)
  hash_ = checksums._hash

  def written(place, progress):
    digest = hash_(place, progress)
    if threading.current_thread().name != "MainThread":
      path.write_bytes(b"others")
    return digest

  monkeypatch.setattr(checksums, "_hash", written)
  known = share(memories(tmp_path, 2), [[path]] * 2)
  for one in known:
    assert one.content("hf", [path]).digests == (hashlib.sha256(b"others").hexdigest(),)
