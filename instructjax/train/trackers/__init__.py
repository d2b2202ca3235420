"""Where a run can be followed beside metrics.jsonl: one module a tracker, and what all of them have in common.

Each module has a function `create(run, before)`, which returns a `Tracker`. Only `tracking` calls them, each in a
thread of its own: what a tracker raises ends that tracker and never the run. They know nothing of models or losses.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

Status = Literal["finished", "failed", "stopped"]
TableRows = Sequence[Mapping[str, Any]]  # of a table; the keys of the first one name the columns


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of the main job, as trackers show it.

  Attributes:
    name: its name.
    project: W&B's project and MLflow's experiment; '' leaves it to the tracker's own environment variable.
    workdir: its folder.
    config: the resolved config, as nested plain values.
    offline: whether to write to the workdir only.
  """

  name: str
  project: str
  workdir: pathlib.Path
  config: Mapping[str, Any]
  offline: bool


class Tracker(Protocol):
  """What a tracker can do. Any exception turns it off.

  Attributes:
    id: by which the tracker knows the run; a later process goes on with it.
    place: where the run is: another place does not know the id.
    where: a line that tells the user where to look, or ''.
    received: how many rows of the ledger it has: what a killed process had handed over may not have arrived.
  """

  @property
  def id(self) -> str: ...

  @property
  def place(self) -> str: ...

  @property
  def where(self) -> str: ...

  @property
  def received(self) -> int: ...

  def begin(self, stage: str, directory: pathlib.Path, start: int):
    """A stage begins, or goes on after step `start`; its folder is `directory`."""
    ...

  def log(self, stage: str, step: int, metrics: Mapping[str, float], rows: TableRows):
    """The metrics of a step of the stage, and sampled answers, of which there may be none."""
    ...

  def report(self, numbers: Mapping[str, float], tables: Mapping[str, TableRows]):
    """What was measured once, at a stage's end."""
    ...

  def close(self, status: Status):
    """Nothing follows; sends what is left."""
    ...


class Ledger:
  """What a tracker was given of a run. It is kept in the workdir, for the process that goes on with the run.

  The file has a line for the run, {"id": ..., "place": ...}, and one for each row: [STAGE, STEP] for a step that was
  logged, ["", 0] for a report.

  Attributes:
    id, place: those of `Tracker`.
    rows: stage and step of each row, in order.
  """

  def __init__(self, path: pathlib.Path, name: str, place: str):
    self.id, self.place, self._path = name, place, path
    self.rows: list[tuple[str, int]] = []
    self._sent: set[tuple[str, int]] = set()
    self._stages: set[str] = set()

  def has(self, stage: str, step: int) -> bool:
    """Whether the step was logged."""
    return (stage, step) in self._sent

  def has_any(self, stage: str) -> bool:
    """Whether a step of the stage was logged."""
    return stage in self._stages

  def add(self, stage: str, step: int):
    """Notes a row, on the disk too."""
    self._note(stage, step)
    with open(self._path, "a", encoding="utf-8") as file:
      file.write(json.dumps([stage, step]) + "\n")

  def cut(self, count: int) -> list[tuple[str, int]]:
    """Keeps the first rows only, and returns the others."""
    kept, lost = self.rows[:count], self.rows[count:]
    self.rows, self._sent, self._stages = [], set(), set()
    for row in kept:
      self._note(*row)
    self.write()
    return lost

  def write(self):
    """Writes the file anew. It is renamed into place: a killed run leaves the old one."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    scratch = self._path.with_suffix(".tmp")
    lines = [{"id": self.id, "place": self.place}, *self.rows]
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(scratch, self._path)

  def _note(self, stage: str, step: int):
    self.rows.append((stage, step))
    self._sent.add((stage, step))
    self._stages.add(stage)


def read_ledger(path: pathlib.Path) -> Ledger | None:
  """The ledger in a file; None if there is none, or if it names no run, so that a new one begins at the tracker.

  It ends before a line that is no row: a machine that loses its power may leave zeros or half a line.
  """
  try:
    first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    head = json.loads(first)
    ledger = Ledger(path, head["id"], head["place"])
  except (OSError, ValueError, TypeError, KeyError, RecursionError):
    return None
  if not isinstance(ledger.id, str) or not isinstance(ledger.place, str):
    return None
  for line in lines:
    try:
      stage, step = json.loads(line)
    except (ValueError, TypeError, RecursionError):
      break
    if not isinstance(stage, str) or type(step) is not int:
      break
    ledger._note(stage, step)
  return ledger
