"""Reads small files that other programs wrote, as hostile input: JSON with limits, and typed access to its keys.

Called by models/interop and data/ for whatever lies in a model's folder (config.json, an index, a tokenizer's files).
Such a file may be cut off, hold any value in any place, be nested a thousand levels deep, or be no file at all. Every
function here answers with the value or with a UserError of one line that names the file and the key. Imports nothing
of the project but the errors.
"""

import json
import math
import os
import pathlib
import re
import reprlib
import stat
from collections.abc import Mapping
from typing import Any

from instructjax.core.errors import UserError, one_line

# The largest JSON file that is read, but for a vocabulary; the index of a model with 90,000 tensors has 9 MB.
JSON_BYTES = 1 << 24
# The same for a tokenizer's file; the largest tokenizer.json of a known model has 35 MB.
TOKENIZER_BYTES = 1 << 27
_DEPTH = 32  # levels of nesting; a config has four
LARGEST = 2**31 - 1  # of a size: whatever counts layers, columns or ids fits into an int32
# One past the largest id. Known vocabularies end at about 1,000,000; memory is taken for every id up to the largest.
MAX_IDS = 2**21
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_POINTER = b"version https://git-lfs.github.com/spec/"

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 2


def shown(value: Any, limit: int = 80) -> str:
  """A value for a message: its repr, in one line without control characters and of at most `limit` characters."""
  text = _REPR.repr(value)
  return text if len(text) <= limit else text[: limit - 3] + "..."


def named(name: str, limit: int = 100) -> str:
  """A name from a file for a message: as it is, or quoted and cut if it is long or holds control characters."""
  return name if name.isprintable() and 0 < len(name) <= limit else shown(name, limit)


def explained(error: BaseException, limit: int = 160) -> str:
  """A library's message as a part of a line: what it quotes of a file has no control characters, and it is cut."""
  letters = (letter if letter.isprintable() else " " for letter in one_line(error))
  text = " ".join("".join(letters).split())
  return text if len(text) <= limit else text[: limit - 3] + "..."


def mapping(value: Any, where: str) -> dict:
  """A JSON object.

  Raises:
    UserError: it is something else.
  """
  if not isinstance(value, dict):
    raise UserError(f"{where} must hold a JSON object, got {shown(value)}")
  return value


def flag(value: Any, where: str) -> bool:
  """A switch; null is False.

  Raises:
    UserError: it is neither true, false nor null.
  """
  if value is not None and not isinstance(value, bool):
    raise UserError(f"{where} must be true or false, got {shown(value)}")
  return bool(value)


def token_id(value: Any, where: str) -> int:
  """The id of a token.

  Raises:
    UserError: it is not a whole number in the range of ids.
  """
  if type(value) is not int or not 0 <= value < MAX_IDS:
    raise UserError(
      f"{where} must be a token's id, a whole number from 0 to {MAX_IDS - 1}, got {shown(value)}"
    )
  return value


def require_file(path: pathlib.Path):
  """Refuses what is no file with content of its own, before anything is read or waited for.

  Raises:
    UserError: the path is missing, is a folder or a pipe, cannot be read, or is a pointer that Git LFS leaves in the
      place of a large file.
  """
  try:
    is_file = stat.S_ISREG(os.stat(path).st_mode)
    start = b""
    if is_file:  # to open a pipe would wait for a writer
      with open(path, "rb") as file:
        start = file.read(len(_POINTER))
  # ValueError: a name that no file system takes, with a NUL for example.
  except (OSError, ValueError) as error:
    raise UserError(f"{_short(path)} cannot be read: {_why(error)}") from None
  if not is_file:
    raise UserError(f"{path} must be a file, and it is a folder, a pipe or a device")
  if start == _POINTER:
    raise UserError(
      f"{path} is a Git LFS pointer, a note in the place of the real file; run `git lfs pull` in its"
      " folder, or download the file itself"
    )


def read_bytes(path: pathlib.Path, limit: int) -> bytes:
  """A file's content.

  Args:
    path: the file.
    limit: bytes that it may have.
  Raises:
    UserError: see `require_file`; or the file is larger.
  """
  require_file(path)
  try:
    with open(path, "rb") as file:
      # Room for what is asked for is taken at once, so no more is asked for than is there.
      raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {_why(error)}") from None
  if len(raw) > limit:
    raise UserError(f"{path} has more than {limit / 1e6:.0f} MB, too much for such a file")
  return raw


def read_text(path: pathlib.Path, limit: int) -> str:
  """A text file's content without a byte order mark; see `read_bytes`.

  Raises:
    UserError: also where it is not UTF-8.
  """
  try:
    return read_bytes(path, limit).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from None


def read_json(path: pathlib.Path, limit: int = JSON_BYTES) -> dict[str, Any]:
  """The JSON object in a file.

  Args:
    path: the file.
    limit: bytes that it may have. Parsing 16 MB takes up to four seconds and 600 MB, whatever they hold.
  Raises:
    UserError: see `read_bytes`; or the file is not UTF-8 or not JSON, is nested too deeply, holds something other than
      an object or half of a surrogate pair, or gives one key two values.
  """
  if not os.path.lexists(path):
    raise UserError(f"{path.parent} has no {named(path.name)}")
  return parse_json(read_bytes(path, limit), str(path))


