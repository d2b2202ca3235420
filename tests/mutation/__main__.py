"""Mutation testing: how many slips in the code do the tests notice? Outside of the default suite.

  python -m tests.mutation --results=FILE    tries all mutants; an existing FILE is gone on with
  python -m tests.mutation --list            shows them
  python -m tests.mutation --check           says which mutants and which reasons, both written by hand, no longer apply

First all tests that will be used run once on the code as it is: one that fails there would seem to kill every mutant.
Then each mutant is written into a temporary copy of the project, and the tests that can see it (plan.py) run there, in
a process of its own, until the first fails. The process is forked from this one, which has imported JAX already: that
takes half of what a mutant costs. The checkout itself is never changed.
"""

import argparse
import difflib
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

from tests.mutation import plan
from tests.mutation.operators import Mutant
from tests.mutation.survivors import REASONS

ROOT = pathlib.Path(__file__).parents[2]
COPIED = ("benchmarks", "configs", "docs", "instructjax", "launch", "tests", "setup.cfg")
ASLEEP = 20  # a process that still does something takes a second of processor time in so many
TARGET = 0.95  # share that must be killed
# By pytest's exit status; all others are failures: of a test, of an import, or of pytest itself by what a test left.
STATUS = {0: "survived", 4: "error", 5: "error"}


def diff(mutant: Mutant, source: str) -> str:
  """The mutant as a unified diff of one line of context."""
  path = f"instructjax/{mutant.module}.py"
  lines = (text.splitlines(keepends=True) for text in (source, mutant.apply(source)))
  return "".join(difflib.unified_diff(*lines, path, path, n=1))


def in_child(copy: pathlib.Path, arguments: list[str], log: pathlib.Path, timeout: int) -> int:
  """Runs pytest in the copy and returns its exit status. Called in a forked process only."""
  # Of processor time: a busy machine makes no mutant look as if it never ended.
  resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 1))
  os.setsid()  # what tests start can be ended with them
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(output, 1), os.dup2(output, 2)
  os.chdir(copy)
  os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
  sys.dont_write_bytecode = True
  sys.path[:] = [str(copy)] + [path for path in sys.path if path not in ("", str(ROOT))]
  for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "configs")]:
    del sys.modules[name]
  import pytest

  return int(pytest.main(["-n0", "-p", "no:cacheprovider", "--tb=line", *arguments]))


def start(copy: pathlib.Path, arguments: list[str], log: pathlib.Path, timeout: int) -> int:
  """Forks a process for pytest; returns its id."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # JAX warns of forks; it has started no threads yet
    child = os.fork()
  if child:
    return child
  status = 70
  try:
    status = in_child(copy, arguments, log, timeout)
  finally:
    os._exit(status)


class Place:
  """A copy of the project in which one mutant at a time is tried."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.log = folder, folder.with_suffix(".log")
    for name in COPIED:
      source, target = ROOT / name, folder / name
      if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".venv*"))
      else:
        shutil.copy(source, target)
    self.mutant: Mutant | None = None
    self.child, self.began = 0, 0.0

  def path(self, mutant: Mutant) -> pathlib.Path:
    return self.folder / "instructjax" / f"{mutant.module}.py"

  def begin(self, mutant: Mutant, source: str, timeout: int):
    self.path(mutant).write_text(mutant.apply(source), encoding="utf-8")
    self.mutant, self.began = mutant, time.monotonic()
    self.child = start(self.folder, ["-x", *plan.tests_of(mutant.module)], self.log, timeout)

  def poll(self, timeout: int, sources: dict[str, str]) -> dict | None:
    """The result once the tests have ended or their time is up; None before."""
    mutant, seconds = self.mutant, time.monotonic() - self.began
    child, code = os.waitpid(self.child, os.WNOHANG)
    if not child and seconds < ASLEEP * timeout:
      return None
    if not child:
      os.killpg(self.child, signal.SIGKILL)
      os.waitpid(self.child, 0)
      status = "timeout"
    elif os.WIFSIGNALED(code):
      out_of_time = os.WTERMSIG(code) in (signal.SIGXCPU, signal.SIGKILL)
      status = "timeout" if out_of_time else "killed"
    else:
      status = STATUS.get(os.WEXITSTATUS(code), "killed")
    self.path(mutant).write_text(sources[mutant.module], encoding="utf-8")
    lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
    by = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    self.mutant = None
    return dict(
      id=mutant.id,
      area=plan.area_of(mutant.module),
      what=mutant.what,
      status=status,
      seconds=round(seconds, 1),
      by=by[0][:160] if by and status != "survived" else "",
      diff=diff(mutant, sources[mutant.module]),
    )


def failing(tests: list[str], timeout: int) -> list[str]:
  """Runs these tests on the code as it is; returns a line for each that fails."""
  with tempfile.TemporaryDirectory(prefix="instructjax-mutation-") as folder:
    place = Place(pathlib.Path(folder) / "0")
    child = start(place.folder, tests, place.log, timeout * len(tests))
    code = os.waitpid(child, 0)[1]
    lines = place.log.read_text(encoding="utf-8", errors="replace").splitlines()
  found = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
  return found or (lines[-1:] if code else [])


