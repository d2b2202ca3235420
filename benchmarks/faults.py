"""Tries a whole run against faults: kills, full disks, flipped bits, and the loss of one of two processes.

  python -m benchmarks.faults --kinds=kill,bits,disk,limit,pair --tries=200 --seed=0

The run goes through all stages on the smallest networks (pretrain, sft, collect, rm, sft_select, ppo_init, ppo,
ppo_ptx, evaluate, report), and takes some ten CPU-seconds. First it runs undisturbed; its end is the reference. A try
has survived if the run, given again after the fault, ends as the reference does, bit for bit (arrays of the last
checkpoints, metrics, results, answers); and if it said what was wrong in one line with exit code 2, where it could say
anything.

  kill   SIGKILL at a random moment, half of them while a checkpoint is being written. The run is started again and
         killed again, until it comes to its end before it is killed.
  bits   One flipped bit in a random file of a random checkpoint. The file must be named, both when weights are loaded
         and when the stage is resumed, which then goes on from the checkpoint before.
  disk   A file system with room for a random part of the run, or with a random number of bytes left. Linux, as root.
  limit  No file may become larger than a random size (RLIMIT_FSIZE).
  pair   Two processes, of which one is killed, stopped (SIGSTOP) or stuck (its main thread sleeps, the others live) at
         a random moment. Both must end within --patience seconds, by themselves but for the stopped one.

Every run is a fork of this process, which has imported everything and never touches a device.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tests import micro, quick

ROOT = pathlib.Path(__file__).parents[1]
KINDS = ("kill", "bits", "disk", "limit", "pair")
STAGE = "ppo_ptx"
TEMPORARY = "*/checkpoints/*.orbax-checkpoint-tmp*"
LONGEST = 600  # seconds after which a run counts as hanging
KILLS = 40  # most kills of one run, which then goes to its end


def get_config(stage: str):
  """The config of the runs; this file is their --config."""
  config = micro.config_dict(
    stage, dict.fromkeys(("documents", "demonstrations", "prompts"), "demo:")
  )
  config.data.comparisons = "demo:"
  config.evaluate.compare = ("ppo",)
  config.log.tensorboard = True
  return config


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
    seconds: wall seconds that a run takes whose programs are compiled already.
  """

  folder: pathlib.Path
  end: dict[str, str]
  seconds: float

  @property
  def reference(self) -> pathlib.Path:
    """The undisturbed run's workdir."""
    return self.folder / "reference"

  def new_workdir(self, name: str) -> pathlib.Path:
    """An empty workdir, but for the programs that the reference has compiled."""
    workdir = self.folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(self.reference / "compiled", workdir / "compiled")
    return workdir

  def compare(self, workdir: pathlib.Path) -> str:
    """What differs from the reference; '' if nothing does."""
    end = read_digest(workdir)
    names = [name for name in sorted(self.end | end) if self.end.get(name) != end.get(name)]
    return f"another end in {', '.join(names)}" if names else ""


# --- one run --------------------------------------------------------------------------------------


def load_everything():
  """Imports what a run imports, so that its fork need not; JAX has no threads until it has devices."""
  importlib.import_module("instructjax.main")
  pipeline = importlib.import_module("instructjax.stages.pipeline")
  for stage in importlib.import_module("instructjax.core.stages").STAGES:
    pipeline.module(stage)
  for name in ("tensorboardX", "matplotlib.pyplot", "instructjax.serve.packaging"):
    importlib.import_module(name)
  demo = importlib.import_module("instructjax.data.demo")
  load = demo.load
  demo.load = lambda kind, split, seed: load(kind, split, seed)[: 40 if split == "train" else 8]
  importlib.import_module("instructjax.parallel.compiled")._SECONDS = 0.0  # keep all programs


def fork(body: Callable[[], None], log: pathlib.Path) -> int:
  """Runs `body` in a child whose output goes to a file; returns its process id."""
  sys.stdout.flush()
  sys.stderr.flush()
  child = os.fork()
  if child:
    return child
  code = 1
  try:
    os.setpgid(0, 0)
    with open(log, "ab", buffering=0) as file:
      for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    body()
    code = 0
  except SystemExit as ended:
    code = 0 if ended.code is None else int(ended.code)
  except BaseException:  # whatever it is belongs into the log, and the child must end here
    sys.excepthook(*sys.exc_info())
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(workdir: pathlib.Path, before: Callable[[], None] = lambda: None) -> int:
  """Starts the main job; `before` is called first, in the child."""

  def body():
    before()
    main, cli = (
      importlib.import_module(f"instructjax.{name}") for name in ("main", "commands.cli")
    )
    sys.argv = ["faults", f"--config={ROOT}/benchmarks/faults.py:{STAGE}", f"--workdir={workdir}"]
    cli.run(main.main, interrupted="interrupted")

  return fork(body, log_of(workdir))


