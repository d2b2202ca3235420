"""Checks text and chat messages from outside.

Called by `records`, `dialogues` and `formats`. Imports nothing of the project but the errors. All functions raise
BadRecord, whose message never quotes the text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from instructjax.core.errors import UserError

ROLES = ("system", "developer", "user", "assistant")
# Other programs' names of these roles: ShareGPT's two, and Gemini's.
_ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_TOOLS = ("tool", "function", "ipython", "observation", "function_call")
_FLAGS = ("weight", "train", "loss")  # OpenAI's, axolotl's and ms-swift's: 0 is not trained on
_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")


class BadRecord(UserError):
  """An unusable record. The message is `file:line: reason`, and never quotes the text, which may be abusive."""


class Message(NamedTuple):
  """One message of a chat.

  Attributes:
    role: one of ROLES.
    content: the text.
    trains: whether the message is marked for training (True) or against it (False); None if it has no mark.
  """

  role: str
  content: str
  trains: bool | None


def parse(value: Any, name: str, where: str) -> list[Message]:
  """The messages of a list, in OpenAI's form (role, content) or in ShareGPT's (from, value)."""
  if not isinstance(value, list) or not value:
    found = "an empty one" if value == [] else kind_of(value)
    raise BadRecord(f"{where}: {name!r} must be a list of messages, got {found}")
  return [_message(message, f"{name}[{i}]", where) for i, message in enumerate(value)]


def parse_answer(value: Any, name: str, where: str, may_be_empty: bool = False) -> str:
  """The text of an answer: a string, or a list of one message by the assistant."""
  if isinstance(value, list):
    found = parse(value, name, where)
    if len(found) > 1 or found[0].role != "assistant":
      raise BadRecord(f"{where}: {name!r} must be a string or one message of the assistant")
    value = found[0].content
  return checked_text(value, name, where, may_be_empty)


def checked_text(value: Any, name: str, where: str, may_be_empty: bool = False) -> str:
  """The value itself, if it is text that can be tokenized."""
  if not isinstance(value, str):
    raise BadRecord(f"{where}: {name!r} must be a string, got {kind_of(value)}")
  if not may_be_empty and not value.strip():
    raise BadRecord(f"{where}: {name!r} is empty")
  if "\0" in value:  # sentencepiece and most terminals end a text there
    raise BadRecord(f"{where}: {name!r} holds a NUL character")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON escapes can spell one half of a surrogate pair
    raise BadRecord(
      f"{where}: {name!r} is not valid Unicode (character {error.start + 1})"
    ) from error
  return value


def from_json_text(value: Any, name: str, where: str) -> Any:
  """A chat that is stored as JSON text, as a list. Any other value is returned unchanged."""
  if not isinstance(value, str) or not value.lstrip().startswith("["):
    return value
  if _PYTHON_LIST.match(value):
    raise BadRecord(
      f"{where}: {name!r} holds messages as Python prints them; store a list, or JSON text"
    )
  try:
    found = json.loads(value)
  except (ValueError, RecursionError):
    return value  # a text that begins with a bracket
  if not isinstance(found, list) or not found:
    return value
  is_message = lambda item: (
    isinstance(item, dict)
    and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
  )
  return found if all(map(is_message, found)) else value


def last_answer(found: Sequence[Message], name: str, where: str) -> list[Message]:
  """The messages up to and including the answer to train on.

  That is the last message, or, if it is marked as not to be trained on, the last one of the assistant that is not.
  """
  for number, message in enumerate(found):
    if message.trains and message.role != "assistant":
      raise BadRecord(
        f"{where}: '{name}[{number}]' is marked for training, and only answers of the assistant are"
        " trained on"
      )
  kept = list(found)
  if kept[-1].trains is not False:
    return kept
  is_answer = lambda message: message.role == "assistant" and message.trains is not False
  while kept and not is_answer(kept[-1]):
    kept.pop()
  if not kept:
    raise BadRecord(f"{where}: {name!r} marks no answer of the assistant for training")
  return kept


def kind_of(value: Any) -> str:
  """What a JSON value is, in a word or two."""
  if value is None:
    return "null"
  if isinstance(value, float) and value != value:
    return "NaN"
  return type(value).__name__


def listed(names: Any, limit: int = 12) -> str:
  """Names from a file in one line: quoted, and cut where there are many or long ones."""
  names = [str(name) for name in names]
  shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:limit]]
  return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def quoted(text: str, most: int = 300) -> str:
  """What somebody has typed or written in one line: quoted, and cut where it is long."""
  return repr(text if len(text) <= most else f"{text[:most]}...")


def _message(message: Any, name: str, where: str) -> Message:
  """One message. The content may be empty, because system messages sometimes are."""
  if isinstance(message, dict) and {"role", "content"} <= message.keys():
    role, content = message["role"], message["content"]
  elif isinstance(message, dict) and {"from", "value"} <= message.keys():
    role, content = message["from"], message["value"]
  else:
    found = kind_of(message)
    if isinstance(message, dict):
      found = "only " + (listed(message) or "{}")
    raise BadRecord(f"{where}: {name!r} must be an object with role and content, got {found}")
  if isinstance(role, str):
    role = _ALIASES.get(role, role)
  if role not in ROLES:
    tool = ", not a tool's, which cannot be trained on" if role in _TOOLS else ""
    raise BadRecord(f"{where}: role of {name!r} must be one of {', '.join(ROLES)}{tool}")
  if message.get("tool_calls") or message.get("function_call"):
    raise BadRecord(f"{where}: {name!r} calls a tool, which cannot be trained on")
  if isinstance(content, list):  # OpenAI's content parts
    parts = [part if isinstance(part, dict) else {} for part in content]
    if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
      raise BadRecord(f"{where}: content of {name!r} has a part that is not text")
    content = "".join(part["text"] for part in parts)
  text = checked_text(content, f"{name}.content", where, may_be_empty=True)
  return Message(role, text, _trains(message, name, where))


def _trains(message: dict[str, Any], name: str, where: str) -> bool | None:
  if message.get("mask") is not None:  # 1 is trained on in some programs, and left out in others
    raise BadRecord(f"{where}: {name!r} has a 'mask', whose sense is not clear; use weight, 0 or 1")
  found = [message[key] for key in _FLAGS if message.get(key) is not None]
  if not all(isinstance(flag, int | float) and flag in (0, 1) for flag in found):
    raise BadRecord(f"{where}: {', '.join(_FLAGS)} of {name!r} must be 0 or 1")
  if len({bool(flag) for flag in found}) > 1:
    raise BadRecord(f"{where}: {', '.join(_FLAGS)} of {name!r} contradict each other")
  return bool(found[0]) if found else None
