"""Reads JSON from text files: one object a line, or a whole file that is an array or printed over several lines.

Called by `readers`. Imports `messages`. A problem with a single row raises BadRecord in `decode`, so that
it can be skipped; one with the whole file raises UserError.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from instructjax.core import foreign
from instructjax.core.errors import UserError
from instructjax.data.messages import BadRecord

# Bytes of a line, or characters of one value in a JSON array. Published files that are one line have more than 64 MiB
# (QuAC's training file); what is read of them takes several times as much memory.
_LONGEST = 2**28
_CHUNK = 2**20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_OPENERS = {_GZIP: gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
# What other files begin with -> how to mend it.
_OTHERS = {
  b"PAR1": "it is a parquet file; read it as parquet:PATH",
  b"ARROW1": "it is an Arrow file; read its folder as datasets:PATH",
  b"PK\x03\x04": "it is a zip file; unpack it",
  b"SQLite": "it is a database; export it as JSON lines",
}
_ENCODINGS = {
  codecs.BOM_UTF32_LE: "UTF-32",
  codecs.BOM_UTF32_BE: "UTF-32",
  codecs.BOM_UTF16_LE: "UTF-16",
  codecs.BOM_UTF16_BE: "UTF-16",
}


class Parsed(NamedTuple):
  """A value of a file that is read as a whole."""

  value: Any


def rows(path: str) -> Iterator[tuple[str, bytes | Parsed | BadRecord]]:
  """(file:line, raw row) of a file; `decode` makes the row's value. Blank lines are skipped.

  The file is UTF-8 and may be compressed with gzip, zstd, bzip2 or xz. If its first line is no object, but the start of
  an array or of an object that goes on in the next line, the file is read as one array of rows, or as objects one after
  the other.

  Raises:
    UserError: the file cannot be read, or is of another kind.
  """
  foreign.require_file(pathlib.Path(path))
  try:
    with opened(path) as file:
      _require_utf8(path, file)
      is_whole = None
      start = 0
      for number, line in _lines(path, file):
        if not line.strip():
          continue
        if is_whole is None:
          is_whole, start = _is_whole(line), number
        if is_whole:
          break
        yield f"{path}:{number}", line
      if is_whole:
        yield from _values(path, line, file, start)
  except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # a truncated or damaged file
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def decode(raw: bytes | Parsed | BadRecord, kind: str, where: str) -> Any:
  """The value of a raw row.

  Raises:
    BadRecord: the row is not JSON in UTF-8, or a key occurs twice in one of its objects.
  """
  if isinstance(raw, BadRecord):
    raise raw
  if isinstance(raw, Parsed):
    return raw.value
  problems: list[str] = []
  text = ""
  try:
    # utf-8-sig drops the byte order mark that some editors write at the start of a file.
    text = raw.strip().decode("utf-8-sig")
    value = json.loads(text, **_hooks(problems))
  except UnicodeDecodeError as error:
    raise BadRecord(f"{where}: not UTF-8 (byte {error.start + 1})") from error
  except json.JSONDecodeError as error:
    raise BadRecord(f"{where}: not JSON ({_why(error, text)})") from error
  except RecursionError as error:
    raise BadRecord(f"{where}: nested too deeply") from error
  if problems:
    raise BadRecord(f"{where}: {problems[0]}")
  return value


def _hooks(problems: list[str]) -> dict[str, Any]:
  """Arguments of JSON's decoder with which a decoder notes what it would take in silence, or fail of."""

  def unique(pairs):
    obj = dict(pairs)
    if len(obj) < len(pairs):
      problems.append("a key occurs twice")
    return obj

  def number(digits):
    try:
      return int(digits)
    except ValueError:  # Python's limit on the digits of an integer
      problems.append("not JSON (a number of too many digits)")
      return 0

  return {"object_pairs_hook": unique, "parse_int": number}


def _why(error: json.JSONDecodeError, text: str) -> str:
  if "\0" in text:
    return "it holds NUL bytes"
  if error.msg == "Extra data" and "\r" in text:
    return "its lines end in a carriage return alone, as an old Mac's; end them in a newline"
  return f"{error.msg}, column {error.colno}"


def opened(path: str) -> Any:
  """The file's content, decompressed, as a buffered reader."""
  with open(path, "rb") as file:
    head = file.read(16)
  for magic, hint in _OTHERS.items():
    if head.startswith(magic):
      raise UserError(f"cannot read {path}: {hint}")
  if head.startswith(_ZSTD):
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
  for magic, opener in _OPENERS.items():
    if head.startswith(magic) or (magic == _GZIP and path.endswith(".gz") and head):
      return opener(path, "rb")
  return open(path, "rb")


