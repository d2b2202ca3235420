"""Tries a whole run against faults: kills, full disks, flipped bits, and the loss of one of two processes.

  python -m benchmarks.faults --kinds=kill,bits,disk,limit,pair --tries=200 --seed=0

The run goes through all stages on the smallest networks (pretrain, sft, collect, rm, sft_select, ppo_init, ppo,
ppo_ptx, evaluate, report), and takes some ten CPU-seconds. First it runs undisturbed; its end is the reference. A try
has survived if the run, given again after the fault, ends as the reference does, bit for bit (arrays of the last
checkpoints, metrics, results, answers); and if it said what was wrong in one line with exit code 2, where it could say
anything.

  kill   SIGKILL at a random moment: a third of them while a checkpoint is being written, a sixth in evaluate and the
         report, the others spread evenly over the run. A run is killed CHAIN times, each time further on, then ends.
  bits   One flipped bit in a random file of a random checkpoint. The file must be named, both when weights are loaded
         and when the stage is resumed, which then goes on from the checkpoint before.
  disk   A file system with room for a random part of the run, or with a random number of bytes left. Linux, as root.
  limit  No file may become larger than a random size (RLIMIT_FSIZE).
  pair   Two processes, of which one is killed, stopped (SIGSTOP) or stuck (its main thread loops, its others live) at
         a random moment, while they start too. Both must end in time (see --patience) with the exit codes of
         docs/pods.md and one line each. The pair is then started again, up to three times with each kind of loss, and
         must end as an undisturbed pair does.

Moments are told by what a run has written, not by the clock: see moments.py. Every run is a fork of this process, which
has imported everything and never touches a device.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from benchmarks import fault_runs as runs
from benchmarks import moments
from instructjax.parallel.distributed import JOINING
from tests import quick

KINDS = ("kill", "bits", "disk", "limit", "pair")
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "stuck": signal.SIGUSR1}
# What no user should see: tracebacks, and lines of the logs of C++.
ODD = re.compile(r"Traceback |[IWEF]\d{4} \d\d:|terminate called|Exception ignored")
CHAIN = 10  # kills of one run, which then goes to its end
WAYS = ("killed", "stopped", "stuck")  # how one of two processes is lost


@dataclasses.dataclass(frozen=True)
class Try:
  """What became of one fault.

  Attributes:
    kind: one of KINDS.
    where: what was hit.
    wrong: why it did not survive; "" if it did.
  """

  kind: str
  where: str
  wrong: str


@dataclasses.dataclass(frozen=True)
class Bench:
  """What all tries share.

  Attributes:
    folder: holds the reference run in `reference`, and the tries.
    end: the reference's digest.
    timeline: when a run whose programs are compiled already has written what.
    stage: to which runs go.
    name: of the undisturbed run.
  """

  folder: pathlib.Path
  end: dict[str, str]
  timeline: moments.Timeline
  stage: str
  name: str = "reference"

  @property
  def reference(self) -> pathlib.Path:
    """The undisturbed run's workdir."""
    return self.folder / self.name

  def new_workdir(self, name: str) -> pathlib.Path:
    """An empty workdir, but for the programs that the reference has compiled."""
    workdir = self.folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    runs.log_of(workdir).unlink(missing_ok=True)
    shutil.copytree(self.reference / "compiled", workdir / "compiled")
    return workdir

  def compare(self, workdir: pathlib.Path) -> str:
    """What differs from the reference; '' if nothing does."""
    end = runs.read_digest(workdir)
    names = [name for name in sorted(self.end | end) if self.end.get(name) != end.get(name)]
    return f"another end in {', '.join(names)}" if names else ""


# --- the kinds of faults --------------------------------------------------------------------------


