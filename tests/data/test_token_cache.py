"""The token cache: made once, whole or absent, mended when damaged, and by one process at a time."""

import errno
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data import token_cache, token_store
from instructjax.data.token_cache import CachedTokens, Tokenized
from instructjax.data.token_store import Encoded
from tests import micro

ROOT = pathlib.Path(__file__).parents[2]
VOCAB = 50
DOCUMENTS = [[2 + (i * j) % 40 for j in range(1 + i % 7)] for i in range(40)]


class Source:
  """Documents that count how often they are tokenized."""

  def __init__(self, documents=DOCUMENTS):
    self.documents, self.times = documents, 0

  def __call__(self) -> Tokenized:
    self.times += 1
    return Tokenized(
      (Encoded(ids) for ids in self.documents), len(self.documents), {"long": [2, "a.jsonl:3"]}
    )


def cached(root, source, about=0) -> CachedTokens:
  return CachedTokens(root, "documents (train)", VOCAB, {"about": about}, source, lambda: None)


def tokens(rows):
  return rows.gather(np.arange(rows.num_rows)).token_BL.tolist()


def expected(length=8):
  rows = micro.in_memory(map(Encoded, DOCUMENTS), VOCAB).pack(length, VOCAB, splits=True)
  return tokens(rows)


def test_records_are_tokenized_once(tmp_path):
  source = Source()
  for length in (8, 8, 12):
    rows = cached(tmp_path, source).rows(length, splits=True)
    assert tokens(rows) == expected(length)
  assert [one.ids for one in cached(tmp_path, source).sequences()] == DOCUMENTS
  assert cached(tmp_path, source).store().left_out == {"long": [2, "a.jsonl:3"]}
  assert source.times == 1
  cached(tmp_path, source, about=1).store()  # of other data, say
  assert source.times == 2
  assert sum(path.is_dir() for path in tmp_path.iterdir()) == 4


DAY = 24 * 3600


def _age(folder, days):
  then = time.time() - days * DAY
  os.utime(folder, (then, then))


def test_what_nobody_opened_for_a_month_is_removed_when_something_is_made(tmp_path, caplog):
  for about in range(3):
    cached(tmp_path, Source(), about).rows(8, splits=True)
  old, used, recent = (
    [*tmp_path.glob(cached(tmp_path, None, i).folder.name + "*")] for i in range(3)
  )
  left = tmp_path / f"documents-{'0' * 20}-rows-8.host.1.partial"
  others = [tmp_path / "documents-mine", tmp_path / f"documents-{'0' * 20}.txt"]
  for folder in (left, *others):
    folder.mkdir()
  for folder in (*old, *used, left, *others):
    _age(folder, 31)
  for folder in recent:
    _age(folder, 29)
  cached(tmp_path, Source(), 1).rows(8, splits=True)  # opened: it is in use, and nothing is made
  assert all(path.exists() for path in (*old, left))
  with caplog.at_level(logging.WARNING):
    cached(tmp_path, Source(), about=3).store()
  assert caplog.messages == [f"{tmp_path}: removed 3 entries that were not used for 30 days"]
  assert not any(path.exists() for path in (*old, left) if path.suffix != ".lock")
  assert all(path.exists() for path in (*used, *recent, *others))


def test_damage_found_while_training_is_mended_in_one_line(tmp_path, caplog):
  source = Source()
  rows, untouched = (cached(tmp_path, source).rows(8, splits=True) for _ in range(2))
  path = cached(tmp_path, source).folder / "tokens"
  content = bytearray(path.read_bytes())
  content[20] ^= 4
  path.write_bytes(content)
  with caplog.at_level(logging.WARNING):
    assert tokens(rows) == expected()
  assert source.times == 2
  (told,) = caplog.messages
  assert told.startswith("the token cache of documents (train) is damaged (row ")
  # Another process's rows, opened before: it finds what is made anew, and makes nothing.
  assert tokens(untouched) == expected() and source.times == 2
  assert tokens(cached(tmp_path, source).rows(8, splits=True)) == expected()


def test_damage_of_rows_found_while_training_is_mended(tmp_path):
  source = Source()
  rows = cached(tmp_path, source).rows(8, splits=True)
  (path,) = tmp_path.glob("*-rows-8/size_N")
  path.write_bytes(bytes(path.stat().st_size))
  assert tokens(rows) == expected()
  assert tokens(cached(tmp_path, source).rows(8, splits=True)) == expected()


def test_other_code_does_not_find_what_this_one_has_made(tmp_path, monkeypatch):
  code, seen = token_cache.code.__wrapped__, []
  monkeypatch.setattr(token_cache, "__file__", str(tmp_path / "token_cache.py"))
  for text in ("one", "two", "one"):
    (tmp_path / "bpe.py").write_text(text)
    seen.append(code())
  assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("name", ["tokens", "ends", "header.json"])