def _require_utf8(path: str, file: Any):
  """Refuses UTF-16 and UTF-32, of which every line would be bad."""
  head = file.peek(64)[:64]
  encoding = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
  # Without a mark: ASCII characters have a NUL at every second byte.
  if (
    encoding is None
    and len(head) >= 4
    and (not any(head[1:32:2]) or not any(head[0:32:2]))
    and any(head)
  ):
    encoding = "UTF-16"
  if encoding:
    raise UserError(
      f"cannot read {path}: it is {encoding} and must be UTF-8; convert it with"
      f" `iconv -f {encoding} -t UTF-8`"
    )


def _lines(path: str, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
  number = 0
  # Lines of bytes end at \n only. str.splitlines would also end them at U+2028, which JSON strings may contain.
  while line := file.readline(_LONGEST + 1):
    number += 1
    if len(line) > _LONGEST:
      raise UserError(
        f"cannot read {path}: line {number} is longer than {_LONGEST >> 20} MiB; a row must be a line"
      )
    yield number, line


def _is_whole(line: bytes) -> bool:
  """Whether the first line is not a row, but the start of a JSON value that holds rows or is one."""
  text = line.strip().removeprefix(codecs.BOM_UTF8).lstrip()
  if text[:1] not in (b"[", b"{"):
    return False
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    # An array that goes on; or an object of which the line holds the beginning, up to a key's end.
    rest = text[1:].lstrip()
    if text[:1] == b"[":
      return rest[:1] in (b"", b"{")
    return not rest or text.endswith((b",", b"{", b"["))
  return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _values(path: str, first: bytes, file: BinaryIO, line: int) -> Iterator[tuple[str, Any]]:
  """The rows of an array, or of objects one after the other, with the lines on which they begin."""
  text = _Text(path, first, file, line)
  problems: list[str] = []
  decoder = json.JSONDecoder(**_hooks(problems))
  in_array = text.next() == "["
  if in_array:
    text.skip(1)
  while char := text.next():
    if in_array and char in ",]":
      text.skip(1)
      if char == "," and text.next() not in ("", ",", "]"):
        continue
      if char == "]" and not text.next():
        return
      text.fail("more than one value" if char == "]" else "a comma without a value")
    where = f"{path}:{text.line}"
    value = text.parse(decoder)
    if problems:
      yield where, BadRecord(f"{where}: {problems[0]}")
      problems.clear()
    else:
      yield where, Parsed(value)
    if in_array and text.next() not in (",", "]"):
      text.fail("Expecting ',' delimiter")
  if in_array:
    text.fail("the array has no end")


class _Text:
  """The text of a file, of which only the part that is being parsed is in memory.

  Attributes:
    line: the line at which the next value begins, counted from 1.
  """

  def __init__(self, path: str, first: bytes, file: BinaryIO, line: int):
    self._path, self._file, self.line = path, file, line
    self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
    self._buffer, self._is_end = self._decoded(first), False
    self._at = 0

  def next(self) -> str:
    """The next character that is not blank, which is not consumed; "" at the end."""
    while True:
      while self._at < len(self._buffer):
        char = self._buffer[self._at]
        if char not in " \t\r\n":
          return char
        self.line += char == "\n"
        self._at += 1
      if not self._read(_CHUNK):
        return ""

  def skip(self, count: int):
    self._at += count

  def parse(self, decoder: json.JSONDecoder) -> Any:
    """The value that begins here, which is consumed. What `decoder` notes of a value's beginning is forgotten."""
    size = _CHUNK
    while True:
      try:
        value, end = decoder.raw_decode(self._buffer, self._at)
      except RecursionError:
        self.fail("nested too deeply")
      except json.JSONDecodeError as error:
        if not self._read(size):
          self.line += self._buffer.count("\n", self._at, error.pos)
          self.fail(error.msg)
      else:
        # A number may go on in the part that is not yet read.
        if end < len(self._buffer) or not self._read(size):
          self.line += self._buffer.count("\n", self._at, end)
          self._at = end
          return value
      size *= 2

  def fail(self, message: str):
    raise UserError(f"cannot read {self._path}: not JSON at line {self.line} ({message})")

  def _read(self, size: int) -> bool:
    """Reads on; False at the end of the file."""
    if self._is_end:
      return False
    self._buffer, self._at = self._buffer[self._at :], 0
    if len(self._buffer) > _LONGEST:
      self.fail(f"a value of more than {_LONGEST >> 20} million characters")
    data = self._file.read(size)
    self._is_end = not data
    self._buffer += self._decoded(data)
    return bool(data)

  def _decoded(self, data: bytes) -> str:
    try:
      return self._decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
      raise UserError(f"cannot read {self._path}: not UTF-8 after line {self.line}") from error
