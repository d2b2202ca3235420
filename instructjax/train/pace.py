"""How long a step takes each process of a run, and which one the others wait for. Called by the loop."""

import contextlib
import json
import statistics
import time
from collections.abc import Generator, Sequence

import numpy as np

from instructjax.parallel.watchdog import Team

SLOW = 1.3  # times the median step time from which on the slowest process is named
# A difference that is smaller is the terminal's or the disk's, and nothing to mend [seconds].
_WORTH_A_WORD = 0.01
_ANSWERS = 5.0  # seconds that the others have to come to the same log line


class Pace:
  """Measures the steps of this process: its own work, and the time that it waits for its devices.

  In a compiled step all processes wait for each other, so that their steps take equally long. What one of them needs
  beyond the others shows in its own work between two steps (drawing the batch, placing it), while the others wait.
  """

  def __init__(self):
    self._waited, self._others, self._steps, self._number = 0.0, 0.0, 0, 0
    self._began = time.monotonic()

  @contextlib.contextmanager
  def waiting(self) -> Generator[None, None, None]:
    """Around what waits for the devices."""
    began = time.monotonic()
    yield
    self._waited += time.monotonic() - began

  @contextlib.contextmanager
  def beside(self) -> Generator[None, None, None]:
    """Around what is no part of a step: evaluations and checkpoints."""
    began, waited = time.monotonic(), self._waited
    yield
    self._waited = waited
    self._others += time.monotonic() - began

  def step(self):
    """Counts a step."""
    self._steps += 1

  def gather(self, team: Team | None) -> list[float]:
    """Seconds a step of each process since the last call. All processes must call it.

    Args:
      team: the processes; None for a run of one.
    Returns:
      One number a process, for process 0; [] for the others, in a run of one process, or if one does not answer.
    """
    if team is None:
      return []
    now = time.monotonic()
    own = now - self._began - self._waited - self._others
    steps = max(self._steps, 1)
    self._number += 1
    # By way of the store, since a collective operation would run beside the step that the devices are at.
    team.put("pace", json.dumps([self._number, own / steps, self._waited / steps]))
    gathered = self._answers(team) if team.process == 0 else []
    self._waited, self._others, self._steps, self._began = 0.0, 0.0, 0, time.monotonic()
    if not gathered:
      return []
    return seconds_alone(np.array(gathered)[:, 1], np.array(gathered)[:, 2])

  def _answers(self, team: Team) -> list[list[float]]:
    """What all processes have said at this call or later, by number; [] if one says nothing."""
    deadline = time.monotonic() + _ANSWERS
    while True:
      said = {process: json.loads(text) for process, text in team.said("pace").items()}
      if len(said) == team.num_processes and min(one[0] for one in said.values()) >= self._number:
        return [said[process] for process in sorted(said)]
      if time.monotonic() > deadline:
        return []
      time.sleep(0.01)


def seconds_alone(own: np.ndarray, waited: np.ndarray) -> list[float]:
  """How long a step would take each process if it did not wait for slower ones.

  Args:
    own: seconds of each process's own work in a step.
    waited: seconds that it waits for its devices, which themselves wait for those of slower processes.
  Returns:
    Its own work, and the shortest wait of all: that of the process for which nobody else is late.
  """
  return [float(f"{seconds:.4g}") for seconds in own + waited.min()]


def slowest(seconds: Sequence[float]) -> int | None:
  """The process that needs SLOW times the median or more; None if there is none."""
  if not seconds:
    return None
  # Of two processes the faster one: the mean of both would hide half of what the other is late.
  median, most = statistics.median_low(seconds), max(seconds)
  is_slow = most >= SLOW * median and most - median >= _WORTH_A_WORD
  return seconds.index(most) if is_slow else None


def slow_message(stage: str, seconds: Sequence[float], process: int) -> str:
  """The line that names the slowest process."""
  median = statistics.median_low(seconds)
  return (
    f"{stage}: process {process} is the slowest: {seconds[process]:.3g} s a step, the median is {median:.3g} s; the"
    " others wait for it"
  )
