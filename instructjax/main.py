"""The command `python -m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/demo`.

It runs a stage together with all stages that it starts from.
"""

import pathlib

from absl import flags, logging

from instructjax.commands import cli, config_flag, settings
from instructjax.core import places
from instructjax.core.config import Config, from_config_dict
from instructjax.core.errors import UserError
from instructjax.parallel import agreement, distributed, supervisor
from instructjax.parallel.watchdog import Limits

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of checkpoints, metrics and the report; made if missing."
)
_SETTINGS = settings.define()
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, for a run of several processes; found automatically on TPU and Slurm.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes of the run; 1 is a run of one process."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
for _name in ("config", "settings"):  # defined in other modules, whose flags --help would leave out
  flags.declare_key_flag(_name)
flags.mark_flags_as_required(["config"])


def read(arguments: list[str]) -> tuple[Config, pathlib.Path, distributed.Group | None]:
  """What the command line asks for: the config, the workdir, and the processes of the run; None for one process.

  Raises:
    UserError: a flag or setting is wrong.
  """
  if arguments:
    raise UserError(
      f"unexpected arguments {ascii(arguments)[:200]}; settings are given as --config.NAME=VALUE"
    )
  config = from_config_dict(_CONFIG.value)
  workdir = places.require_workdir(_WORKDIR.value)
  group = distributed.find(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  return config, workdir, group


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
  from instructjax.parallel import compiled, memory
  from instructjax.stages import pipeline
  from instructjax.train import finished

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
  with finished.workdir_lock(workdir):
    pipeline.run(config, workdir)


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted: the same command goes on from the last checkpoint")