def log_of(workdir: pathlib.Path) -> pathlib.Path:
  """Where a run's output goes: beside the workdir, whose disk may be full."""
  path = workdir.parent / "logs" / f"{workdir.name}.txt"
  path.parent.mkdir(exist_ok=True)
  return path


def wait(child: int, seconds: float) -> int | None:
  """The exit code of a child (negative: the signal that ended it), or None if it still runs."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.002)
  return None


def end_with(child: int):
  """Kills a child and all that it started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child, signal.SIGKILL)
  os.waitpid(child, 0)


def finish(workdir: pathlib.Path, before: Callable[[], None] = lambda: None) -> str:
  """Runs the main job to its end; returns what was wrong with that, or ''."""
  child = start(workdir, before)
  code = wait(child, LONGEST)
  if code is None:
    end_with(child)
    return f"it hung for {LONGEST} s"
  return "" if code == 0 else f"exit code {code}: {last_line(workdir)}"


def last_line(workdir: pathlib.Path) -> str:
  lines = log_of(workdir).read_text(encoding="utf-8", errors="replace").split("\n")
  return next((line for line in reversed(lines) if line.strip()), "")[:200]


def read_digest(workdir: pathlib.Path) -> dict[str, str]:
  """Name -> hash of everything that two equal runs have in common, read in a child, since it needs a device."""
  path = workdir.parent / f"{workdir.name}.digest"
  path.unlink(missing_ok=True)
  child = fork(lambda: path.write_text(json.dumps(digest(workdir))), log_of(workdir))
  if wait(child, LONGEST) != 0:
    return {"digest": f"{workdir}: {last_line(workdir)}"}  # no two of these are the same
  return json.loads(path.read_text())


def digest(workdir: pathlib.Path) -> dict[str, str]:
  """Name -> hash; without times, hardware and paths."""
  import jax
  import orbax.checkpoint as ocp

  def without_keys(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf

  from instructjax.train import checkpoint, finished, metrics

  found = {}
  for done in sorted(workdir.glob("*/done.json")):
    stage = done.parent
    values = finished.require_done(stage)
    found[f"{stage.name}/result"] = repr((values.fingerprint, values.step, values.result))
    records = [record | {"seconds": 0} for record in metrics.read_metrics(stage)]
    found[f"{stage.name}/metrics"] = json.dumps(records)
    for step in checkpoint.saved_steps(stage)[-1:]:
      with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(stage / "checkpoints" / str(step) / "state")
      plain = jax.tree.map(without_keys, tree)
      found[f"{stage.name}/state"] = f"{step} {checkpoint.tree_fingerprint(plain)}"
  for path in sorted([*workdir.glob("collect/*.jsonl"), *workdir.glob("evaluate/answers.jsonl")]):
    found[str(path.relative_to(workdir))] = path.read_text(encoding="utf-8")
  return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items()}


def stage_of(workdir: pathlib.Path) -> str:
  """Where a run stands: the stage it was last in."""
  folders = [path for path in workdir.glob("*/") if path.name not in ("compiled", "tokenizer")]
  running = [
    path for path in folders if not (path / "done.json").exists() and path.name != "report"
  ]
  newest = max(running or folders, key=lambda path: path.stat().st_mtime, default=None)
  if newest is None:
    return "start"
  return newest.name if newest in running else f"after {newest.name}"


# --- the kinds of faults --------------------------------------------------------------------------


