"""Reads small JSON files that come with a model, as input that may be damaged or hostile.

Called by special_tokens, vocabulary_file and gguf_vocabulary. Imports nothing of the project but the errors.
"""

import json
import pathlib
import re
from typing import Any

from instructjax.core.errors import UserError, one_line

# The largest tokenizer.json of a known model has 35 MB.
_MAX_BYTES = 128 * 2**20
# One past the largest id. Known vocabularies end at about 1,000,000; memory is taken for every id up to the largest.
MAX_IDS = 2**21
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_QUOTED = 80  # characters of a value in a message


def quote(value: Any) -> str:
  """A value in a message: its repr, which has no control characters, cut to a part of a line."""
  text = repr(value[:_QUOTED] if isinstance(value, str | list) else value)
  return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def explain(error: BaseException) -> str:
  """A library's message as a part of a line."""
  letters = (letter if letter.isprintable() else " " for letter in one_line(error))
  text = " ".join("".join(letters).split())
  return text if len(text) <= 2 * _QUOTED else f"{text[: 2 * _QUOTED]}..."


def read_bytes(path: pathlib.Path) -> bytes:
  """A file's content.

  Raises:
    UserError: it is larger than any tokenizer's file.
    OSError: it cannot be read.
  """
  size = path.stat().st_size
  if size > _MAX_BYTES:
    raise UserError(
      f"{path} has {size} bytes, more than the {_MAX_BYTES} that a tokenizer's file may have"
    )
  return path.read_bytes()


def read_text(path: pathlib.Path) -> str:
  """A text file's content.

  Raises:
    UserError: it is not UTF-8, or too large.
  """
  try:
    return read_bytes(path).decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 (byte {error.start + 1})") from error


def read(path: pathlib.Path) -> Any:
  """The value that a JSON file holds.

  Raises:
    UserError: it is not JSON, nested too deeply, has a key twice, or text that is no Unicode.
  """
  return parse(read_text(path), path)


def parse(text: str, path: pathlib.Path) -> Any:
  """The value of a JSON text, which was read from `path`; see `read`."""

  def once(pairs):
    entries = dict(pairs)
    if len(entries) < len(pairs):
      seen = set()
      twice = next(key for key, _ in pairs if key in seen or seen.add(key))
      raise UserError(f"{path} has the key {quote(twice)} twice in one object")
    return entries

  try:
    value = json.loads(text, object_pairs_hook=once)
    if _HALF_PAIR.search(text):  # a pair, which is fine, or half of one, which no text can hold
      json.dumps(value, ensure_ascii=False).encode()
    return value
  except RecursionError as error:
    raise UserError(f"{path} is nested too deeply") from error
  except UserError:
    raise
  except UnicodeEncodeError as error:
    raise UserError(
      f"{path} has text with half of a surrogate pair, which is no character"
    ) from error
  except ValueError as error:  # also a number of too many digits
    raise UserError(f"{path} is not JSON: {explain(error)}") from error


def mapping(value: Any, where: str) -> dict:
  """A JSON object.

  Raises:
    UserError: it is something else.
  """
  if not isinstance(value, dict):
    raise UserError(f"{where} must hold a JSON object, got {quote(value)}")
  return value


def flag(value: Any, where: str) -> bool:
  """A switch; null is False.

  Raises:
    UserError: it is neither true, false nor null.
  """
  if value is not None and not isinstance(value, bool):
    raise UserError(f"{where} must be true or false, got {quote(value)}")
  return bool(value)


def token_id(value: Any, where: str) -> int:
  """The id of a token.

  Raises:
    UserError: it is not a whole number in the range of ids.
  """
  if type(value) is not int or not 0 <= value < MAX_IDS:
    raise UserError(
      f"{where} must be a token's id, a whole number from 0 to {MAX_IDS - 1}, got {quote(value)}"
    )
  return value