def run(mutants: list[Mutant], sources: dict[str, str], jobs: int, timeout: int) -> Iterator[dict]:
  """Tries the mutants, `jobs` at a time; yields results as they come."""
  waiting = list(mutants)
  with tempfile.TemporaryDirectory(prefix="instructjax-mutation-") as folder:
    places = [Place(pathlib.Path(folder) / str(number)) for number in range(jobs)]
    try:
      while waiting or any(place.mutant for place in places):
        for place in places:
          if place.mutant and (result := place.poll(timeout, sources)):
            yield result
          if not place.mutant and waiting:
            mutant = waiting.pop(0)
            place.begin(mutant, sources[mutant.module], timeout)
        time.sleep(0.05)
    finally:
      for place in places:
        if place.mutant:
          os.killpg(place.child, signal.SIGKILL)


def read_results(path: pathlib.Path) -> dict[str, dict]:
  """Id -> newest result."""
  lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
  return {result["id"]: result for result in map(json.loads, lines)}


def table(results: list[dict]) -> str:
  """Tried and killed by area, and what survived without a reason."""
  rows = ["area      mutants  killed  timeouts  survived  with a reason"]
  for area in (*plan.AREAS, "all"):
    of_area = [r for r in results if area in (r["area"], "all")]
    count = lambda status, of_area=of_area: sum(r["status"] == status for r in of_area)
    reasons = sum(r["id"] in REASONS for r in of_area if r["status"] == "survived")
    cells = (len(of_area), count("killed"), count("timeout"), count("survived"), reasons)
    rows.append(f"{area:9}{cells[0]:8}{cells[1]:8}{cells[2]:10}{cells[3]:10}{cells[4]:15}")
  for result in results:
    if result["status"] in ("survived", "error"):
      said = REASONS.get(result["id"], "NO REASON" if result["status"] == "survived" else "ERROR")
      rows += ["", f"{result['id']} ({result['what']}): {said}", result["diff"].rstrip()]
  return "\n".join(rows)


def passes(results: list[dict]) -> bool:
  """Whether enough were killed and each survivor has a reason."""
  killed = sum(r["status"] in ("killed", "timeout") for r in results)
  left = [r for r in results if r["status"] not in ("killed", "timeout")]
  return killed >= TARGET * len(results) and all(r["id"] in REASONS for r in left)


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--results", type=pathlib.Path, help="file of results, one JSON line each")
  parser.add_argument("--seed", type=int, default=0, help="of the sample of generated mutants")
  parser.add_argument("--share", type=float, default=1.0, help="multiple of the sample's size")
  parser.add_argument("--jobs", type=int, default=2, help="mutants tried at a time")
  parser.add_argument("--timeout", type=int, default=600, help="of one mutant [CPU seconds]")
  parser.add_argument("--only", default="", help="mutants whose id begins so")
  parser.add_argument("--again", action="store_true", help="try survivors of FILE again")
  parser.add_argument("--list", action="store_true", help="show the mutants and end")
  parser.add_argument("--check", action="store_true", help="show which no longer apply and end")
  args = parser.parse_args(arguments)
  sources = plan.read_sources(ROOT)
  mutants, stale = plan.choose(sources, args.seed, args.share)
  mutants = [mutant for mutant in mutants if mutant.id.startswith(args.only)]
  if args.check:
    stale += [
      f"{name}: a reason without a mutant" for name in plan.without_mutant(REASONS, sources)
    ]
  for line in stale:
    print(f"does not apply: {line}")
  if args.list:
    for mutant in mutants:
      print(f"{mutant.id} ({mutant.what})\n{diff(mutant, sources[mutant.module])}")
  if args.list or args.check:
    print(f"{len(mutants)} mutants, {len(stale)} do not apply")
    return 1 if stale else 0
  if not args.results:
    parser.error("--results=FILE is missing")
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clears up, as Ctrl-C does
  known = read_results(args.results)
  redo = ("survived", "error") if args.again else ()
  waiting = [m for m in mutants if m.id not in known or known[m.id]["status"] in redo]
  _import_what_tests_import()
  tests = dict.fromkeys(test for mutant in waiting for test in plan.tests_of(mutant.module))
  if tests and (broken := failing([*tests], args.timeout)):
    print("fails without a mutant:", *broken, sep="\n")
    return 1
  with open(args.results, "a", encoding="utf-8", buffering=1) as file:
    for number, result in enumerate(run(waiting, sources, args.jobs, args.timeout), 1):
      known[result["id"]] = result
      file.write(json.dumps(result) + "\n")
      said = f"{result['status']:9}{result['seconds']:6.1f} s  {result['id']}  {result['what']}"
      print(f"{number}/{len(waiting)}  {said}", flush=True)
  results = [known[mutant.id] for mutant in mutants]
  print(table(results))
  return 0 if passes(results) and not stale else 1


def _import_what_tests_import():
  """What every test process would import; none of it starts a thread or a JAX backend."""
  os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX is imported; tests/conftest.py sets the same
  import chex  # noqa: F401
  import flax.linen  # noqa: F401
  import jax  # noqa: F401
  import ml_collections  # noqa: F401
  import optax  # noqa: F401
  import pytest  # noqa: F401
  import rich.progress  # noqa: F401


if __name__ == "__main__":
  sys.exit(main())