def kill(bench: Bench, rng: random.Random, number: int) -> Iterator[Try]:
  """One run, killed until it is finished or was killed KILLS times."""
  workdir = bench.new_workdir(f"kill{number}")
  hits = []
  wrong = ""
  while len(hits) < KILLS and not wrong:
    child = start(workdir)
    # Early moments are likelier than late ones: each start has the rest of the run before it, not all of it.
    code = wait(child, 0.8 * bench.seconds * rng.random() ** 3)
    where = ""
    if code is None and rng.random() < 0.5:
      code = await_save(workdir, child, bench.seconds)
      where = " (saving)"
      if code is None:
        time.sleep(rng.uniform(0, 0.04))
    if code is None:
      where = (stage_of(workdir), where if any(workdir.glob(TEMPORARY)) else "")
      hits.append("".join(where))
      end_with(child)
    elif code == 0:
      break
    else:
      wrong = f"exit code {code}: {last_line(workdir)}"
  wrong = wrong or finish(workdir) or bench.compare(workdir)
  for hit in hits:
    yield Try("kill", hit, wrong)
  if not wrong:
    shutil.rmtree(workdir)


def await_save(workdir: pathlib.Path, child: int, seconds: float) -> int | None:
  """Waits until a checkpoint is being written; returns the exit code if the run ends before, else None."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline and not any(workdir.glob(TEMPORARY)):
    code = wait(child, 0.001)
    if code is not None:
      return code
  return None


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
  log_of(workdir).unlink(missing_ok=True)
  code = wait(fork(lambda: load_both_ways(workdir / stage.name, step), log_of(workdir)), LONGEST)
  told = log_of(workdir).read_text(encoding="utf-8", errors="replace").count(str(path))
  wrong = (
    "" if (code, told) == (0, 2) else f"exit code {code}, named {told} times: {last_line(workdir)}"
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
  size = sum(path.stat().st_blocks * 512 for path in bench.reference.rglob("*"))
  pages = rng.choice([0, 1, 2, 4, rng.randrange(size // 4096)])
  _mount(f"size={4096 * (pages + size // 4096 * 4)}", workdir)
  try:
    filler = workdir / "filler"
    free = shutil.disk_usage(workdir).free
    with open(filler, "wb") as file:
      os.posix_fallocate(file.fileno(), 0, max(free - 4096 * pages, 1))
    wrong = _refused(workdir, start(workdir))
    filler.unlink()
    wrong = wrong or finish(workdir) or bench.compare(workdir)
  finally:
    subprocess.run(["umount", "-l", str(workdir)], check=True)
  yield Try("disk", f"{4 * pages} KiB free", wrong)


def _mount(options: str, path: pathlib.Path):
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
  subprocess.run(command, check=True)


def _refused(workdir: pathlib.Path, child: int) -> str:
  """Waits for a run that must end well, or by a refusal in one line; returns what was wrong with its end, or ''."""
  code = wait(child, LONGEST)
  if code is None:
    end_with(child)
    return f"it hung for {LONGEST} s"
  text = log_of(workdir).read_text(encoding="utf-8", errors="replace")
  lines = [line for line in text.split("\n") if line.startswith("error: ")]
  if "Traceback" in text or code not in (0, 2) or (code == 2 and len(lines) != 1):
    return f"exit code {code}: {last_line(workdir)}"
  if code == 2 and "cannot write " not in lines[0]:
    return f"it does not say what cannot be written: {lines[0]}"
  return ""


def limit(bench: Bench, rng: random.Random, number: int) -> Iterator[Try]:
  """No file may become larger than a random size."""
  workdir = bench.new_workdir(f"limit{number}")
  size = int(10 ** rng.uniform(0, 6))
  limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
  # Its output goes through a pipe, whose file is not the run's.
  wrong = _refused(workdir, start(workdir, limits))
  wrong = wrong or finish(workdir) or bench.compare(workdir)
  if not wrong:
    shutil.rmtree(workdir)
  yield Try("limit", f"files of at most {size} bytes", wrong)


def pair(bench: Bench, rng: random.Random, number: int, patience: float) -> Iterator[Try]:
  """Two processes; one is lost, and both must end. Then the same command must go on."""
  workdir = bench.new_workdir(f"pair{number}")
  how = ("killed", "stopped", "stuck")[number % 3]
  victim = rng.randrange(2)
  pod = _start_pair(workdir)
  time.sleep(rng.uniform(0, 2 * bench.seconds))
  where = f"process {victim} {how}, {stage_of(workdir)}"
  # The worker is the supervisor's child.
  number_of = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "stuck": signal.SIGUSR1}[how]
  with contextlib.suppress(ProcessLookupError):
    os.kill(_worker(pod[victim]), number_of)
  codes: list[int | None] = [None, None]
  deadline = time.monotonic() + patience
  for process in (1 - victim, victim):
    is_last_word = how == "stopped" and process == victim
    codes[process] = wait(
      pod[process], 0.1 if is_last_word else max(deadline - time.monotonic(), 0)
    )
    if codes[process] is None:
      end_with(pod[process])
  ended = [
    code for process, code in enumerate(codes) if not (how == "stopped" and process == victim)
  ]
  wrong = f"still alive after {patience:.0f} s" if None in ended else ""
  if not wrong and any(code not in (0, 69, 137) for code in ended):
    wrong = f"exit codes {ended}: {last_line(workdir)}"
  # A pair's sums may round otherwise than one process's, so only that it ends is asked.
  yield Try("pair", where, wrong or finish(workdir))


def _start_pair(workdir: pathlib.Path) -> list[int]:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

  def before(process: int):
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    os.environ["JAX_NUM_PROCESSES"] = "2"
    os.environ["JAX_PROCESS_ID"] = str(process)
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(LONGEST))

  return [start(workdir, lambda process=process: before(process)) for process in range(2)]


def _worker(supervisor: int) -> int:
  children = pathlib.Path(f"/proc/{supervisor}/task/{supervisor}/children")
  return int((children.read_text().split() or [supervisor])[0])


# --- the campaign ---------------------------------------------------------------------------------


def prepare(folder: pathlib.Path) -> Bench:
  """Makes the reference run, and a second one for the time it takes once all programs are compiled.

  A folder that an earlier campaign has left holds both already.
  """
  first, known = folder / "reference", folder / "reference.json"
  if known.is_file():
    return Bench(folder, **json.loads(known.read_text()))
  wrong = finish(first)
  if wrong:
    raise SystemExit(f"the undisturbed run failed: {wrong}")
  bench = Bench(folder, read_digest(first), 0.0)
  if "digest" in bench.end:
    raise SystemExit(f"the undisturbed run's end cannot be read: {bench.end['digest']}")
  again = bench.new_workdir("again")
  began = time.monotonic()
  wrong = finish(again)
  seconds = time.monotonic() - began
  wrong = wrong or bench.compare(again)
  if wrong:
    raise SystemExit(f"two undisturbed runs differ: {wrong}")
  known.write_text(json.dumps({"end": bench.end, "seconds": round(seconds, 1)}))
  return dataclasses.replace(bench, seconds=seconds)


def campaign(
  kinds: list[str], tries: int, seed: int, patience: float, folder: pathlib.Path
) -> list[Try]:
  """All tries of all kinds, told as they end."""
  load_everything()
  bench = prepare(folder)
  print(f"an undisturbed run takes {bench.seconds:.1f} s", flush=True)
  makers = {"kill": kill, "bits": bits, "disk": disk, "limit": limit}
  found = []
  for kind in kinds:
    count, number = 0, 0
    while count < tries:
      rng = random.Random(f"{seed}/{kind}/{number}")
      made = (
        pair(bench, rng, number, patience) if kind == "pair" else makers[kind](bench, rng, number)
      )
      for one in made:
        found.append(one)
        count += 1
        print(f"{kind} {count}/{tries}  {one.where}  {one.wrong or 'survived'}", flush=True)
      number += 1
  return found


def table(tries: list[Try]) -> str:
  """Rows of kind, tried, survived; of kills also by stage."""
  rows = [("kind", "tried", "survived")]
  groups = collections.defaultdict(list)
  for one in tries:
    groups[one.kind].append(one)
    if one.kind == "kill":
      groups[f"  {one.where}"].append(one)
  for name, group in groups.items():
    rows.append((name, str(len(group)), str(sum(not one.wrong for one in group))))
  return "\n".join(f"{name:36} {tried:>6} {survived:>9}" for name, tried, survived in rows)


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kinds", default="kill,bits,disk,limit", help=f"of {', '.join(KINDS)}")
  parser.add_argument("--tries", type=int, default=200, help="faults of each kind")
  parser.add_argument("--seed", type=int, default=0, help="decides where and when; times vary")
  parser.add_argument(
    "--patience", type=float, default=120.0, help="seconds that a pair has to end"
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
    found = campaign(kinds, args.tries, args.seed, args.patience, folder.resolve())
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
