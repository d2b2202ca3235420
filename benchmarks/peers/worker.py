"""What a process does that benchmarks.turns runs: says when it is warm, then one repetition for each line `go`.

Peers' scripts import it from the folder that they lie in, each in its own virtual environment, and instructjax's
benchmarks as benchmarks.peers.worker: it needs Python's standard library only.
"""

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import TextIO


@functools.cache
def claim_stdout() -> TextIO:
  """What stdout was; from now on, whatever is printed goes to stderr. Call it before a library that prints."""
  sys.stdout.flush()
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  return answers


def cpu_seconds() -> float:
  """CPU seconds, user and system, of this process and of its children that have ended."""
  usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def forget_peak():
  """Makes `peak_rss_gb` count from now on, on Linux: after warming up, the peak is that of repetitions alone."""
  if sys.platform == "linux":
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")


def peak_rss_gb() -> float:
  """Largest resident memory so far, or since `forget_peak`, in 1e9 bytes."""
  if sys.platform == "linux":  # where getrusage counts what the parent held when it forked, too
    with open("/proc/self/status") as file:
      (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def serve(once: Callable[[], dict], description: dict):
  """Answers on stdout until stdin ends.

  Args:
    once: runs a repetition to its end (nothing left on a device) and returns what is to be said of it, such as
      "tokens" and "phases" (name -> seconds). Has been run before, so that nothing is compiled any more.
    description: what stays the same: parameters, the first loss.
  """
  answers = claim_stdout()
  print(json.dumps({"ready": description}), file=answers)
  for line in sys.stdin:
    if line.strip() != "go":
      raise ValueError(f"{line!r} on stdin; a worker knows only 'go'")
    wall, cpu = time.perf_counter(), cpu_seconds()
    found = once()
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}
    print(json.dumps(seconds | {"peak_rss_gb": peak_rss_gb()} | found), file=answers)
