"""What a run took: seconds, tokens and device-hours by stage, from the stages' logs and provenance.

Called by page.py and stages/evaluate.py. Pure functions.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from instructjax.core.provenance import Provenance

KINDS = ("compile", "input", "save", "evaluate", "restore", "redone")
_BEFORE = ("restore", "redone")
_SHOWN = 0.01  # share of a stage's time from which on a kind is shown


@dataclasses.dataclass(frozen=True)
class StageCost:
  """What one stage took.

  Attributes:
    seconds: wall-clock time over all starts, as far as it is known: that since the last start, or the log's own sum if
      that is more. Work that was lost to a stop, and done again, is not counted; it is `beside["redone"]`.
    device_seconds: `seconds` times the devices of the mesh.
    steps: steps in the log; 0 for a stage without any.
    tokens: tokens trained on or sampled, over all steps.
    first_step: seconds of the first step, most of which is compiling; NaN without steps.
    step: median seconds of the others; NaN with fewer than two steps.
    beside: seconds that went into something else than steps, by kind (see train/spent.py).
    goodput: share of the time, what was done again included, that went into steps themselves; NaN without steps.
  """

  seconds: float
  device_seconds: float
  steps: int
  tokens: float
  first_step: float
  step: float
  beside: Mapping[str, float]
  goodput: float


def of_stage(log: Sequence[Mapping[str, float]], made: Provenance) -> StageCost:
  """What a stage took.

  Args:
    log: rows of its metrics.jsonl; a row of step 0 is the evaluation before training.
    made: its provenance.
  """
  steps = [row for row in log if row.get("step", 0) > 0]
  took = [row["seconds"] for row in steps if "seconds" in row]
  logged = sum(row.get("seconds", 0.0) for row in log)
  seconds = max(made.seconds, logged)
  beside = {kind: sum(row.get(f"seconds/{kind}", 0.0) for row in log) for kind in KINDS}
  # A line's seconds count from the line before: what was done before the first is not in them.
  inside = sum(value for kind, value in beside.items() if kind not in _BEFORE)
  total = seconds + beside["redone"]
  return StageCost(
    seconds=seconds,
    device_seconds=seconds * made.hardware.num_devices,
    steps=len(steps),
    tokens=sum(row.get("tokens", 0.0) for row in steps),
    first_step=took[0] if took else math.nan,
    step=statistics.median(took[1:]) if len(took) > 1 else math.nan,
    beside={kind: value for kind, value in beside.items() if value},
    goodput=max(logged - inside, 0.0) / total if steps and total else math.nan,
  )


def by_stage(
  logs: Mapping[str, Sequence[Mapping[str, float]]], made: Mapping[str, Provenance]
) -> dict[str, StageCost]:
  """Stage -> what it took, in the order of `made`.

  Args:
    logs: stage -> rows of its metrics.jsonl; a stage without a log may be missing.
    made: stage -> its provenance.
  """
  return {stage: of_stage(logs.get(stage, ()), row) for stage, row in made.items()}


def duration(seconds: float) -> str:
  """Seconds, minutes or hours, with three digits or so: `48 s`, `10.9 min`, `3.20 h`."""
  if seconds < 120:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def in_words(costs: Mapping[str, StageCost], made: Mapping[str, Provenance]) -> str:
  """The whole run in a sentence: its time, where it ran, and the device-hours where there is more than one device."""
  machines = []
  for row in made.values():
    hardware = row.hardware
    on_cpu = hardware.device_kind == "cpu"
    where = f"{hardware.num_cpus} cores of {hardware.cpu}" if on_cpu else hardware.device_kind
    if hardware.num_devices > 1:
      where = f"{hardware.num_devices} devices, {where}"
    if where not in machines:
      machines.append(where)
  words = (
    f"In all {duration(sum(cost.seconds for cost in costs.values()))} on {' and '.join(machines)}"
  )
  if any(row.hardware.num_devices > 1 for row in made.values()):
    hours = sum(cost.device_seconds for cost in costs.values()) / 3600
    words += f": {hours:.3g} device-hours"
  return words


def table(costs: Mapping[str, StageCost]) -> list[dict]:
  """Rows for the page: name, cells as text, and the share of the whole time in percent for the bar.

  Cells: time, steps, seconds of the first step, of a later one (median), tokens, tokens a second, the share of the time
  that went into steps, and what went into the rest. A value that a stage does not have is empty.
  """
  total = sum(cost.seconds for cost in costs.values())
  rows = []
  for stage, cost in costs.items():
    step = lambda value: f"{value:.3g}" if math.isfinite(value) else ""
    speed = cost.tokens / cost.seconds if cost.seconds else 0.0
    cells = (
      duration(cost.seconds),
      f"{cost.steps:,}" if cost.steps else "",
      step(cost.first_step),
      step(cost.step),
      f"{cost.tokens:,.0f}" if cost.tokens else "",
      f"{speed:,.0f}" if cost.tokens else "",
      f"{100 * cost.goodput:.0f}%" if math.isfinite(cost.goodput) else "",
      ", ".join(
        f"{kind} {duration(value)}"
        for kind, value in cost.beside.items()
        if value >= _SHOWN * cost.seconds
      ),
    )
    rows.append(
      {"name": stage, "share": 100 * cost.seconds / total if total else 0.0, "cells": cells}
    )
  return rows
