"""The runs that the fault campaign disturbs: how one is started, watched, ended, and compared with another.

Called by faults.py. Every run is a fork of the campaign's process, which has imported everything and never touches a
device. This file is also the --config of the runs.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from tests import micro

ROOT = pathlib.Path(__file__).parents[1]
STAGE = "ppo_ptx"
LONGEST = 600  # seconds after which a run counts as hanging


def get_config(stage: str):
  """The config of the runs; this file is their --config."""
  config = micro.config_dict(
    stage, dict.fromkeys(("documents", "demonstrations", "prompts"), "demo:")
  )
  config.data.comparisons = "demo:"
  if stage == STAGE:
    config.evaluate.compare = ("ppo",)
  config.log.trackers = ("tensorboard",)
  return config


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


def start(
  workdir: pathlib.Path,
  stage: str,
  before: Callable[[], None] = lambda: None,
  flags: Sequence[str] = (),
  log: pathlib.Path | None = None,
) -> int:
  """Starts the main job; `before` is called first, in the child."""

  def body():
    before()
    main, cli = (
      importlib.import_module(f"instructjax.{name}") for name in ("main", "commands.cli")
    )
    sys.argv = [
      "faults",
      f"--config={ROOT}/benchmarks/fault_runs.py:{stage}",
      f"--workdir={workdir}",
      *flags,
    ]
    cli.run(main.main, interrupted="interrupted")

  return fork(body, log or log_of(workdir))


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


def finish(workdir: pathlib.Path, stage: str) -> str:
  """Runs the main job to its end; returns what was wrong with that, or ''."""
  child = start(workdir, stage)
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

  from instructjax.train import damaged, finished, metrics, weight_hash

  # The devices that a state was saved on are not here, if it was saved by several processes.
  here = ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  found = {}
  for done in sorted(workdir.glob("*/done.json")):
    stage = done.parent
    values = finished.require_done(stage)
    found[f"{stage.name}/result"] = repr((values.fingerprint, values.step, values.result))
    records = [
      {key: value for key, value in record.items() if not key.startswith(metrics.MEASURED)}
      for record in metrics.read_metrics(stage)
    ]
    found[f"{stage.name}/metrics"] = json.dumps(records)
    for step in damaged.saved_steps(stage)[-1:]:
      path = stage / "checkpoints" / str(step) / "state"
      with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        args = jax.tree.map(lambda _: here, shapes)
        tree = checkpointer.restore(path, restore_args=args)
      plain = jax.tree.map(without_keys, tree)
      found[f"{stage.name}/state"] = f"{step} {weight_hash.tree_fingerprint(plain)}"
  for path in sorted([*workdir.glob("collect/*.jsonl"), *workdir.glob("evaluate/answers.jsonl")]):
    found[str(path.relative_to(workdir))] = path.read_text(encoding="utf-8")
  return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items()}


def pair_log(workdir: pathlib.Path, process: int) -> pathlib.Path:
  """Where the output of one start of one of two processes goes."""
  return log_of(workdir).with_name(f"{workdir.name}.{process}.txt")


def start_pair(workdir: pathlib.Path, stage: str, flags: Sequence[str] = ()) -> list[int]:
  """Starts the main job as two processes, whose logs begin anew."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

  def before(process: int):
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    os.environ["JAX_NUM_PROCESSES"] = "2"
    os.environ["JAX_PROCESS_ID"] = str(process)
    signal.signal(signal.SIGUSR1, _loop)

  logs = [pair_log(workdir, process) for process in range(2)]
  for log in logs:
    log.unlink(missing_ok=True)
  return [
    start(workdir, stage, lambda process=process: before(process), flags, log)
    for process, log in enumerate(logs)
  ]


def _loop(*_):
  while True:
    time.sleep(0.01)


def wait_for_pair(pod: Sequence[int], seconds: float) -> list[int | None]:
  """The exit codes of two processes; None for one that had to be killed because it still ran."""
  deadline = time.monotonic() + seconds
  codes = []
  for process in pod:
    codes.append(wait(process, max(deadline - time.monotonic(), 0.01)))
    if codes[-1] is None:
      end_with(process)
  return codes


def worker_of(supervisor: int) -> int:
  children = pathlib.Path(f"/proc/{supervisor}/task/{supervisor}/children")
  return int((children.read_text().split() or [supervisor])[0])