def await_moment(
  workdir: pathlib.Path, child: int, timeline: moments.Timeline, moment: moments.Moment, rng
) -> int | None:
  """Waits until a run has come to a moment; returns its exit code if it ends before, else None."""
  if timeline.has_come(moment, moments.marks(workdir)):  # while the run starts, then
    return runs.wait(child, rng.uniform(0, timeline.rows[0][0]))
  deadline = time.monotonic() + runs.LONGEST
  while time.monotonic() < deadline:
    code = runs.wait(child, 0.001)
    if code is not None:
      return code
    if timeline.has_come(moment, moments.marks(workdir)):
      return runs.wait(child, moment.delay)
  raise RuntimeError(f"{workdir} makes no headway")


def kill(bench: Bench, rng: random.Random, number: int) -> Iterator[Try]:
  """One run, killed CHAIN times."""
  workdir = bench.new_workdir(f"kill{number}")
  hits = []
  wrong = ""
  for moment in sorted(bench.timeline.draw(rng) for _ in range(CHAIN)):
    before, unfinished = moments.marks(workdir), moments.saving(workdir)
    child = runs.start(workdir, bench.stage)
    code = await_moment(workdir, child, bench.timeline, moment, rng)
    if code is None:
      runs.end_with(child)
      hits.append(_place(bench.timeline, workdir, before, unfinished))
    elif code != 0:  # one that has come to its end is started again all the same
      wrong = f"exit code {code}: {runs.last_line(workdir)}"
      break
  wrong = wrong or runs.finish(workdir, bench.stage) or bench.compare(workdir)
  for hit in hits:
    yield Try("kill", hit, wrong)
  if not wrong:
    shutil.rmtree(workdir)


def _place(timeline: moments.Timeline, workdir: pathlib.Path, before: set, unfinished: set) -> str:
  """Where a run was when it was killed, in words; `before` and `unfinished` are what lay there when it was started."""
  present = moments.marks(workdir)
  if saved := sorted(moments.saving(workdir) - unfinished):
    return f"{saved[0][0]} (saving)"
  return timeline.stage(present) + (" (starting)" if present == before else "")


def bits(bench: Bench, rng: random.Random, number: int) -> Iterator[Try]:
  """One flipped bit in a copy of the finished run."""
  stages = sorted({path.parents[1] for path in bench.reference.glob("*/checkpoints/*/")})
  stage = rng.choice(stages)
  workdir = bench.folder / "bits"
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir()
  shutil.copytree(bench.reference / "tokenizer", workdir / "tokenizer")
  shutil.copytree(stage, workdir / stage.name)
  # The step that later stages start from, and none after it, so that a resumed run starts from it too.
  step = json.loads((stage / "done.json").read_text())["step"]
  folder = workdir / stage.name / "checkpoints" / str(step)
  for path in folder.parent.iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  # Every other try by size: there most bits are weights.
  sizes = [path.stat().st_size for path in files]
  path = rng.choice(files) if number % 2 else rng.choices(files, sizes)[0]
  data = bytearray(path.read_bytes())
  bit = rng.randrange(8 * len(data))
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)
  where = f"{stage.name}, {path.relative_to(folder)}, bit {bit}"
  runs.log_of(workdir).unlink(missing_ok=True)
  code = runs.wait(
    runs.fork(lambda: load_both_ways(workdir / stage.name, step), runs.log_of(workdir)),
    runs.LONGEST,
  )
  told = runs.log_of(workdir).read_text(encoding="utf-8", errors="replace").count(str(path))
  wrong = (
    ""
    if (code, told) == (0, 2)
    else f"exit code {code}, named {told} times: {runs.last_line(workdir)}"
  )
  yield Try("bits", where, wrong)


def load_both_ways(stage: pathlib.Path, step: int):
  """Loads the weights of a stage as `generate` does, then resumes it; each prints the line of what is damaged."""
  from instructjax.core.config import MeshConfig
  from instructjax.core.errors import UserError
  from instructjax.parallel import sharding
  from instructjax.train import checkpoint, weights

  try:
    opened = weights.locate(stage)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1))
    opened.load(mesh, opened.model(mesh))
    print("nothing was noticed")
  except UserError as error:
    print(error)
  try:
    with checkpoint.Checkpoints(stage, keep=2) as checkpoints:
      if checkpoints.latest_step() == step:
        print("nothing was noticed")
  except UserError as error:  # there is none before it
    print(error)


