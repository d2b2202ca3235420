"""What people have made, as files that training and other tools read, and files of theirs as a project's contents.

Called by the command.
"""

import itertools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from instructjax.core.errors import UserError, writing
from instructjax.data import label_records
from instructjax.data.messages import quoted

KINDS = ("comparisons", "demonstrations", "prompts")
PARTS = ("heldout", "train", "validation")


def export(place: str, kind: str, folder: str, form: str = "own") -> tuple[dict[str, int], int]:
  """Writes a project's records as the files that the stage `collect` would write: train, validation and heldout.

  What is in which is said by `label_records.parts`. A file that would be empty is not there, not even from before.

  Args:
    place: the project's folder or URL.
    kind: one of KINDS.
    folder: where to; made if missing.
    form: of comparisons, see `rows_in`.
  Returns:
    Number of rows by the file's name, and of rankings that the format cannot hold.
  Raises:
    UserError: there are no records, or a file cannot be written.
  """
  if kind not in KINDS:
    raise UserError(f"--kind must be one of {', '.join(KINDS)}")
  parts: dict[str, list[dict[str, Any]]] = {}
  for _, row, part in label_records.parts(place, kind):
    parts.setdefault(part, []).append(row)
  if not parts:
    raise UserError(f"{place} holds no {kind} yet")
  if form != "own" and kind != "comparisons":
    raise UserError(f"--format={quoted(form, 40)} is for --kind=comparisons")
  counts, left_out = {}, 0
  for name in PARTS:
    made, lost = rows_in(form, parts.get(name, ()))
    left_out += lost
    path = pathlib.Path(folder) / f"{name}.jsonl"
    if made:
      write_lines(path, made)
      counts[path.name] = len(made)
    else:
      with writing(path):
        path.unlink(missing_ok=True)
  return counts, left_out


def rows_in(form: str, rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
  """(rows of another tool's format, number of rankings that it cannot hold) of comparisons.

  Args:
    form: own; hh (Anthropic's pairs); label_studio (tasks with Ranker, which knows no ties) or argilla.
    rows: with prompt, responses, ranks and labeler.
  Raises:
    UserError: there is no such format.
  """
  if form not in _FORMS:
    raise UserError(f"--format={quoted(form, 40)} must be one of {', '.join(_FORMS)}")
  found, left_out = [], 0
  for number, row in enumerate(rows, start=1):
    made = _FORMS[form](number, row)
    found += made
    left_out += not made
  return found, left_out


def _as_text(prompt: Any) -> str:
  """A prompt for a tool that shows text only."""
  if isinstance(prompt, str):
    return prompt
  return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _hh(number: int, row: dict[str, Any]) -> list[dict[str, Any]]:
  """A pair for each two answers that are no tie."""
  prompt = row["prompt"]
  messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
  speakers = {"user": "Human", "assistant": "Assistant"}
  if not all(message["role"] in speakers for message in messages):
    return []
  before = "".join(f"\n\n{speakers[message['role']]}: {message['content']}" for message in messages)
  ranked = sorted(zip(row["ranks"], row["responses"], strict=True), key=lambda pair: pair[0])
  return [
    {
      "chosen": f"{before}\n\nAssistant: {better}",
      "rejected": f"{before}\n\nAssistant: {worse}",
      "labeler": row["labeler"],
    }
    for (rank, better), (other, worse) in itertools.combinations(ranked, 2)
    if rank < other
  ]


def _label_studio(number: int, row: dict[str, Any]) -> list[dict[str, Any]]:
  if len(set(row["ranks"])) < len(row["ranks"]):
    return []
  order = sorted(range(len(row["ranks"])), key=lambda i: row["ranks"][i])
  items = [{"id": str(i), "body": text} for i, text in enumerate(row["responses"])]
  result = {
    "type": "ranker",
    "from_name": "rank",
    "to_name": "items",
    "value": {"ranker": {"rank": [str(i) for i in order]}},
  }
  annotation = {"completed_by": {"email": row["labeler"]}, "result": [result]}
  data = {"prompt": _as_text(row["prompt"]), "items": items}
  return [{"id": number, "data": data, "annotations": [annotation]}]


def _argilla(number: int, row: dict[str, Any]) -> list[dict[str, Any]]:
  names = [f"response_{i}" for i in range(1, len(row["responses"]) + 1)]
  value = [{"value": name, "rank": rank} for name, rank in zip(names, row["ranks"], strict=True)]
  fields = {"prompt": _as_text(row["prompt"])} | dict(zip(names, row["responses"], strict=True))
  response = {"user_id": row["labeler"], "value": value, "status": "submitted"}
  return [{"id": str(number), "fields": fields, "responses": {"ranking": [response]}}]


_FORMS: dict[str, Callable[[int, dict[str, Any]], list[dict[str, Any]]]] = {
  "own": lambda number, row: [row],
  "hh": _hh,
  "label_studio": _label_studio,
  "argilla": _argilla,
}


def write_lines(path: pathlib.Path, rows: Iterable[Any]):
  """Writes JSON lines.

  Raises:
    UserError: the file cannot be written.
  """
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
      for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
