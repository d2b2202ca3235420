"""Measures several programs in turn, so that a busy machine slows all of them alike. Called by benchmarks with peers.

Each program is a worker: a process of its own, with its own interpreter and libraries. It speaks the protocol of
benchmarks.peers.worker: a JSON line {"ready": description} once it is warm, and then for each line `go` that it reads
one JSON line {"wall_s": ..., "cpu_s": ..., "peak_rss_gb": ..., and more}. All workers are in memory at once. This
module never imports jax.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import BinaryIO

from instructjax.core.errors import UserError

_STAT = pathlib.Path("/proc/stat")


@dataclasses.dataclass(frozen=True)
class _Worker:
  """A running worker."""

  name: str
  process: subprocess.Popen
  log: BinaryIO  # its stderr

  def answer(self) -> dict:
    """Reads the next line of JSON that the worker prints.

    Raises:
      UserError: it has ended, or prints something else.
    """
    line = self.process.stdout.readline()
    if not line:
      raise UserError(f"{self.name} ended with {self.process.wait()}: {_tail(self.log)}")
    try:
      return json.loads(line)
    except json.JSONDecodeError:
      raise UserError(
        f"{self.name} printed {line.strip()!r} on stdout, where only JSON goes"
      ) from None

  def go(self) -> dict:
    """Runs one repetition; adds to the worker's numbers the CPUs that other processes used meanwhile.

    Raises:
      UserError: see `answer`.
    """
    start, before = time.perf_counter(), busy_seconds()
    # The worker has ended; `answer` raises the error that says so.
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.write("go\n")
      self.process.stdin.flush()
    found = self.answer()
    others = busy_seconds() - before - found["cpu_s"]
    return found | {"other_load": max(0.0, others / (time.perf_counter() - start))}


def _tail(log: BinaryIO, lines: int = 3) -> str:
  """The last lines of a log, for an error message."""
  log.seek(0)
  said = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
  return " | ".join([line for line in said if line][-lines:]) or "nothing on stderr"


def busy_seconds() -> float:
  """CPU seconds of all processes since the machine started; NaN on systems without /proc/stat."""
  if not _STAT.exists():
    return float("nan")
  fields = _STAT.read_text().split("\n", 1)[0].split()[1:]
  user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
  return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
  """The median, the least and the greatest value."""
  functions = {"median": statistics.median, "min": min, "max": max}
  return {name: round(function(values), digits) for name, function in functions.items()}


def summarize(description: dict, runs: list[dict]) -> dict:
  """Summarises a worker's runs: medians of all numbers, with ranges for wall and CPU seconds, and each run's load."""
  result = {"description": description}
  for key in runs[0]:
    values = [run[key] for run in runs]
    if key in ("wall_s", "cpu_s"):
      result[key] = spread(values)
    elif key == "other_load":
      # One number for each run, which tells whether that run can be trusted.
      result[key] = [round(value, 2) for value in values]
    elif key == "phases":
      result[key] = {
        phase: round(statistics.median(value[phase] for value in values), 3) for phase in values[0]
      }
    else:
      result[key] = round(max(values) if key == "peak_rss_gb" else statistics.median(values), 3)
  return result


def measure(workers: dict[str, list[str]], repeats: int) -> dict[str, dict]:
  """Starts the workers, and then runs them in turn.

  They start one after another: each is warm before the next begins, so that none compiles while another does.

  Args:
    workers: name -> command.
    repeats: number of measured repetitions of each.
  Returns:
    Name -> the worker's `summarize`.
  Raises:
    UserError: a worker has ended, or prints something other than JSON.
  """
  with contextlib.ExitStack() as stack:
    started, descriptions = [], {}
    for name, command in workers.items():
      log = stack.enter_context(tempfile.TemporaryFile())
      pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
      worker = _Worker(name, subprocess.Popen(command, **pipes), log)
      stack.callback(_stop, worker.process)
      descriptions[name] = worker.answer()["ready"]
      started.append(worker)
    runs = {name: [] for name in workers}
    for _ in range(repeats):
      for worker in started:
        runs[worker.name].append(worker.go())
  return {name: summarize(descriptions[name], found) for name, found in runs.items()}


def _stop(process: subprocess.Popen):
  """Ends a worker by closing its stdin; kills it if it has not ended within 10 seconds."""
  with contextlib.suppress(BrokenPipeError):
    process.stdin.close()
  try:
    process.wait(timeout=10)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()
  process.stdout.close()