def parse_json(raw: bytes | str, where: str) -> dict[str, Any]:
  """The JSON object in a text or in its UTF-8; `where` is what it is called in errors. Raises as `read_json` does."""
  try:
    # utf-8-sig drops the byte order mark that some editors write at the start of a file.
    text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
    result = json.loads(text, object_pairs_hook=lambda x: _unique(x, where))
  except UnicodeDecodeError as error:
    raise UserError(f"{where} must be JSON: it is not UTF-8 (byte {error.start + 1})") from None
  except json.JSONDecodeError as error:
    raise UserError(
      f"{where} must be JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    ) from None
  except RecursionError:
    raise UserError(f"{where} must be JSON: it is nested too deeply") from None
  except ValueError as error:
    if isinstance(error, UserError):
      raise
    # Python's own limit on the digits of an integer.
    raise UserError(f"{where} must be JSON: it holds a number of thousands of digits") from None
  _require_shallow(result, where)
  if not isinstance(result, dict):
    raise UserError(f"{where} must be a JSON object, and it is {shown(result, 40)}")
  if _HALF_PAIR.search(text):  # of a whole pair, which is fine, or alone, which no text can hold
    try:
      json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      raise UserError(
        f"{where} must be JSON: it has half of a surrogate pair, which is no character"
      ) from None
  return result


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) < len(pairs):
    for name, value in pairs:
      if result[name] != value:
        raise UserError(f"{where}: the key {shown(name)} is there twice, with two values")
  return result


def _require_shallow(value: Any, where: str):
  # Level by level, not by a function that calls itself: that would fail in the way that is tested for.
  level = [value]
  for _ in range(_DEPTH + 1):
    nodes = [node for node in level if isinstance(node, dict | list)]
    if not nodes:
      return
    level = [
      child for node in nodes for child in (node.values() if isinstance(node, dict) else node)
    ]
  raise UserError(f"{where} must be JSON: it is nested more than {_DEPTH} levels deep")


def _why(error: Exception) -> str:
  return getattr(error, "strerror", None) or shown(str(error))


def _short(path: pathlib.Path) -> str:
  return named(str(path), 200)


class Keys:
  """Reads the keys of a JSON object. A wrong value raises a UserError that names the file and the key.

  A key that is absent or null takes the default. The default None means that the key is required.
  """

  def __init__(self, raw: Any, where: str):
    if not isinstance(raw, Mapping):
      raise UserError(f"{where}: {shown(raw)} must be a JSON object")
    self.raw, self.where = raw, where

  def value(self, name: str, default: Any = None) -> Any:
    found = self.raw.get(name)
    return default if found is None else found

  def has(self, name: str) -> bool:
    """Whether the key is there with a value other than null."""
    return self.raw.get(name) is not None

  def size(self, name: str, default: int | None) -> int:
    found = self._needed(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
      raise self.wrong(name, "must be a positive whole number")
    if found > LARGEST:
      raise self.wrong(name, f"must be at most {LARGEST}")
    return found

  def number(self, name: str, default: float | None) -> float:
    found = self._needed(name, default)
    if not isinstance(found, int | float) or isinstance(found, bool):
      raise self.wrong(name, "must be a number")
    try:
      result = float(found)
    except OverflowError:
      result = math.inf
    if not math.isfinite(result):
      raise self.wrong(name, "must be a finite number")
    return result

  def flag(self, name: str, default: bool) -> bool:
    found = self.value(name, default)
    if not isinstance(found, bool):
      raise self.wrong(name, "must be true or false")
    return found

  def text(self, name: str, default: str | None) -> str:
    found = self._needed(name, default)
    if not isinstance(found, str):
      raise self.wrong(name, "must be a text")
    return found

  def texts(self, name: str) -> list[str]:
    """A list of texts; empty if the key is absent or null."""
    found = self.value(name, [])
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
      raise self.wrong(name, "must be a list of texts")
    return found

  def block(self, name: str) -> "Keys | None":
    """The keys of an inner object; None if the key is absent or null."""
    if not self.has(name):
      return None
    return Keys(self.raw[name], f"{self.where}: {name}")

  def one_of(self, name: str, known: tuple[str, ...], default: str | None = None) -> str:
    found = self._needed(name, default)
    if not isinstance(found, str) or found not in known:
      raise self.wrong(name, f"is not supported; known: {', '.join(known)}")
    return found

  def refuse(self, name: str, *allowed: Any):
    """Raises UserError unless a switch is absent or null, or has one of the values that are supported."""
    if self.has(name) and not any(self.raw[name] == value for value in allowed):
      only = f", only {' or '.join(map(repr, allowed))}" if allowed else ""
      raise self.wrong(name, f"is not supported{only}")

  def wrong(self, name: str, rule: str) -> UserError:
    """The error of a key whose value breaks a rule."""
    return UserError(f"{self.where}: {named(name)}={shown(self.value(name))} {rule}")

  def _needed(self, name: str, default: Any) -> Any:
    found = self.value(name, default)
    if found is None:
      raise UserError(f"{self.where} lacks {name!r}")
    return found
