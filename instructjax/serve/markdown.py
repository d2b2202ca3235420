"""Text of other people, as names of files, commands and settings, as a part of a Markdown file.

Called by card.py. Nothing of it is taken for Markdown, HTML, YAML or a shell's or Python's syntax.
"""

import json
import re
import shlex
from typing import Any

from instructjax.core.text import isolated, printable

# Signs that Markdown reads anywhere, and an underscore at the edge of a word.
_SIGNS = re.compile(r"[\\`*\[\]<>&~$#]|(?<![^\W_])_|_(?![^\W_])")

# Of the hub; not one is a number, a date or a keyword.
_NAME = re.compile(r"[A-Za-z][\w.-]*/[A-Za-z][\w.-]*")


class Formatted(str):
  """Text that is Markdown already."""


def plain(value: Any) -> Formatted:
  """The text of a value."""
  if isinstance(value, Formatted):
    return value
  return Formatted(_SIGNS.sub(lambda match: "\\" + match[0], isolated(str(value))))


def code(value: Any) -> Formatted:
  """The text of a value as code."""
  text = printable(str(value))
  # The fence is longer than any row of backticks inside.
  fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
  space = " " if text.startswith("`") or text.endswith("`") or not text else ""
  return Formatted(f"{fence}{space}{text}{space}{fence}")


def bold(value: Any) -> Formatted:
  """The text of a value in bold."""
  return Formatted(f"**{plain(value)}**")


def cell(value: Any) -> str:
  """A value as a cell of a table, where a bar would begin the next one, also inside code."""
  return plain(value).replace("|", r"\|")


def quoted(value: Any) -> str:
  """The text of a value in double quotes, as YAML and Python read it."""
  return json.dumps(printable(str(value)), ensure_ascii=False)


def scalar(value: Any) -> str:
  """The text of a value as YAML reads it, in quotes if it is more than a name."""
  text = str(value)
  return text if _NAME.fullmatch(text) else quoted(text)


def word(value: Any) -> str:
  """The text of a value as one word of a shell's command."""
  return shlex.quote(printable(str(value)))
