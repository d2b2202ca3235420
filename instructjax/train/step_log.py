"""The lines of a stage's steps: in metrics.jsonl, in the terminal and in trackers. Called by loop.py."""

import math
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax

from instructjax.core import terminal
from instructjax.parallel import distributed
from instructjax.train import pace
from instructjax.train.metrics import Display, MetricsWriter
from instructjax.train.spent import Spent
from instructjax.train.stage_runs import StageRun


class StepLog:
  """Writes the numbers and samples of each step to the files and the terminal; only the first process writes."""

  def __init__(
    self,
    run: StageRun,
    num_steps: int,
    start: int,
    on_samples,
    show: Sequence[str],
    progress: bool,
    speed: pace.Pace,
    spent: Spent,
  ):
    self._run, self._num_steps, self._on_samples = run, num_steps, on_samples
    self._speed, self._spent = speed, spent
    self._slowest: int | None = None  # the process that was named last
    self._writer = self._display = None
    if jax.process_index() == 0:
      run.tracking.begin(run.name, run.directory, start, self._is_due)
      self._writer = MetricsWriter(run.directory, start_step=start)
      spent.add("redone", self._writer.dropped_seconds)
      console = terminal.console() if progress else None
      self._display = Display(
        run.name, num_steps=num_steps, start_step=start, show=show, console=console
      )
    self._last_time = time.monotonic()

  def __enter__(self) -> Self:
    if self._display:
      self._display.start()
    return self

  def __exit__(self, *exception: Any):
    if self._display:
      self._display.stop()
    if self._writer:
      self._writer.close()

  def _is_due(self, step: int) -> bool:
    return step % self._run.log.every_steps == 0 or step == self._num_steps

  def write(
    self,
    step: int,
    metrics: Mapping[str, float],
    samples: Sequence,
    saved: Mapping[str, float] = types.MappingProxyType({}),
  ):
    """Writes a step's line.

    Args:
      step: its number.
      metrics: its metrics.
      samples: what it has sampled, or none.
      saved: what the checkpoint took that has reached the disk since the last line.
    """
    due = self._is_due(step)
    # Before the other processes leave: the callback gathers arrays, in which all of them take part.
    extra, rows = self._on_samples(samples[0], step) if samples and self._on_samples else ({}, ())
    seconds = self._speed.gather(distributed.team()) if due and step else []
    if not self._writer or not self._display:
      return
    now = time.monotonic()
    extra = {**extra, **{f"seconds/process_{i}": value for i, value in enumerate(seconds)}}
    metrics = {**metrics, **{name: value for name, value in extra.items() if math.isfinite(value)}}
    seconds_of_it = round(now - self._last_time, 4)
    line = {**metrics, "seconds": seconds_of_it, **self._spent.take(), **saved}
    self._writer.write(step, line)
    self._run.tracking.log(self._run.name, step, line, rows if due else ())
    self._last_time = now
    self._display.step(step, metrics, log=due)
    slowest = pace.slowest(seconds)
    if slowest is not None and slowest != self._slowest:  # once, not with every line
      self._display.tell(pace.slow_message(self._run.name, seconds, slowest))
    self._slowest = slowest if seconds else self._slowest
    self._display.samples(step, rows if due else ())
