"""Moments of a run, told by what it has written: a fault then falls where it is meant to, however busy the machine is.

Called by benchmarks/faults.py. A mark is something that a run has written, such as the third line of sft's metrics; the
timeline of an undisturbed run says after how many seconds each mark was there.
"""

import bisect
import dataclasses
import pathlib
import random
from collections.abc import Iterable

TEMPORARY = ".orbax-checkpoint-tmp"
_NO_STAGE = ("compiled", "cache")


def marks(workdir: pathlib.Path) -> set[str]:
  """What a run has written so far: its stages' folders and files, lines of metrics, and checkpoints."""
  found = set()
  for stage in workdir.glob("*/"):
    if stage.name in _NO_STAGE:
      continue
    found.add(stage.name)
    for path in stage.iterdir():
      if path.name == "metrics.jsonl":
        lines = path.read_bytes().count(b"\n")
        found.update(f"{stage.name}/line {number}" for number in range(1, lines + 1))
      elif path.name == "checkpoints":
        steps = (one.name.partition(".")[0] for one in path.iterdir())
        found.update(f"{stage.name}/save {step}" for step in steps)
      elif "tfevents" not in path.name and path.suffix != ".tmp":
        found.add(f"{stage.name}/{path.name}")
  return found


def saving(workdir: pathlib.Path) -> set[tuple[str, int]]:
  """The checkpoints that are half written: stage and inode."""
  found = set()
  for path in workdir.glob(f"*/checkpoints/*{TEMPORARY}*"):
    try:
      found.add((path.parts[-3], path.stat().st_ino))
    except FileNotFoundError:  # it was finished meanwhile
      pass
  return found


@dataclasses.dataclass(frozen=True, order=True)
class Moment:
  """A moment of a run.

  Attributes:
    seconds: when it came in the undisturbed run.
    last: index in the timeline of the last mark before it; -1 if there was none.
    delay: seconds from that mark to the moment.
  """

  seconds: float
  last: int
  delay: float


@dataclasses.dataclass(frozen=True)
class Timeline:
  """When an undisturbed run had written what.

  Attributes:
    rows: (seconds from the start, mark), in order.
    seconds: from start to end.
  """

  rows: tuple[tuple[float, str], ...]
  seconds: float

  def at(self, seconds: float) -> Moment:
    last = bisect.bisect_right([row[0] for row in self.rows], seconds) - 1
    return Moment(seconds, last, seconds - self.rows[last][0] if last >= 0 else seconds)

  def draw(self, rng: random.Random) -> Moment:
    """A third of all moments fall into the writing of a checkpoint, a sixth behind the last checkpoint, and the
    others anywhere, all seconds of the run being equally likely.
    """
    kind = rng.random()
    if kind < 1 / 3:
      last = rng.choice([number for number, row in enumerate(self.rows) if "/save " in row[1]])
      return Moment(self.rows[last][0], last, rng.uniform(0, 0.04))
    begin = max(row[0] for row in self.rows if "/save " in row[1])
    return self.at(rng.uniform(begin if kind < 1 / 2 else 0, self.seconds))

  def draw_joined(self, rng: random.Random) -> Moment:
    """Any moment after the first mark, when the processes of the run have found each other."""
    return self.at(rng.uniform(self.rows[0][0], self.seconds))

  def has_come(self, moment: Moment, present: Iterable[str]) -> bool:
    """Whether the last mark before a moment is there. Later ones tell so too: old checkpoints are deleted."""
    later = {row[1] for row in self.rows[max(moment.last, 0) :]}
    return moment.last < 0 or not later.isdisjoint(present)

  def stage(self, present: set[str]) -> str:
    """The stage in which a run is that has left these marks."""
    reached = max((number for number, row in enumerate(self.rows) if row[1] in present), default=-1)
    if reached >= 0 and self.rows[reached][1].endswith("/done.json"):
      reached += 1  # the next stage, whose folder is made when it is ready to begin
    if reached < 0:
      return "start"
    return self.rows[reached][1].partition("/")[0] if reached < len(self.rows) else "the end"
