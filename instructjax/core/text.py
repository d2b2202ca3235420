"""Text from models, data, files and names of files, as a terminal or a message may show it.

Called by every part that prints or raises. Imports nothing of the project.

Such a text may hold what a terminal obeys (sequences that recolour it, rename it or write to the clipboard) and marks
of right-to-left scripts, which reorder what is beside them.
"""

import json
import re
from typing import Any

_NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
# Control characters of C0 and C1, DEL, line and paragraph separators, and lone surrogates, which cannot be encoded.
_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
# What changes the direction of the text after it: embeddings, overrides and isolates.
_DIRECTION = "\u202a-\u202e\u2066-\u2069"
_MARKS = "\u061c\u200e\u200f"  # of direction; they are common in right-to-left text
_NOT_IN_A_LINE = re.compile(f"[{_CONTROL}{_DIRECTION}{_MARKS}]")
_NOT_IN_LINES = re.compile(f"(?![\n\t])[{_CONTROL}{_DIRECTION}]")
# Hebrew, Arabic and the scripts beside them, with their forms for presentation.
_RIGHT_TO_LEFT = re.compile(
  "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)


def printable(text: str) -> str:
  r"""The text as one line, with control characters and marks of direction as escapes: \n, \x1b, \u202e."""
  return _NOT_IN_A_LINE.sub(_escape, text)


def printable_lines(text: str) -> str:
  """Like `printable` for a text that stands on lines of its own: newlines and tabs stay, and so do mere marks."""
  return _NOT_IN_LINES.sub(_escape, text)


def isolated(text: str) -> str:
  """A `printable` text that does not reorder what is beside it, even if its script runs from right to left."""
  text = printable(text)
  return f"\u2068{text}\u2069" if _RIGHT_TO_LEFT.search(text) else text


def json_line(value: Any) -> str:
  """A value as JSON that may be printed: letters of all scripts stay, control characters are escaped."""
  text = json.dumps(value, ensure_ascii=False)
  # Outside of strings there are none, and inside them this is how JSON escapes.
  return _NOT_IN_A_LINE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match) -> str:
  code = ord(match[0])
  return _NAMED.get(match[0]) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
