"""The command `python -m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/demo`.

It runs a stage together with all stages that it starts from; with `--sweep` or `--seeds`, once for each of their
combinations.
"""

import contextlib
import pathlib

from absl import flags, logging

from instructjax.commands import check, cli, config_flag, settings
from instructjax.core import places
from instructjax.core.config import Config, from_config_dict
from instructjax.core.errors import UserError
from instructjax.parallel import agreement, distributed, supervisor
from instructjax.parallel.watchdog import Limits
from instructjax.stages import sweep_points
from instructjax.stages.sweep_points import Point

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of checkpoints, metrics and the report; made if missing. gs://BUCKET/FOLDER is a copy of --scratch.",
)
_SCRATCH = flags.DEFINE_string(
  "scratch",
  None,
  "Of --workdir=gs://BUCKET/FOLDER: the folder that the run works in; by default one in ~/.cache. Several processes"
  " need one that all of them share.",
)
_SWEEP = flags.DEFINE_multi_string(
  "sweep",
  [],
  "FIELD=VALUE,VALUE: runs the config at each of these values, as ppo.beta=0,.05,.2, in a folder of its own in the"
  " workdir. Stages that the field does not touch are trained once. Several flags make a grid.",
)
_SEEDS = flags.DEFINE_string(
  "seeds",
  None,
  "Seeds to run the config with, as 0,1,2; with --sweep, each point with each of them.",
)
_SETTINGS = settings.define()
_CHECK = check.define()
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, for a run of several processes; found automatically on TPU and Slurm.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes of the run; 1 is a run of one process."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
for _name in (
  "config",
  "settings",
  "check",
):  # defined in other modules, whose flags --help would leave out
  flags.declare_key_flag(_name)
flags.mark_flags_as_required(["config"])


def read(arguments: list[str]) -> tuple[Config, pathlib.Path, distributed.Group | None]:
  """What the command line asks for: the config, the workdir, and the processes of the run; None for one process.

  Of a sweep, the config is that of its first point: all points run on the same devices.

  Raises:
    UserError: a flag or setting is wrong.
  """
  _refuse(arguments)
  points = read_points()
  config = points[0].config if points else from_config_dict(_CONFIG.value)
  bucket = _bucket()
  given = (bucket[1], "--scratch") if bucket else (_WORKDIR.value, "--workdir")
  workdir = places.require_workdir(*given)
  group = distributed.find(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if bucket and group and _SCRATCH.value is None:
    raise UserError(
      f"--workdir={bucket[0]} needs --scratch for several processes, which write each checkpoint together: a folder"
      " that all hosts share; without one, mount the bucket (docs/launching.md) and give the mounted folder"
    )
  return config, workdir, group


def _bucket() -> tuple[str, str] | None:
  """The URL and the local folder of a workdir in a bucket; None for an ordinary one."""
  return places.bucket_of(_WORKDIR.value, _SCRATCH.value)


def _refuse(arguments: list[str]):
  if arguments:
    raise UserError(
      f"unexpected arguments {ascii(arguments)[:200]}; settings are given as --config.NAME=VALUE"
    )


def read_points() -> list[Point]:
  """The points of the sweep that the command line asks for; [] for one run.

  Raises:
    UserError: a field or value is wrong.
  """
  if not _SWEEP.value and _SEEDS.value is None:
    return []
  return sweep_points.points(_SWEEP.value, _SEEDS.value, _CONFIG.value.to_dict())


def main(arguments: list[str]):
  """Runs the command.

  Raises:
    UserError: a flag or setting is wrong, or a stage reports an error that the user can fix.
    Preempted: the run was told to stop, and has saved its state.
  """
  if _SETTINGS.value is not None and not arguments:
    from_config_dict(_CONFIG.value)
    print(settings.show(_CONFIG.value, _SETTINGS.value))
    return
  if _CHECK.value is not None:
    _refuse(arguments)
    points = [(point.name, point.config) for point in read_points()]
    print(*check.check(points or [("", from_config_dict(_CONFIG.value))], _CHECK.value), sep="\n")
    return
  config, workdir, group = read(arguments)
  if group:
    # Starts a child process that does the work. The supervisor must not import JAX, so this comes first.
    supervisor.supervise()
  # Processes must join before JAX is used for the first time.
  distributed.join(group)
  guard = config.guard
  distributed.watch(
    Limits(guard.stuck_factor, guard.stuck_seconds, guard.phase_seconds, guard.grace_seconds)
  )
  # Imported here so that --help and bad flags are answered at once.
  import jax

  from instructjax.core import terminal
  from instructjax.core.stages import STAGES
  from instructjax.parallel import compiled, memory
  from instructjax.report import comparison_groups, comparison_page
  from instructjax.stages import finished_runs, lineage, pipeline, sweep
  from instructjax.train import finished, mirror

  jax.monitoring.register_event_duration_secs_listener(memory.release_after_compiling)
  compiled.keep_programs(workdir)
  # Warnings are the same in all processes, so process 0 alone shows them.
  if jax.process_index() != 0:
    logging.set_verbosity(logging.ERROR)
  # Before anything is computed or written. Data and tokenizer are compared once they are read: see pipeline.py.
  team = distributed.team()
  if team:
    facts = agreement.settings(config) | agreement.environment() | agreement.libraries()
    agreement.require_same(team, "settings and code", facts | agreement.code())
    agreement.require_one_workdir(team, workdir)
  if jax.process_index() == 0:
    for line in config_flag.explain(_CONFIG.value):
      terminal.say(line)
  points = read_points()
  bucket = _bucket()
  with contextlib.ExitStack() as stack:
    stack.enter_context(finished.workdir_lock(workdir))
    if bucket:
      stack.enter_context(mirror.mirrored(bucket[0], workdir))
    if not points:
      pipeline.run(config, workdir)
      return
    folders = sweep.run(points, workdir)
    if jax.process_index() == 0 and STAGES[lineage.plan(config)[-1]].kind == "evaluate":
      groups = comparison_groups.groups(finished_runs.read_all(folders))
      page = comparison_page.write(workdir / "comparison", groups)
      comparison_page.show(groups)
      terminal.say(f"comparison: {page}")


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted: the same command goes on from the last checkpoint")
