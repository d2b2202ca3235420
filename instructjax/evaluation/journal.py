"""The files of one part of an evaluation: a model's answers to one prompt of one task.

Called by runner.py. While a part runs, each result is a line of its journal, written as soon as it is known, so that a
process that is killed loses only what it was computing. When the part is whole, its samples are written in the order of
the items and renamed into place, and the journal goes: an interrupted evaluation ends with the same files as another.

Beside both lies what the part was made with. A part of another model, other data or other prompts is never gone on
with.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from instructjax.core.errors import UserError, writing
from instructjax.core.foreign import named
from instructjax.evaluation.task import Answer, Ask, Choice, Choices

_DIGITS = 6  # of a log-probability; rounding of the network is a hundred times as large


@dataclasses.dataclass(frozen=True)
class Part:
  """The files of a part.

  Attributes:
    samples: the finished samples, a JSON line each.
    journal: results so far.
    made_with: what it was made with.
  """

  samples: pathlib.Path
  journal: pathlib.Path
  made_with: pathlib.Path


def part(out: pathlib.Path, model: str, task: str, prompt: str) -> Part:
  """The files of a model's answers to a prompt of a task."""
  stem = out / "samples" / model / f"{task}.{prompt}"
  return Part(*(stem.with_name(stem.name + end) for end in (".jsonl", ".journal", ".json")))


def require_same(files: Part, made_with: Mapping[str, str], *, redo: bool, title: str):
  """Begins a part, or makes sure that what lies there was made with the same.

  Args:
    files: of the part.
    made_with: what the part depends on: name -> checksum or value.
    redo: whether to delete what was made with something else, instead of refusing it.
    title: of the part, for messages.
  Raises:
    UserError: something else made it, or its file is damaged.
  """
  if files.made_with.exists():
    try:
      found = json.loads(files.made_with.read_text(encoding="utf-8"))
    except ValueError:
      found = None
    if not isinstance(found, dict):
      found = {}
    changed = [name for name in made_with if found.get(name) != made_with[name]]
    if not changed:
      return
    if not redo:
      raise UserError(
        f"{title}: {files.made_with.parent} holds results that were made with another {' and another '.join(changed)};"
        " give another --out, or --redo to replace them"
      )
    for path in (files.samples, files.journal, files.made_with):
      path.unlink(missing_ok=True)
  write_json(files.made_with, made_with)


def write_json(path: pathlib.Path, value: Mapping[str, Any]):
  """Writes an object, so that the file is either whole or as it was."""
  _write(path, json.dumps(dict(value), indent=1) + "\n")


def _write(path: pathlib.Path, text: str):
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


class Journal:
  """The results of a part so far: those of an interrupted run at first, and then each one that is added.

  Attributes:
    choices: (item, choice) -> result.
    texts: item -> its answer in words.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.choices: dict[tuple[int, int], Choice] = {}
    self.texts: dict[int, str] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    whole = b"".join(line + b"\n" for line in lines[:-1] if self._take(line))
    with writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      if b"\n".join(lines) != whole:  # a line that a killed process has begun
        path.write_bytes(whole)
      self._file = open(path, "ab")

  def _take(self, line: bytes) -> bool:
    try:
      item, choice, result = json.loads(line)
      self._keep(item, choice, result if isinstance(result, str) else choice_of(result))
    except (ValueError, TypeError, KeyError):
      return False
    return True

  def _keep(self, item: int, choice: int, result: Choice | str):
    if isinstance(result, str):
      self.texts[item] = result
    else:
      self.choices[item, choice] = result

  def add(self, item: int, choice: int, result: Choice | str):
    """Keeps a result; `choice` is 0 for an answer in words."""
    # As it will be read again, so that a run that goes on has the numbers of one that was not stopped.
    self._keep(item, choice, result if isinstance(result, str) else choice_of(plain(result)))
    row = [item, choice, result if isinstance(result, str) else plain(result)]
    with writing(self._path):
      self._file.write(json.dumps(row).encode() + b"\n")
      self._file.flush()

  def missing(self, asks: Sequence[Ask]) -> list[tuple[int, int]]:
    """What is not known yet, as (item, choice)."""
    missing = []
    for i, asked in enumerate(asks):
      if isinstance(asked, Choices):
        missing += [(i, j) for j in range(len(asked.pairs)) if (i, j) not in self.choices]
      elif i not in self.texts:
        missing.append((i, 0))
    return missing

  def answer(self, item: int, asked: Ask) -> Answer:
    """The answer to an item of which everything is known."""
    if isinstance(asked, Choices):
      return [self.choices[item, j] for j in range(len(asked.pairs))]
    return self.texts[item]

  def close(self):
    self._file.close()


def count(asked: Ask) -> int:
  """How many results an item needs."""
  return len(asked.pairs) if isinstance(asked, Choices) else 1


def plain(choice: Choice) -> dict[str, Any]:
  """A choice as JSON."""
  return {
    "log_prob": round(choice.log_prob, _DIGITS),
    "log_probs": [round(value, _DIGITS) for value in choice.log_probs],
    "tokens": list(choice.tokens),
    "is_greedy": choice.is_greedy,
    "is_cut": choice.is_cut,
  }


def choice_of(value: Mapping[str, Any]) -> Choice:
  """The choice that `plain` wrote."""
  return Choice(
    float(value["log_prob"]),
    tuple(value["log_probs"]),
    tuple(value["tokens"]),
    bool(value["is_greedy"]),
    bool(value["is_cut"]),
  )


def write_samples(files: Part, samples: Iterable[Mapping[str, Any]]):
  """Writes the finished samples and forgets the journal."""
  lines = (json.dumps(sample, ensure_ascii=False) for sample in samples)
  _write(files.samples, "".join(line + "\n" for line in lines))
  files.journal.unlink(missing_ok=True)


def read_samples(files: Part, number: int, title: str) -> list[dict[str, Any]]:
  """The samples of a finished part.

  Raises:
    UserError: the file is damaged, or does not hold `number` samples.
  """
  try:
    lines = files.samples.read_text(encoding="utf-8").split("\n")
    samples = [json.loads(line) for line in lines if line]
    if len(samples) == number and all(isinstance(sample, dict) for sample in samples):
      return samples
  except ValueError:
    pass
  raise UserError(
    f"{title}: {named(str(files.samples), 200)} is damaged; delete it, and run the same command again"
  )
