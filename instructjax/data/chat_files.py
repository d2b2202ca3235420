"""The files of a chat template beside a vocabulary, in every form that transformers writes, and the run's clock.

Called by special_tokens, bpe and tokenizer. Imports core only.

Templates were first an entry of tokenizer_config.json: a text, or several with names, as a list of objects or as an
object. transformers 5 writes them as files: chat_template.jinja, and others by their names in a folder. Files win over
the entry, as in transformers.
"""

import datetime
import os
import pathlib
from typing import Any

from instructjax.core import foreign
from instructjax.core.errors import UserError

TEMPLATE = "chat_template.jinja"
_MORE = "additional_chat_templates"  # folder of NAME.jinja
_DEFAULT = "default"
_CLOCK = "chat_clock.txt"


def find(folder: pathlib.Path, config: pathlib.Path, entry: Any) -> tuple[pathlib.Path, str | None]:
  """The template that transformers would use for a chat without tools.

  Args:
    folder: the tokenizer's folder.
    config: the file that holds `entry`, for messages.
    entry: the value of `chat_template` there; None if there is none.
  Returns:
    The file that it was found in, or looked for last, and the template's source; None if there is no template.
  Raises:
    UserError: the entry has another form, a file cannot be read, or there are several templates and none is named
      "default".
  """
  files = {path.stem: path for path in sorted((folder / _MORE).glob("*.jinja")) if path.is_file()}
  if os.path.lexists(folder / TEMPLATE):
    files.setdefault(_DEFAULT, folder / TEMPLATE)
  if files:
    if _DEFAULT not in files:
      raise UserError(
        f"{folder} must have a {TEMPLATE}: it has the chat templates {_names(files)} and no default"
      )
    return files[_DEFAULT], foreign.read_text(files[_DEFAULT], foreign.JSON_BYTES)
  return config, text(config, entry)


def text(where: pathlib.Path, entry: Any) -> str | None:
  """The default template of an entry `chat_template`; None stays None.

  Raises:
    UserError: it is neither a text nor a list or object of several by their names, or none of them is the default.
  """
  if entry is None or isinstance(entry, str):
    return entry
  named = entry if isinstance(entry, dict) else None
  if isinstance(entry, list):
    named = {}
    for number, item in enumerate(entry, start=1):
      if not (isinstance(item, dict) and isinstance(item.get("name"), str)):
        raise UserError(f"{where}: chat_template: entry {number} must have a name and a template")
      named[item["name"]] = item.get("template")
  if named is None:
    raise UserError(f"{where}: chat_template must be text, got {type(entry).__name__}")
  for name, template in named.items():
    if not isinstance(template, str):
      kind = "none" if template is None else type(template).__name__
      raise UserError(f"{where}: chat_template {name[:40]!r} must be text, got {kind}")
  if _DEFAULT not in named:
    raise UserError(f"{where}: chat_template must have one named 'default', has {_names(named)}")
  return named[_DEFAULT]


def _names(named: dict) -> str:
  shown = ", ".join(repr(name[:40]) for name in list(named)[:5])
  return (shown or "none") + (", ..." if len(named) > 5 else "")


def read_clock(folder: pathlib.Path) -> str | None:
  """The date and time that a run has fixed for its chats; None if the folder is not a run's.

  Raises:
    UserError: the file holds something else.
  """
  path = folder / _CLOCK
  if not path.is_file():
    return None
  content = foreign.read_text(path, foreign.JSON_BYTES).strip()
  try:
    datetime.datetime.fromisoformat(content)
  except ValueError as error:
    raise UserError(
      f"{path} must hold the date and time of the run's chats, as 2026-03-01T12:00:00"
    ) from error
  return content


def write_clock(folder: pathlib.Path, clock: str):
  """Writes what `read_clock` reads."""
  partial = folder / (_CLOCK + ".partial")
  partial.write_text(clock + "\n", encoding="utf-8")
  os.replace(partial, folder / _CLOCK)