def test_damage_found_at_the_start_is_mended_in_one_line(tmp_path, name, caplog):
  source = Source()
  first = cached(tmp_path, source)
  first.rows(8, splits=True)
  path = first.folder / name
  path.write_bytes(path.read_bytes()[:-1])
  with caplog.at_level(logging.WARNING):
    assert tokens(cached(tmp_path, source).rows(8, splits=True)) == expected()
  assert len(caplog.messages) == 1 and "is damaged" in caplog.text and source.times == 2


@pytest.mark.parametrize("header", ["[" * 100_000, '{"a":' * 100_000, "5", "[]", "{}", "\x00"])
def test_a_header_of_another_shape_is_mended(tmp_path, header):
  source = Source()
  first = cached(tmp_path, source)
  first.rows(8, splits=True)
  (first.folder / "header.json").write_text(header)
  assert tokens(cached(tmp_path, source).rows(8, splits=True)) == expected()
  assert source.times == 2


def test_damage_of_ids_is_found_before_rows_are_packed(tmp_path, caplog):
  source = Source()
  folder = cached(tmp_path, source)
  folder.store()
  path = folder.folder / "tokens"
  path.write_bytes(bytes(path.stat().st_size))
  assert tokens(cached(tmp_path, source).rows(8, splits=True)) == expected()
  assert source.times == 2 and "tokens: its checksum is another" in caplog.text


def test_what_is_mended_into_something_else_is_refused(tmp_path):
  source = Source()
  rows = cached(tmp_path, source).rows(8, splits=True)
  path = cached(tmp_path, source).folder / "tokens"
  path.write_bytes(bytes(path.stat().st_size))
  source.documents = DOCUMENTS[1:]
  with pytest.raises(
    UserError, match=f"^{path.parent} was damaged, and made anew it is another: c"
  ):
    tokens(rows)


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch):
  source, add = Source([[1] * 1000] * 4000), token_store.Writer.add
  written = []

  def full(self, sequence):
    written.append(add(self, sequence))
    if len(written) == 1000:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(token_store.Writer, "add", full)
  # 4000 documents of 1000 tokens of 2 bytes are 7.6 MiB.
  told = (
    "^cannot write .*documents-.*: No space left on device; it needs about 8 MiB. Make room, or"
  )
  with pytest.raises(UserError, match=told) as error:
    cached(tmp_path, source).store()
  assert "\n" not in str(error.value)
  assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # nothing half-written is left
  assert cached(tmp_path, source).store().num_tokens == 4_000_000


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="cannot write .*--config.data.token_cache"):
    cached(tmp_path / "file", Source()).store()


def test_errors_of_the_records_are_passed_on_and_leave_nothing(tmp_path):
  def bad():
    yield Encoded([1])
    raise UserError("line 2 is bad")

  with pytest.raises(UserError, match="^line 2 is bad$"):
    cached(tmp_path, lambda: Tokenized(bad(), 2, {})).store()
  assert not [path for path in tmp_path.iterdir() if path.is_dir()]
  with pytest.raises(UserError, match="a sequence of 6 tokens does not fit rows of length=5"):
    cached(tmp_path, Source()).rows(5, splits=False)


def child(root, seconds):
  """Entry of the processes below: tokenizes, and takes its time over it."""

  def slow():
    for number, ids in enumerate(DOCUMENTS):
      if number == 1:
        print("begun", flush=True)
        time.sleep(seconds)
      yield Encoded(ids)

  cached(pathlib.Path(root), lambda: Tokenized(slow(), len(DOCUMENTS), {})).store()
  print("made", flush=True)


def test_who_waits_takes_over_from_a_writer_that_is_killed(tmp_path, monkeypatch, caplog):
  code = f"from tests.data import test_token_cache; test_token_cache.child({str(tmp_path)!r}, 600)"
  with subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  ) as writer:
    assert writer.stdout.readline() == "begun\n"
    source, slept = Source(), []

    def sleep(seconds):
      slept.append(seconds)
      if len(slept) == 2:
        writer.send_signal(signal.SIGKILL)
        writer.wait()

    ticks = iter(range(1000))
    monkeypatch.setattr(token_cache.time, "sleep", sleep)
    monkeypatch.setattr(token_cache.time, "monotonic", lambda: float(next(ticks)))
    try:
      store = cached(tmp_path, source).store()
    finally:  # where nobody waits, nobody has killed it
      writer.kill()
  assert [one.ids for one in store] == DOCUMENTS and source.times == 1 and len(slept) >= 2
  assert caplog.messages == ["waiting for another process that tokenizes documents (train)"]
  assert not [*tmp_path.glob("*.partial")]


def test_who_waits_finds_what_the_writer_made(tmp_path):
  code = f"from tests.data import test_token_cache; test_token_cache.child({str(tmp_path)!r}, 0.3)"
  with subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  ) as writer:
    assert writer.stdout.readline() == "begun\n"
    source = Source()
    assert [one.ids for one in cached(tmp_path, source).store()] == DOCUMENTS
    assert writer.stdout.read() == "made\n"
  assert source.times == 0
