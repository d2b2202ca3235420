"""Text files of JSON: lines, arrays, printed objects; compressed, in other encodings, damaged."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pytest

from instructjax.core.errors import UserError
from instructjax.data import text_files
from instructjax.data.messages import BadRecord

ROWS = [{"text": "é"}, {"text": "two\nlines", "ids": [1, 2]}, {"text": "c"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path, content):
  """[(line, value)] of a file with this content."""
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return [
    (int(where.rpartition(":")[2]), text_files.decode(raw, "documents", where))
    for where, raw in text_files.rows(str(path))
  ]


@pytest.mark.parametrize(
  ("content", "lines"),
  [
    (LINES, [1, 2, 3]),
    ("\ufeff" + LINES, [1, 2, 3]),
    (LINES.replace("\n", "\r\n"), [1, 2, 3]),
    (LINES.replace("\n", "\n \n\n"), [1, 4, 7]),
    (json.dumps(ROWS), [1, 1, 1]),
    ("\n" + json.dumps(ROWS) + "\n\n", [2, 2, 2]),
    (json.dumps(ROWS, indent=2), [2, 5, 12]),
    ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", [2, 3, 4]),
    ("\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 4, 11]),
    (json.dumps(ROWS, indent=2).replace("\n", "\r\n"), [2, 5, 12]),
  ],
)
def test_rows_and_their_lines(tmp_path, content, lines):
  assert read(tmp_path / "a", content) == list(zip(lines, ROWS, strict=True))


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_a_part_at_a_time(tmp_path, monkeypatch, indent):
  monkeypatch.setattr(text_files, "_CHUNK", 3)
  assert [row for _, row in read(tmp_path / "a", json.dumps(ROWS, indent=indent))] == ROWS
  monkeypatch.setattr(text_files, "_LONGEST", 20)
  with pytest.raises(UserError, match="a value of more than|longer than"):
    read(tmp_path / "a", json.dumps([{"text": "x" * 100}], indent=indent))


@pytest.mark.parametrize(
  "compress",
  [
    gzip.compress,
    bz2.compress,
    lzma.compress,
    lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    lambda data: b"".join(pyarrow.compress(d, codec="zstd", asbytes=True) for d in (data, b"\n")),
  ],
)
def test_compressed_files_whatever_their_names(tmp_path, compress):
  data = compress(LINES.encode())
  assert [row for _, row in read(tmp_path / "a.jsonl", data)] == ROWS
  long = compress("".join(f'{{"text": "{i**9}"}}\n' for i in range(4000)).encode())
  with pytest.raises(UserError, match="cannot read .*a.jsonl: "):
    read(tmp_path / "a.jsonl", long[: len(long) // 2])


def test_a_pointer_of_git_lfs_is_named(tmp_path):
  with pytest.raises(UserError, match="/a is a Git LFS pointer"):
    read(tmp_path / "a", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (LINES.encode("utf-16"), "it is UTF-16 and must be UTF-8; convert it with `iconv -f UTF-16 -t"),
    (LINES.encode("utf-16-be"), "it is UTF-16"),
    (LINES.encode("utf-16-le"), "it is UTF-16"),
    (LINES.encode("utf-32"), "it is UTF-32"),
    (gzip.compress(LINES.encode("utf-16"), mtime=0), "it is UTF-16"),
    (b"PAR1" + bytes(50), "it is a parquet file; read it as parquet:PATH"),
    (b"ARROW1" + bytes(50), "it is an Arrow file; read its folder as datasets:PATH"),
    (b"PK\x03\x04", "it is a zip file"),
    ('[{"a": 1}\n{"a": 2}]', r"not JSON at line 2 \(Expecting ',' delimiter"),
    ('[\n{"a": 1},\n]', "not JSON at line 3"),
    ('[\n{"a": 1},,\n{"a": 1}]', "not JSON at line 2"),
    ('[\n{"a": 1}', "not JSON at line 2"),
    ('[{"a": 1}]\n[{"a": 2}]', "not JSON at line 2"),
    ('{\n"a": 1,\n"b": }', "not JSON at line 3"),
    ("[\n" + '{"a":' * 100_000, r"not JSON at line 2 \(nested too deeply"),
    (b'[\n{"a": "\xff"}]', "not UTF-8 after line"),
  ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_refused_in_words(tmp_path, content, reason):
  with pytest.raises(UserError, match=f"^cannot read {tmp_path}/a: .*{reason}") as error:
    read(tmp_path / "a", content)
  assert type(error.value) is UserError


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (LINES.replace("\n", "\r"), "its lines end in a carriage return alone"),
    (LINES.encode() + b"\0\0\0", r"4: not JSON \(it holds NUL bytes"),
    (b'{"text": "a\0b"}', r"1: not JSON \(it holds NUL bytes"),
    ('{"a": {"b": 1, "b": 2}}', "1: a key occurs twice"),
    ('[{"a": 1},\n{"b": 1, "b": 2}]', "2: a key occurs twice"),
    ('[{"a": 1},\n{"b": ' + "9" * 5000 + "}]", "2: not JSON .a number of too many digits"),
    ('prompt,response\n"a","b"', r"1: not JSON \(Expecting value, column 1"),
    ('{"a": 1}\n{"b"', "2: not JSON"),
  ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, content, reason):
  with pytest.raises(BadRecord, match=f"^{tmp_path}/a:.*{reason}"):
    read(tmp_path / "a", content)


def test_rows_after_a_bad_one_of_an_array_are_read(tmp_path):
  (tmp_path / "a").write_text('[{"a": 1, "a": 2},\n7,\n{"b": 3}]')
  raw = [row for _, row in text_files.rows(str(tmp_path / "a"))]
  assert isinstance(raw[0], BadRecord) and [row.value for row in raw[1:]] == [7, {"b": 3}]


def test_empty_files_have_no_rows(tmp_path):
  assert read(tmp_path / "a", b"") == read(tmp_path / "a", b"\n \r\n\t\n") == []
  assert read(tmp_path / "a.gz", b"") == []


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, "_LONGEST", 10)
  with pytest.raises(UserError, match="line 2 is longer than"):
    read(tmp_path / "a", b'{"a": 1}\n' + b"x" * 11)


def test_only_files_that_can_be_read_again(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for name, reason in (
    ("pipe", "must be a file, and it is a folder, a pipe or a device"),
    (".", "must be a file, and it is a folder"),
    ("no", "No such file or directory"),
  ):
    with pytest.raises(UserError, match=reason):
      list(text_files.rows(str(tmp_path / name)))