def disk(bench: Bench, rng: random.Random, number: int) -> Iterator[Try]:
  """A file system that becomes full."""
  if not sys.platform.startswith("linux") or os.geteuid() != 0:
    yield Try("disk", "not tried: it takes Linux and root", "")
    return
  workdir = bench.folder / f"disk{number}"
  workdir.mkdir()
  runs.log_of(workdir).unlink(missing_ok=True)
  size = sum(path.stat().st_blocks * 512 for path in bench.reference.rglob("*"))
  pages = rng.choice([0, 1, 2, 4, rng.randrange(size // 4096)])
  _mount(f"size={4096 * (pages + size // 4096 * 4)}", workdir)
  try:
    filler = workdir / "filler"
    free = shutil.disk_usage(workdir).free
    with open(filler, "wb") as file:
      os.posix_fallocate(file.fileno(), 0, max(free - 4096 * pages, 1))
    wrong = _refused(workdir, runs.start(workdir, bench.stage))
    filler.unlink()
    wrong = wrong or runs.finish(workdir, bench.stage) or bench.compare(workdir)
  finally:
    subprocess.run(["umount", "-l", str(workdir)], check=True)
  yield Try("disk", f"{4 * pages} KiB free", wrong)


def _mount(options: str, path: pathlib.Path):
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
  subprocess.run(command, check=True)


def _refused(workdir: pathlib.Path, child: int, output: subprocess.Popen | None = None) -> str:
  """Waits for a run that must end well, or by a refusal in one line; returns what was wrong with its end, or ''.

  Args:
    output: a program to wait for, which brings the run's output to its log.
  """
  code = runs.wait(child, runs.LONGEST)
  if code is None:
    runs.end_with(child)
    return f"it hung for {runs.LONGEST} s"
  if output:
    output.wait()
  text = runs.log_of(workdir).read_text(encoding="utf-8", errors="replace")
  return _end_of_refused(code, text)


def _end_of_refused(code: int, text: str) -> str:
  lines = [line for line in text.split("\n") if line.strip()]
  odd = [line for line in lines if ODD.match(line)]
  if odd or code not in (0, 2):
    return f"exit code {code}: {(odd or lines[-1:] or [''])[0][:200]}"
  if code == 0:
    return ""
  errors = [line for line in lines if line.startswith("error: ")]
  if errors != lines[-1:]:
    return f"exit code 2, but not in one last line: {lines[-2:]}"[:300]
  if "cannot write " not in errors[0]:
    return f"it does not say what cannot be written: {errors[0]}"
  return ""


def limit(bench: Bench, rng: random.Random, number: int) -> Iterator[Try]:
  """No file may become larger than a random size."""
  workdir = bench.new_workdir(f"limit{number}")
  size = int(10 ** rng.uniform(0, 6))
  # The run's output goes to its log through another program, since it too would become too large.
  reads, writes = os.pipe()
  with open(runs.log_of(workdir), "ab") as file:
    output = subprocess.Popen(["cat"], stdin=reads, stdout=file)
  os.close(reads)

  def limits():
    for stream in (1, 2):
      os.dup2(writes, stream)
    sys.stdout = open(
      1, "w", buffering=1, closefd=False
    )  # that of the campaign may be a file, which can seek
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.close(writes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

  child = runs.start(workdir, bench.stage, limits)
  os.close(writes)
  wrong = _refused(workdir, child, output)
  wrong = wrong or runs.finish(workdir, bench.stage) or bench.compare(workdir)
  if not wrong:
    shutil.rmtree(workdir)
  yield Try("limit", f"files of at most {size} bytes", wrong)


def pair(bench: Bench, rng: random.Random, number: int, patience: float) -> Iterator[Try]:
  """Two processes; one is lost, and both must end. Then the same command must go on, and come to the same end."""
  workdir = bench.new_workdir(f"pair{number}")
  tries = []
  # So that a stuck process is noticed soon, but not one that waits for its turn on a busy machine.
  soon = max(40.0, bench.timeline.seconds)
  flags = (f"--config.guard.stuck_seconds={soon / 4}", f"--config.guard.phase_seconds={soon}")
  for moment in sorted(bench.timeline.draw_joined(rng) for _ in range(3)):
    how, victim = WAYS[(number + len(tries)) % 3], rng.randrange(2)
    before = moments.marks(workdir)
    pod = runs.start_pair(workdir, bench.stage, flags)
    code = await_moment(workdir, pod[0], bench.timeline, moment, rng)
    if code is not None:  # too late
      tries.append(Try("pair", f"{how}, not tried", "" if code == 0 else f"exit code {code}"))
      runs.end_with(pod[1])
      continue
    present = moments.marks(workdir)
    stage = bench.timeline.stage(present) + (" (starting)" if present == before else "")
    # The worker is the supervisor's child.
    with contextlib.suppress(ProcessLookupError):
      os.kill(runs.worker_of(pod[victim]), SIGNALS[how])
    began = time.monotonic()
    # One that is lost before the two have met is waited for as long as one that never came.
    longest = JOINING if present == before else soon
    codes = runs.wait_for_pair(pod, longest + patience)
    took = time.monotonic() - began
    wrong = _end_of_pair(workdir, how, victim, codes)
    tries.append(Try("pair", f"{how}, {stage}, process {victim}, {took:.0f} s", wrong))
  pod = runs.start_pair(workdir, bench.stage)
  codes = runs.wait_for_pair(pod, runs.LONGEST)
  wrong = (
    "" if codes == [0, 0] else f"exit codes {codes} of the last start: {runs.last_line(workdir)}"
  )
  wrong = wrong or bench.compare(workdir)
  for one in tries:
    yield dataclasses.replace(one, wrong=one.wrong or wrong)


def _end_of_pair(workdir: pathlib.Path, how: str, victim: int, codes: list[int | None]) -> str:
  """What was wrong with the ends of two processes of which one was lost, or ''."""
  if None in codes:
    return f"exit codes {codes}: still alive"
  wanted = [69, 69]
  if how == "killed":
    wanted[victim] = 137
  for process in range(2):
    text = runs.pair_log(workdir, process).read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.split("\n") if line.startswith("error: ")]
    if codes[process] != wanted[process] or len(lines) != 1 or "Traceback" in text:
      return f"exit codes {codes}, process {process}: {lines or text[-200:]}"
  return ""


# --- the campaign ---------------------------------------------------------------------------------


def prepare(folder: pathlib.Path, stage: str, name: str = "reference") -> Bench:
  """Makes the undisturbed run, and a second one for the times at which it writes what once all programs are compiled.

  A folder that an earlier campaign has left holds both already.

  Args:
    folder: of the campaign.
    stage: to which runs go.
    name: `pair` for a run of two processes.
  """
  first, known = folder / name, folder / f"{name}.json"
  if known.is_file():
    values = json.loads(known.read_text())
    rows = tuple((seconds, mark) for seconds, mark in values["timeline"])
    return Bench(folder, values["end"], moments.Timeline(rows, values["seconds"]), stage, name)
  watch_run(first, stage, name)
  bench = Bench(folder, runs.read_digest(first), moments.Timeline((), 0.0), stage, name)
  if "digest" in bench.end:
    raise SystemExit(f"the undisturbed run's end cannot be read: {bench.end['digest']}")
  again = bench.new_workdir(f"{name}_again")
  timeline = watch_run(again, stage, name)
  if wrong := bench.compare(again):
    raise SystemExit(f"two undisturbed runs differ: {wrong}")
  values = {"end": bench.end, "timeline": timeline.rows, "seconds": timeline.seconds}
  known.write_text(json.dumps(values))
  return dataclasses.replace(bench, timeline=timeline)


def watch_run(workdir: pathlib.Path, stage: str, name: str) -> moments.Timeline:
  """Runs the main job undisturbed, and notes when it has written what."""
  pod = runs.start_pair(workdir, stage) if name == "pair" else [runs.start(workdir, stage)]
  began = time.monotonic()
  rows: dict[str, float] = {}
  code = None
  while code is None and time.monotonic() - began < runs.LONGEST:
    code = runs.wait(pod[0], 0.001)
    for mark in sorted(moments.marks(workdir) - rows.keys()):
      rows[mark] = time.monotonic() - began
  codes = [code, *runs.wait_for_pair(pod[1:], runs.LONGEST)]
  if any(codes):
    raise SystemExit(f"the undisturbed run failed: exit codes {codes}")
  ordered = tuple((seconds, mark) for mark, seconds in rows.items())
  return moments.Timeline(ordered, time.monotonic() - began)


def campaign(
  kinds: list[str], tries: int, seed: int, stage: str, patience: float, folder: pathlib.Path
) -> list[Try]:
  """All tries of all kinds, told as they end."""
  runs.load_everything()
  benches = {}
  for name in sorted({"pair" if kind == "pair" else "reference" for kind in kinds}):
    benches[name] = prepare(folder, stage, name)
    print(f"undisturbed ({name}): {benches[name].timeline.seconds:.1f} s", flush=True)
  two = functools.partial(pair, patience=patience)
  makers = {"kill": kill, "bits": bits, "disk": disk, "limit": limit, "pair": two}
  found = []
  for kind in kinds:
    count, number = 0, 0
    while count < tries:
      rng = random.Random(f"{seed}/{kind}/{number}")
      made = makers[kind](benches["pair" if kind == "pair" else "reference"], rng, number)
      for one in made:
        found.append(one)
        count += 1
        print(f"{kind} {count}/{tries}  {one.where}  {one.wrong or 'survived'}", flush=True)
      number += 1
  return found


def table(tries: list[Try]) -> str:
  """Rows of kind, tried, survived; of kills also by stage, of pairs by the way in which one was lost."""
  rows = [("kind", "tried", "survived")]
  groups = collections.defaultdict(list)
  for one in tries:
    groups[one.kind].append(one)
    if one.kind in ("kill", "pair"):  # of a pair: how one was lost
      groups[f"  {one.where.partition(',')[0]}"].append(one)
  for name, group in groups.items():
    rows.append((name, str(len(group)), str(sum(not one.wrong for one in group))))
  return "\n".join(f"{name:36} {tried:>6} {survived:>9}" for name, tried, survived in rows)


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kinds", default="kill,bits,disk,limit", help=f"of {', '.join(KINDS)}")
  parser.add_argument("--tries", type=int, default=200, help="faults of each kind")
  parser.add_argument("--seed", type=int, default=0, help="decides where and when; times vary")
  parser.add_argument(
    "--stage", default=runs.STAGE, help="to which runs go; earlier ones take less time"
  )
  parser.add_argument(
    "--patience",
    type=float,
    default=120.0,
    help="seconds that a pair has to end, beside those of an undisturbed run",
  )
  parser.add_argument("--folder", help="where the runs go; default: a temporary folder")
  args = parser.parse_args(arguments)
  kinds = args.kinds.split(",")
  for kind in kinds:
    if kind not in KINDS:
      parser.error(f"--kinds={args.kinds}: {kind} must be one of {', '.join(KINDS)}")
  if args.tries < 1:
    parser.error(f"--tries={args.tries} must be > 0")
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = quick.FLAGS
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
    folder.mkdir(parents=True, exist_ok=True)
    found = campaign(kinds, args.tries, args.seed, args.stage, args.patience, folder.resolve())
  print(table(found))
  counts = {
    kind: [
      sum(one.kind == kind for one in found),
      sum(one.kind == kind and not one.wrong for one in found),
    ]
    for kind in kinds
  }
  print(json.dumps({"benchmark": "faults", "seed": args.seed, "tried, survived": counts}))
  return int(any(one.wrong for one in found))


if __name__ == "__main__":
  sys.exit(main())
