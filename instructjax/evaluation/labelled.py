"""Labelled texts, and what a reward model is trained on to tell them apart. Called by trained_scorer.py.

A reward model learns from rankings, and its loss is that of pairs: how often a text with a higher label has the higher
score is just what the area under the ROC curve measures. So every ranking holds some texts drawn at random.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from instructjax.core.errors import UserError
from instructjax.core.foreign import shown
from instructjax.evaluation import rows

Part = Literal["train", "calibration", "test"]

RANKED = 6  # texts of a ranking
# A run holds out rankings by their prompts, so there must be several. A text is scored after the first.
PROMPTS = tuple(f"Text {number}: " for number in range(40))
_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A text with a number.

  Attributes:
    text: what is scored.
    value: its label; more is more of what the scorer looks for.
    group: texts of one group are all trained on or all held out.
  """

  text: str
  value: float
  group: str

  @property
  def part(self) -> Part:
    """Seven tenths are trained on, one is for calibration, and two are held out. By the group alone."""
    share = int(hashlib.sha256(self.group.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.7 else "calibration" if share < 0.8 else "test"


def read(spec: str, fields: Sequence[tuple[str, str]], group: str) -> list[Labelled]:
  """Reads labelled texts; rows with a null or empty label are left out.

  Args:
    spec: a file, or SCHEME:REST as --data of `evaluate`.
    fields: (key of the text, key of its label) of each text of a row; `a.b` is key b of the mapping under a.
    group: a pattern, whose first match in the text names its group; '' makes of every text a group.
  Raises:
    UserError: a row has no such key, or a label is no number, truth value, 'yes' or 'no'.
  """
  try:
    pattern = re.compile(group)
  except re.error as error:
    raise UserError(f"--group={shown(group)} is no regular expression: {error}") from error
  found = []
  for row in rows.read(spec):
    for text_key, label_key in fields:
      text, label = _value(row, text_key), _value(row, label_key)
      if label is None or label == "":
        continue
      if not isinstance(text, str) or not text.strip():
        raise UserError(f"{row.where}: {text_key} must be text, got {shown(text)}")
      match = pattern.search(text) if group else None
      own = _number(label, f"{row.where}: {label_key}")
      found.append(Labelled(text.strip(), own, match[0] if match else text))
  return found


def _value(row: rows.Row, key: str) -> Any:
  value: Any = row.value
  for name in key.split("."):
    if not isinstance(value, dict) or name not in value:
      raise UserError(f"{row.where}: there is no {shown(key)}")
    value = value[name]
  return value


def _number(label: Any, where: str) -> float:
  if isinstance(label, str) and label.strip().lower() in _WORDS:
    return _WORDS[label.strip().lower()]
  try:
    found = float(label)  # of a table, a number is text
    if math.isfinite(found):
      return found
  except (TypeError, ValueError, OverflowError):
    pass
  raise UserError(f"{where} must be a number, true, false, 'yes' or 'no', got {shown(label)}")


def rankings(texts: Sequence[Labelled], passes: int, seed: int) -> Iterator[dict[str, Any]]:
  """Rankings of texts drawn at random, in which every text comes about `passes` times."""
  rng = random.Random(seed)
  for _ in range(passes):
    order = rng.sample(list(texts), len(texts))
    for start in range(0, len(order), RANKED):
      some = {one.text: one.value for one in order[start : start + RANKED]}
      if len({*some.values()}) > 1:
        prompt = PROMPTS[rng.randrange(len(PROMPTS))]
        yield {"prompt": prompt, "responses": [*some], "scores": [*some.values()]}


def write(texts: Sequence[Labelled], folder: pathlib.Path, passes: int, seed: int):
  """Writes what a run reads: comparisons, documents and demonstrations, whose mean is a score of 0."""
  folder.mkdir(parents=True, exist_ok=True)
  kinds = {
    "comparisons": rankings(texts, passes, seed),
    "documents": ({"text": PROMPTS[0] + one.text} for one in texts),
    "demonstrations": (
      {"prompt": PROMPTS[number % len(PROMPTS)], "response": one.text}
      for number, one in enumerate(texts[:400])
    ),
  }
  for kind, found in kinds.items():
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
    (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")
