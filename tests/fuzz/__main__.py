"""Tries many damaged and hostile inputs on everything that reads files or a command line.

  python -m tests.fuzz --inputs=100000 --seed=0

Each must be accepted, or refused with a UserError of one printable line, in time and with little memory. Anything else
is a finding: it is printed in a line, its bytes are saved, and the exit code is 1. `--replay=FOLDER` reads a saved one
again in this process and shows where it fails. Needs Linux.
"""

import argparse
import collections
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import sys
import time

from tests.fuzz import mutants, targets, worker
from tests.fuzz.worker import EXCEPTION, Outcome

_CHUNK = 100  # inputs of one task
_POLL = 0.5  # seconds between two looks at the workers
_WAIT = 12  # times the limit: clock time without an answer and without work that counts as over it
_SHOWN = 3  # inputs that are saved of each finding
_STARTING = 600  # seconds that a worker's start may take
SLOW, LARGE, ENDED = "over time", "over memory", "process ended"
COLUMNS = (worker.ACCEPTED, worker.REFUSED, EXCEPTION, SLOW, LARGE, ENDED)


def flags() -> argparse.ArgumentParser:
  """The command's flags."""
  parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
  parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", default="", help=f"of {','.join(targets.TARGETS)}")
  parser.add_argument("--jobs", type=int, default=2, help="processes")
  parser.add_argument("--seconds", type=float, default=5.0, help="of processor time an input")
  parser.add_argument("--gigabytes", type=float, default=1.0, help="of memory an input")
  parser.add_argument("--findings", default="runs/fuzz", help="folder for the inputs of findings")
  parser.add_argument("--replay", default="", help="folder of a finding")
  return parser


def tasks(inputs: int, seed: int, names: list[str]) -> list[tuple[str, int, range]]:
  """(target, seed, numbers of inputs) of all inputs, the targets in turn."""
  total = sum(targets.TARGETS[name].share for name in names)
  result, done = [], 0
  for i, name in enumerate(names):
    share = sum(targets.TARGETS[each].share for each in names[: i + 1])
    count = inputs * share // total - done
    done += count
    starts = range(0, count, _CHUNK)
    result += [
      (start / max(count, 1), (name, seed, range(start, min(start + _CHUNK, count))))
      for start in starts
    ]
  return [task for _, task in sorted(result, key=lambda row: row[0])]


