"""The items of a task and its worked examples, chosen by seed. Called by runner.py; imports rows.py and task.py.

Worked examples come from the training split. Where only one file is given, they are taken out of it by the hash of
their text, and items of the same passage are then not asked: no item is ever answered with its own answer in sight.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from instructjax.core.errors import UserError
from instructjax.evaluation import rows
from instructjax.evaluation.task import Ask, Task


@dataclasses.dataclass(frozen=True)
class Loaded:
  """The data of a task.

  Attributes:
    spec: file or spec of the rows that are answered.
    items: all of them, in the order of the file.
    shots_spec: the same of the training split; None if there is none.
    shots: items that worked examples are drawn from; empty without a training split.
  """

  spec: str
  items: tuple[Any, ...]
  shots_spec: str | None
  shots: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
  """The items of one prompt, ready to be asked.

  Attributes:
    numbers: of the items among all of the file, from 0.
    items: the items.
    asks: what is asked of each.
    shots_from: where the worked examples come from, in words; "" if there are none.
  """

  numbers: tuple[int, ...]
  items: tuple[Any, ...]
  asks: tuple[Ask, ...]
  shots_from: str


def load(name: str, task: Task, data: rows.Data, *, needs_shots: bool) -> Loaded | None:
  """Reads the rows of a task; None if there is no data for it.

  Args:
    name: of the task.
    task: the task.
    data: what --data says.
    needs_shots: whether the training split is read too.
  Raises:
    BadRecord: a row cannot be used; the message begins with its file and line.
    UserError: a file cannot be read or holds no rows.
  """
  spec = rows.find(data, name, task, train=False)
  if spec is None:
    return None
  items = tuple(task.read(rows.read(spec)))
  if not items:
    raise UserError(f"{spec} holds no rows of {name}")
  shots_spec = rows.find(data, name, task, train=True) if needs_shots else None
  shots = tuple(task.read(rows.read(shots_spec))) if shots_spec else ()
  return Loaded(spec, items, shots_spec, tuple(item for item in shots if task.is_shot(item)))


def ask(task: Task, prompt: str, loaded: Loaded, *, limit: int | None, seed: int) -> Asked:
  """Chooses items and worked examples, and makes the prompts.

  The same seed chooses the same of both, whatever the model. All prompts of a task ask the same items, but for those
  of which the worked examples had to be taken.

  Args:
    task: the task.
    prompt: name of the prompt.
    loaded: its data.
    limit: at most so many items, drawn by seed; None for all.
    seed: of both draws.
  Raises:
    UserError: there are too few rows for the worked examples.
  """
  chosen = _limited(task, loaded.items, limit, seed)
  how = task.prompts[prompt]
  shots, shots_from = _shots(task, how.shots, loaded, seed)
  taken = {task.group(shot) for shot in shots}
  numbers = [i for i in chosen if task.group(loaded.items[i]) not in taken]
  if not numbers:
    raise UserError(f"{loaded.spec}: no row is left beside the {how.shots} worked examples")
  items = [loaded.items[i] for i in numbers]
  asks = tuple(how.ask(item, shots) for item in items)
  return Asked(tuple(numbers), tuple(items), asks, shots_from)


def _limited(task: Task, items: Sequence[Any], limit: int | None, seed: int) -> list[int]:
  """The numbers of the items that are asked: at most `limit`, as many of each stratum as there are."""
  if limit is None or limit >= len(items):
    return list(range(len(items)))
  places: dict[int, int] = {}  # number -> place in its stratum
  counts = collections.Counter()
  drawn = sorted(range(len(items)), key=lambda i: _order(seed, f"item {i}"))
  for i in drawn:
    stratum = task.stratum(items[i])
    places[i] = counts[stratum]
    counts[stratum] += 1
  return sorted(sorted(drawn, key=lambda i: places[i])[:limit])


def _shots(task: Task, count: int, loaded: Loaded, seed: int) -> tuple[list[Any], str]:
  """The worked examples, of different groups, and where they come from."""
  if not count:
    return [], ""
  pool: Sequence[Any] = loaded.shots or [item for item in loaded.items if task.is_shot(item)]
  shots: dict[str, Any] = {}
  for item in sorted(pool, key=lambda item: _order(seed, repr(item))):
    shots.setdefault(task.group(item), item)
    if len(shots) == count:
      break
  if len(shots) < count:
    raise UserError(
      f"{loaded.shots_spec or loaded.spec} holds {len(shots)} worked examples, and {count} are wanted"
    )
  where = "the training split" if loaded.shots else "taken out of the file that is asked"
  return list(shots.values()), f"{count} worked examples, {where}"


def _order(seed: int, text: str) -> bytes:
  """A place in an order that is the same on every machine."""
  return hashlib.sha256(f"{seed} {text}".encode()).digest()
