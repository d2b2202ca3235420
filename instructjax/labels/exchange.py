"""What people have made, as files that training and other tools read, and files of theirs as a project's contents.

Called by the command.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from instructjax.core.errors import UserError, writing
from instructjax.data import label_records

KINDS = ("comparisons", "demonstrations", "prompts")


def export(place: str, kind: str, folder: str) -> dict[str, int]:
  """Writes a project's records as the files that the stage `collect` would write: train, validation and heldout.

  heldout.jsonl has what labelers of the cohort heldout have made of the held-out prompts; what they have made of
  training prompts is left out. A file that would be empty is not written.

  Args:
    place: the project's folder or URL.
    kind: one of KINDS.
    folder: where to; made if missing.
  Returns:
    Number of records by the file's name.
  Raises:
    UserError: there are no records, or a file cannot be written.
  """
  if kind not in KINDS:
    raise UserError(f"--kind must be one of {', '.join(KINDS)}")
  parts: dict[str, list[dict[str, Any]]] = {}
  for _, row, split, cohort in label_records.cohort_rows(place, kind):
    if cohort != "heldout":
      parts.setdefault(split, []).append(row)
    elif split == "validation":
      parts.setdefault("heldout", []).append(row)
  if not parts:
    raise UserError(f"{place} holds no {kind} yet")
  for name, rows in parts.items():
    write_lines(pathlib.Path(folder) / f"{name}.jsonl", rows)
  return {f"{name}.jsonl": len(rows) for name, rows in sorted(parts.items())}


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
