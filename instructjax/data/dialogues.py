"""Dialogues as Anthropic published them: text with "\\n\\nHuman:" and "\\n\\nAssistant:" before the turns.

Called by `formats`. Imports `messages`. All functions raise BadRecord.
"""

import re
from typing import Any

from instructjax.data.messages import BadRecord

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HUMAN_LINE = re.compile(r"\n\s*Human:")


def is_dialogue(value: Any) -> bool:
  """Whether a value is a text with a turn of the assistant."""
  return isinstance(value, str) and _ASSISTANT in _line_ends(value)


def convert(obj: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
  """A row with chosen and rejected, and perhaps a prompt, as the keys that `records.parse_record` expects.

  A row serves as a comparison, as a demonstration (the chosen answer), or as a prompt. Without a prompt, chosen and
  rejected are whole dialogues, which are split after the last "\\n\\nAssistant:". They may be whole beside a prompt
  too.

  Raises:
    BadRecord: the row has other keys; the two dialogues differ before their last answers; or an answer goes on to a
      turn of the human, which a policy must never learn to speak.
  """
  if not {"chosen", "rejected"} <= {key for key, value in obj.items() if value is not None}:
    raise BadRecord(f"{where}: needs chosen and rejected")
  pair = {key: _text(obj[key], key, where) for key in ("chosen", "rejected")}
  if obj.get("prompt") is not None:
    prompt = _text(obj["prompt"], "prompt", where)
    if prompt.strip():  # `records` refuses an empty one
      _check_prompt(prompt, "prompt", where)
      repeats = [text.startswith(prompt) for text in pair.values()]
      if all(repeats):
        pair = {key: text[len(prompt) :] for key, text in pair.items()}
      elif any(repeats):
        raise BadRecord(f"{where}: only one of chosen and rejected repeats the prompt")
  else:
    (prompt, chosen), (other, rejected) = (_split(text, key, where) for key, text in pair.items())
    if prompt != other:
      raise BadRecord(f"{where}: chosen and rejected differ before their last answer")
    pair = {"chosen": chosen, "rejected": rejected}
  if kind == "prompts":
    return {"prompt": prompt}
  for key in ("chosen",) if kind == "demonstrations" else ("chosen", "rejected"):
    _check_answer(pair[key], key, where, strict=kind == "demonstrations")
  if kind == "demonstrations":
    return {"prompt": prompt, "response": pair["chosen"]}
  return {"prompt": prompt, **pair, "labeler": obj.get("labeler")}


def _text(value: Any, key: str, where: str) -> str:
  if not isinstance(value, str):
    raise BadRecord(f"{where}: {key!r} must be a dialogue with an 'Assistant:' turn")
  return _line_ends(value)


def _line_ends(text: str) -> str:
  """Windows' and old Macs' ends of lines as newlines, without which no turn would be found."""
  return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _split(dialogue: str, key: str, where: str) -> tuple[str, str]:
  """(prompt up to the last "Assistant:", answer)."""
  if _ASSISTANT not in dialogue:
    raise BadRecord(f"{where}: {key!r} must be a dialogue with an 'Assistant:' turn")
  head, _, answer = dialogue.rpartition(_ASSISTANT)
  if _HUMAN in answer:
    raise BadRecord(f"{where}: {key!r} must end in the assistant's answer, not in a turn of Human")
  prompt = head + _ASSISTANT
  _check_prompt(prompt, key, where)
  return prompt, answer


def _check_prompt(prompt: str, key: str, where: str):
  """Checks that a prompt ends in what the human says and "Assistant:"."""
  if not prompt.endswith(_ASSISTANT):
    raise BadRecord(f"{where}: {key!r} must end in two newlines and 'Assistant:'")
  # The first turn may stand at the start of the text without the newlines.
  before = "\n\n" + prompt.removesuffix(_ASSISTANT).lstrip()
  start = before.rfind(_HUMAN)
  if start < 0 or before.find(_ASSISTANT, start) >= 0:
    raise BadRecord(f"{where}: {key!r} must have a turn of Human right before the answer")
  if not before[start + len(_HUMAN) :].strip():
    raise BadRecord(f"{where}: {key!r} has an empty turn of Human before the answer")


def _check_answer(answer: str, key: str, where: str, strict: bool):
  """Checks that an answer holds no turn of the human; if strict, none with other blanks before it either."""
  if _HUMAN in answer or (strict and _HUMAN_LINE.search(answer)):
    raise BadRecord(f"{where}: {key!r} must end in the assistant's answer, not in a turn of Human")