class Findings:
  """Counts outcomes by target and kind, prints findings, and saves their inputs.

  Attributes:
    counts: (target, kind) -> number of inputs.
  """

  def __init__(self, folder: pathlib.Path, seconds: float, gigabytes: float):
    self._folder, self._seconds, self._bytes = folder, seconds, gigabytes * 1e9
    self.counts = collections.Counter()
    self._alike = collections.Counter()

  def add(self, target: str, seed: int, number: int, outcome: Outcome):
    """Takes in what came of an input."""
    kinds = [outcome.kind]
    if outcome.seconds > self._seconds and SLOW not in kinds:
      kinds.append(SLOW)
    if outcome.bytes > self._bytes and LARGE not in kinds:
      kinds.append(LARGE)
    for kind in kinds:
      self.counts[target, kind] += 1
      if kind not in (worker.ACCEPTED, worker.REFUSED):
        self._report(target, seed, number, kind, outcome)

  def _report(self, target: str, seed: int, number: int, kind: str, outcome: Outcome):
    alike = (target, kind, outcome.what.partition(":")[0], outcome.where)
    self._alike[alike] += 1
    if self._alike[alike] > _SHOWN:
      return
    place = self._folder / f"{target}-{seed}-{number}"
    mutants.write(place, targets.case(target, seed, number))
    used = f"{outcome.seconds:.1f} s, {outcome.bytes / 1e6:.0f} MB"
    print(f"{kind}: {outcome.what} at {outcome.where} ({used}): {place}", flush=True)

  def table(self, names: list[str]) -> str:
    """The counts, a row a target."""
    rows = [("target", "inputs", *COLUMNS)]
    for name in [*names, "all"]:
      of = names if name == "all" else [name]
      counts = [sum(self.counts[each, kind] for each in of) for kind in COLUMNS]
      # Every input is once accepted, refused, an exception, or ended its process; too slow or large besides.
      ended = counts[5] + sum(self.counts[each, "killed"] for each in of)
      rows.append((name, str(sum(counts[:3]) + ended), *map(str, counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = lambda row: "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join(map(line, rows))


@dataclasses.dataclass
class _Worker:
  """A process and the task it is at.

  Attributes:
    resident: bytes that it had when it was ready; 0 until then.
    task: what it is doing, less what is done.
    since: clock time and processor time when it began with the input it is at.
  """

  process: multiprocessing.process.BaseProcess
  pipe: multiprocessing.connection.Connection
  resident: int = 0
  task: tuple[str, int, range] | None = None
  since: tuple[float, float] = (0.0, 0.0)


def _start(gigabytes: float) -> _Worker:
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(target=worker.serve, args=(theirs, gigabytes), daemon=True)
  process.start()
  theirs.close()
  return _Worker(process, ours, since=(time.monotonic(), 0.0))


def _processor(pid: int | None) -> tuple[float, bool]:
  """Seconds of processor time that a process has had, and whether it works or waits for a processor."""
  try:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return 0.0, False
  seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
  return seconds, fields[0] == "R"


def _resident(pid: int | None) -> int:
  try:
    pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
  except OSError:
    return 0
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _excess(one: _Worker, seconds: float, gigabytes: float) -> Outcome | None:
  """Why a worker has to be killed."""
  used, is_working = _processor(one.process.pid)
  used -= one.since[1]
  waited = time.monotonic() - one.since[0]
  size = _resident(one.process.pid) - one.resident
  if used > 2 * seconds or (waited > _WAIT * seconds and not is_working):
    return Outcome(SLOW, f"no answer in {used:.0f} s of work and {waited:.0f} s", "", used, size)
  if size > 3 * gigabytes * 1e9:
    return Outcome(LARGE, "still growing", "", used, size)
  return None


def campaign(options: argparse.Namespace, names: list[str], found: Findings):
  """Tries all inputs.

  Raises:
    RuntimeError: a worker cannot start.
  """
  todo = collections.deque(tasks(options.inputs, options.seed, names))
  workers = [_start(options.gigabytes) for _ in range(options.jobs)]
  while workers:
    multiprocessing.connection.wait([one.pipe for one in workers], _POLL)
    for place, one in reversed([*enumerate(workers)]):
      ended = _take(one, found)
      if one.resident and one.task is None and not ended:
        if not todo:
          one.pipe.send(None)
          one.process.join()
          del workers[place]
          continue
        one.task, one.since = todo.popleft(), (time.monotonic(), _processor(one.process.pid)[0])
        one.pipe.send(one.task)
        continue
      if not one.resident:
        if ended or time.monotonic() - one.since[0] > _STARTING:
          raise RuntimeError("a worker does not start: try `--jobs=1` and a single target")
        continue
      excess = None if ended else _excess(one, options.seconds, options.gigabytes)
      if not (ended or excess) or one.task is None:
        continue
      if ended:  # the pipe is closed a moment before there is an exit code
        one.process.join(10)
      one.process.kill()
      one.process.join()
      target, seed, numbers = one.task
      outcome = excess or Outcome(ENDED, f"exit code {one.process.exitcode}")
      if excess:
        found.counts[target, "killed"] += 1
      found.add(target, seed, numbers[0], outcome)
      if len(numbers) > 1:
        todo.appendleft((target, seed, numbers[1:]))
      workers[place] = _start(options.gigabytes)


def _take(one: _Worker, found: Findings) -> bool:
  """Takes in what a worker has sent; whether it has ended."""
  try:
    while one.pipe.poll():
      got = one.pipe.recv()
      if not one.resident:
        one.resident = got
        continue
      assert one.task is not None
      target, seed, numbers = one.task
      found.add(target, seed, numbers[0], Outcome(*got))
      one.task = (target, seed, numbers[1:]) if len(numbers) > 1 else None
      one.since = (time.monotonic(), _processor(one.process.pid)[0])
  except (EOFError, ConnectionResetError):
    return True
  return False


def main() -> int:
  """Runs the command; its exit code."""
  options = flags().parse_args()
  if options.replay:
    folder = pathlib.Path(options.replay)
    targets.TARGETS[folder.name.partition("-")[0]].run(folder)
    return 0
  names = options.only.split(",") if options.only else [*targets.TARGETS]
  if unknown := set(names) - {*targets.TARGETS}:
    flags().error(f"--only={','.join(sorted(unknown))} must be of {','.join(targets.TARGETS)}")
  began = time.monotonic()
  found = Findings(pathlib.Path(options.findings), options.seconds, options.gigabytes)
  try:
    campaign(options, names, found)
  except KeyboardInterrupt:
    print("stopped; until then:")
  print(found.table(names))
  print(f"seed {options.seed}, {time.monotonic() - began:.0f} s", flush=True)
  return int(any(found.counts[name, kind] for name in names for kind in COLUMNS[2:]))


if __name__ == "__main__":
  sys.exit(main())
