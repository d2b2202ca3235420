"""Metrics: written to metrics.jsonl, shown in the terminal, and read back. Trackers are in `tracking`.

Called by `loop`, which writes and shows them, and by the stages and `profiling`, which read them. Knows nothing of
stages, states or checkpoints.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from instructjax.core import terminal
from instructjax.core.errors import writing
from instructjax.core.text import printable

_MOST = sys.float_info.max


# What begins so is measured by a clock, or by what lies on the disk, and differs between two runs that are else equal.
MEASURED = ("seconds", "checkpoint/")


class MetricsWriter:
  """Appends one JSON object per step to metrics.jsonl.

  Args:
    directory: the stage's folder.
    start_step: step of the checkpoint that the run goes on from. Lines of later steps are dropped, because those steps
      are done again; `dropped_seconds` is what they took.
  Raises:
    UserError: the file cannot be written.
  """

  def __init__(self, directory: pathlib.Path, *, start_step: int):
    self._path = pathlib.Path(directory) / "metrics.jsonl"
    with writing(self._path):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self.dropped_seconds = _drop_lines_after(self._path, start_step)
      # Without a buffer: a killed run loses no finished line, and closing the file on a full disk does not fail again.
      self._file = open(self._path, "ab", buffering=0)

  def write(self, step: int, metrics: Mapping[str, float]):
    """Appends a line to the file.

    Raises:
      UserError: the file cannot be written.
    """
    line = (json.dumps({"step": step, **metrics}, allow_nan=False) + "\n").encode()
    with writing(self._path):
      while line:  # a disk that is nearly full takes a part first, and refuses the rest
        line = line[self._file.write(line) :]

  def close(self):
    self._file.close()


def read_metrics(directory: pathlib.Path) -> list[dict[str, float]]:
  """The records of a stage's metrics.jsonl, one per step; [] if there is no such file.

  Lines that are no records are passed over: a machine that loses its power may leave zeros or half a line.
  """
  return _read(pathlib.Path(directory) / "metrics.jsonl")[0]


def _read(path: pathlib.Path) -> tuple[list[dict[str, float]], list[bytes]]:
  """The records of a file, and the finished lines that are none."""
  records, junk = [], []
  for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
    record = _parse(line)
    if record is not None:
      records.append(record)
    # A killed run may leave half a line at the end, which is nothing to speak of.
    elif line.endswith(b"\n"):
      junk.append(line)
  return records, junk


def _parse(line: bytes) -> dict[str, float] | None:
  """A line's record, 'step' among its keys; None if it is no object of finite numbers."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not line.endswith(b"\n") or not isinstance(record, dict):
    return None
  if type(record.get("step")) is not int or record["step"] < 0:
    return None
  are_numbers = all(type(value) in (int, float) for value in record.values())
  # An integer may be too large for a float, which `math.isfinite` would make of it.
  return record if are_numbers and all(abs(value) <= _MOST for value in record.values()) else None


class Display:
  """Shows a stage's progress: a bar with the time left in a terminal, plain lines elsewhere.

  Args:
    name: the stage's name.
    num_steps: steps in all.
    start_step: steps done by earlier runs.
    show: names of the metrics to show; empty for the first few.
    console: where to print; None prints nothing.
  """

  def __init__(
    self,
    name: str,
    *,
    num_steps: int,
    start_step: int,
    show: Sequence[str],
    console: terminal.Console | None,
  ):
    self._name, self._num_steps, self._show, self._console = name, num_steps, tuple(show), console
    self._start_step, self._start_time = start_step, time.monotonic()
    self._bar = None
    if console is not None and console.is_terminal:
      self._bar = terminal.Bar(console, name, num_steps, start_step, "compiling")
      self._refreshed = 0.0

  def start(self):
    if self._console and self._start_step:
      self._print(f"{self._name}: going on after step {self._start_step}")
    if self._bar:
      self._bar.start()

  def stop(self):
    if self._bar:
      self._bar.stop()

  def step(self, step: int, metrics: Mapping[str, float], *, log: bool):
    """Updates the bar; without a bar, prints a line if `log`. Call it after every step."""
    if self._bar:
      now = time.monotonic()
      # At most five times a second: formatting the text at every step would slow small steps down.
      if now - self._refreshed > 0.2 or step == self._num_steps:
        self._refreshed = now
        self._bar.update(step, self._text(step, metrics))
    elif self._console and log:
      self._print(f"{self._name} {step}/{self._num_steps}  {self._text(step, metrics)}")

  def samples(self, step: int, rows: Sequence[Mapping]):
    """Shows samples as a table, one row each; the keys name the columns."""
    if not self._console or not rows:
      return
    title = f"{self._name} step {step}"
    if self._bar:
      terminal.show(sample_table(rows, title), self._console)
    else:
      for row in rows:
        cells = "  ".join(f"{name}: {_cell(value)}" for name, value in row.items())
        self._print(f"{title}  {cells}")

  def _text(self, step: int, metrics: Mapping[str, float]) -> str:
    names = [name for name in self._show if name in metrics] or list(metrics)[:4]
    rate = (step - self._start_step) / max(time.monotonic() - self._start_time, 1e-9)
    return "  ".join([*(f"{name} {_cell(metrics[name])}" for name in names), f"{rate:.3g} steps/s"])

  def tell(self, line: str):
    """Prints a line, above the bar if there is one."""
    self._print(line)

  def _print(self, line: str):
    if self._console:
      terminal.say(line, to=self._console)


def sample_table(rows: Sequence[Mapping], title: str) -> terminal.Table:
  """The samples as a table in which texts wrap and numbers are aligned to the right."""
  return terminal.Table(
    columns=[*rows[0]],
    rows=[[_cell(value) for value in row.values()] for row in rows],
    title=title,
    prose=[name for name, value in rows[0].items() if isinstance(value, str)],
  )


def _cell(value: Any) -> str:
  if isinstance(value, str):
    return printable(" ".join(value.split()))
  return f"{value:.4g}"


def _drop_lines_after(path: pathlib.Path, step: int) -> float:
  """Keeps the lines of the first `step` steps; at step 0, where everything is done again, not even that of step 0.

  Returns:
    The seconds of the lines that were dropped, with what these had lost to restoring and to earlier stops.
  """
  if not path.is_file():
    return 0.0
  records, junk = _read(path)
  if junk and step:
    aside = path.with_suffix(".junk")
    with open(aside, "ab") as file:
      file.writelines(junk)
    lines = "1 line is" if len(junk) == 1 else f"{len(junk)} lines are"
    print(f"{path}: {lines} no record of a step and moved to {aside.name}", file=sys.stderr)
  kept = [record for record in records if step and record["step"] <= step]
  scratch = path.with_suffix(".tmp")  # renamed into place: a run killed here keeps the old file
  scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
  os.replace(scratch, path)
  # The last two lie before a line's own seconds.
  kinds = ("seconds", "seconds/restore", "seconds/redone")
  took = lambda rows: sum(row.get(kind, 0.0) for row in rows for kind in kinds)
  return max(took(records) - took(kept), 0.0)
