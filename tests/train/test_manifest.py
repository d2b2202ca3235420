"""The manifest of a checkpoint: what it notices, in files of all sizes."""

import errno
import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.core.errors import UserError
from instructjax.train import manifest

PAGE, CHUNK = 4096, 2**20  # bytes


def _folder(path, size):
  (path / "state" / "d").mkdir(parents=True)
  (path / "state" / "d" / "a").write_bytes(np.random.default_rng(size).bytes(size))
  (path / "empty").write_bytes(b"")
  manifest.write(path)
  return path / "state" / "d" / "a"


@pytest.mark.parametrize("size", [1, 7, PAGE - 1, PAGE, PAGE + 1, CHUNK, CHUNK + 5, 2 * CHUNK])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path, size):
  file = _folder(tmp_path, size)
  assert manifest.find_damage(tmp_path) is None and manifest.find_half(tmp_path) is None
  data = file.read_bytes()
  for place in {0, size // 2, size - 1}:
    for bit in (0, 7):
      other = bytearray(data)
      other[place] ^= 1 << bit
      file.write_bytes(other)
      damage = manifest.find_damage(tmp_path)
      assert (damage.path, damage.fault) == (file, "has other bytes than were saved")
      assert manifest.find_fault(tmp_path, "state/d/a") == damage
      assert manifest.find_fault(tmp_path, "empty") is None
      assert manifest.find_half(tmp_path) is None  # reads no bytes
  file.write_bytes(data)
  assert manifest.find_damage(tmp_path) is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  return folder, _folder(folder, 3 * PAGE + 5)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_other_bytes_at_any_place_are_noticed(saved, data):
  folder, file = saved
  path = data.draw(st.sampled_from([file, folder / manifest.NAME]))
  before = path.read_bytes()
  start = data.draw(st.integers(0, len(before)))
  end = data.draw(st.integers(start, min(len(before), start + 20)))
  after = before[:start] + data.draw(st.binary(max_size=20)) + before[end:]
  path.write_bytes(after)
  try:
    damage = manifest.find_damage(folder)
    assert (damage is None) == (after == before)
    assert damage is None or damage.path == path
  finally:
    path.write_bytes(before)


@pytest.mark.parametrize("step", [8, PAGE, CHUNK])
def test_exchanged_parts_are_noticed(tmp_path, step):
  # The sums of both together stay the same: words of a page, pages of a chunk, chunks of the file.
  file = _folder(tmp_path, 3 * CHUNK)
  data = file.read_bytes()
  file.write_bytes(data[step : 2 * step] + data[:step] + data[2 * step :])
  assert manifest.find_damage(tmp_path).path == file


def test_zeros_in_place_of_a_page_and_other_sizes_are_noticed(tmp_path):
  file = _folder(tmp_path, 3 * PAGE)
  data = file.read_bytes()
  file.write_bytes(data[:PAGE] + bytes(PAGE) + data[2 * PAGE :])
  assert manifest.find_damage(tmp_path).fault == "has other bytes than were saved"
  for other in (data[:-1], data + b"\0", b""):
    file.write_bytes(other)
    for found in (manifest.find_half(tmp_path), manifest.find_damage(tmp_path)):
      assert (found.path, found.fault) == (file, "has another size than was saved")
  file.unlink()
  for found in (manifest.find_half(tmp_path), manifest.find_damage(tmp_path)):
    assert str(found) == f"{file} is missing"
  assert manifest.find_fault(tmp_path, "state/d/b").fault == "is missing"  # never listed


def test_each_bit_of_the_manifest_itself_counts(tmp_path):
  _folder(tmp_path, 10)
  path = tmp_path / manifest.NAME
  text = path.read_bytes()
  for bit in range(0, 8 * len(text), 13):
    data = bytearray(text)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    damage = manifest.find_half(tmp_path)
    assert (damage.path, damage.fault) == (path, "has other bytes than were saved"), bytes(data)
  assert manifest.find_damage(tmp_path).path == path


@pytest.mark.parametrize(
  "text", ["", "[]", "5", "null", "{", '{"files": 5}', '{"files": {"a": 1}}', "[" * 100_000, "\xff"]
)
def test_another_shape_is_damage(tmp_path, text):
  (tmp_path / manifest.NAME).write_bytes(text.encode("latin1"))
  for found in (manifest.find_half(tmp_path), manifest.find_damage(tmp_path)):
    assert (found.path, found.fault) == (
      tmp_path / manifest.NAME,
      "has other bytes than were saved",
    )


def _checksum(words):
  """Of a file of less than a chunk, or of what begins with a chunk: pages summed, and the columns of each chunk."""
  sums = b""
  for start in range(0, len(words), CHUNK // 8):
    chunk = words[start : start + CHUNK // 8]
    pages = [chunk[place : place + 512] for place in range(0, len(chunk), 512)]
    columns = np.zeros(512, "<u8")
    for page in pages:
      columns[: len(page)] += page
    sums += np.array([sum(map(int, page)) % 2**64 for page in pages], "<u8").tobytes()
    sums += columns.tobytes()
  return hashlib.sha256(sums).hexdigest()


@pytest.mark.parametrize("size", [3 * 512 - 100, CHUNK // 8 + 700])
def test_the_checksum_is_what_its_docstring_says(tmp_path, size):
  words = np.arange(size, dtype="<u8") ** 3
  (tmp_path / "a").write_bytes(words.tobytes())
  manifest.write(tmp_path)
  found = json.loads((tmp_path / manifest.NAME).read_text())["files"]["a"]
  assert found == [words.nbytes, _checksum(words)]


def test_a_disk_that_cannot_read_its_own_sector_is_damage(tmp_path, monkeypatch):
  file = _folder(tmp_path, 10)

  def unreadable(path):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(manifest, "_sum", unreadable)
  monkeypatch.setattr(manifest, "_PAUSES", (0.0,))
  assert manifest.find_fault(tmp_path, "state/d/a").path == file
  assert manifest.find_damage(tmp_path).fault == "has other bytes than were saved"


@pytest.mark.parametrize(
  ("number", "tries"), [(errno.ESTALE, 3), (errno.ENOTCONN, 3), (errno.EACCES, 1)]
)
def test_a_file_that_cannot_be_reached_is_not_missing(tmp_path, monkeypatch, number, tries):
  """Else a mount that fails for a moment would have whole checkpoints put aside."""
  _folder(tmp_path, 10)
  read_text, failures = pathlib.Path.read_text, []

  def failing(path, **kwargs):
    if path.name == manifest.NAME and len(failures) < tries:
      failures.append(path)
      raise OSError(number, os.strerror(number), str(path))
    return read_text(path, **kwargs)

  monkeypatch.setattr(manifest, "_PAUSES", (0.0, 0.0))
  monkeypatch.setattr(pathlib.Path, "read_text", failing)
  for find in (manifest.find_half, manifest.find_damage):
    failures.clear()
    with pytest.raises(UserError, match=f"cannot read .*{manifest.NAME}.*{os.strerror(number)}"):
      find(tmp_path)
    assert len(failures) == tries
  failures[:] = [None] * (tries - 1)  # once more, and then it can be read
  if tries > 1:
    assert manifest.find_half(tmp_path) is None


def test_damage_that_another_process_finds_is_everybodys(tmp_path, monkeypatch):
  _folder(tmp_path, 10)
  said = []

  def gather(found):
    said.append(int(found))
    return np.array([found, 2 + 1 * 3])  # "has another size", of the second file

  monkeypatch.setattr(manifest.multihost_utils, "process_allgather", gather)
  assert str(manifest.find_damage(tmp_path)) == (
    f"{tmp_path / 'state' / 'd' / 'a'} has another size than was saved"
  )
  assert said == [2**31 - 1]  # this process has found nothing
