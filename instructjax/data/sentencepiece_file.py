"""Reads a sentencepiece `.model` file: checks it before the package sees it, and changes the types of pieces.

Called by tokenizer. Imports special_tokens.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import sentencepiece

from instructjax.core.errors import UserError
from instructjax.core.foreign import explained, shown
from instructjax.data.special_tokens import Added

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(2, 6)

# From a text to the places of tokens in it, as (start, end, id).
TokenPattern = Callable[[str], Iterator[tuple[int, int, int]]]


def _proto(where: str, model: bytes) -> Any:
  from sentencepiece import sentencepiece_model_pb2

  pb2: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported
  try:
    return pb2.ModelProto.FromString(model)
  except Exception as error:  # protobuf's own DecodeError, and a package without types
    raise UserError(f"{where} is not a sentencepiece model file") from error


def kinds(where: str, model: bytes) -> list[int]:
  """The types of all pieces.

  Args:
    where: the setting that names the file, for messages.
    model: the file's content.
  Raises:
    UserError: the content is not a sentencepiece model, two pieces have one text, or there is not one unknown piece.
  """
  pieces = _proto(where, model).pieces
  seen: dict[str, int] = {}
  for i, piece in enumerate(pieces):
    if not isinstance(piece.piece, str):  # protobuf gives bytes that are no UTF-8 as they are
      raise UserError(f"{where}: the text {shown(piece.piece)} of piece {i} is not UTF-8")
    if not piece.piece or piece.piece in seen:
      other = f"that of piece {seen[piece.piece]}" if piece.piece else "empty"
      raise UserError(f"{where}: the text {shown(piece.piece)} of piece {i} is {other}")
    seen[piece.piece] = i
  found = [piece.type for piece in pieces]
  if found.count(UNKNOWN) != 1:
    raise UserError(
      f"{where} is not a sentencepiece model file: it has {found.count(UNKNOWN)} unknown pieces,"
      " and must have one"
    )
  return found


def processor(where: str, model: bytes) -> sentencepiece.SentencePieceProcessor:
  """The package's object for a model.

  Raises:
    UserError: the package refuses it.
  """
  made = sentencepiece.SentencePieceProcessor()
  try:
    made.load_from_serialized_proto(model)
    made.encode("a")
  except (RuntimeError, ValueError) as error:
    raise UserError(f"{where} is not a sentencepiece model file: {explained(error)}") from error
  return made


def without(where: str, model: bytes, ids: Collection[int]) -> sentencepiece.SentencePieceProcessor:
  """A processor that never encodes a text to one of these pieces."""
  proto = _proto(where, model)
  for i in ids:
    proto.pieces[i].type = UNUSED
  return processor(where, proto.SerializeToString())


def token_pattern(ids: Mapping[str, int], added: Mapping[int, Added]) -> TokenPattern | None:
  """Finds tokens in a text, the longest first; None if there are none to find.

  Args:
    ids: the tokens' ids by their texts.
    added: the flags of those that have some: whether blanks beside them belong to them, and whether they are words.
  """
  if not ids:
    return None

  def one(text: str) -> str:
    token = added.get(ids[text], Added(text))
    word = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{left}{word[0]}({re.escape(text)}){word[1]}{right}"

  # Longest first: a special token may begin with the text of another.
  texts = sorted(ids, key=len, reverse=True)
  pattern = re.compile("|".join(map(one, texts)))

  def find(text: str) -> Iterator[tuple[int, int, int]]:
    for match in pattern.finditer(text):
      yield match.start(), match.end(), ids[match[match.lastindex or 0]]

  return find
