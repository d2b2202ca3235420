"""Command line: `python -m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/demo`."""

import os
import pathlib
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from instructjax import memory
from instructjax.config import from_config_dict
from instructjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; FILE.py:PRESET picks a size.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of checkpoints, metrics and the report; made if missing."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]):
  if len(argv) > 1:
    raise UserError(f"unexpected arguments {argv[1:]}; settings are given as --config.NAME=VALUE")
  config = from_config_dict(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value).resolve()
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # absl's default shows what JAX and orbax do inside
  memory.keep_freed_memory()
  # Imported here so that --help and a bad flag answer at once.
  import jax

  from instructjax import checkpoint, pipeline

  # A stage that is resumed, or trained again on another fold, finds its program compiled.
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  with checkpoint.workdir_lock(workdir):
    pipeline.run(config, workdir)


def _parse(argv: list[str]) -> list[str]:
  """absl's parser, but a bad flag is the user's mistake like any other, and asking for help is none."""
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    raise UserError(f"--config has no field {_telling_part(error)}") from error
  except ImportError as error:
    raise UserError(
      f"--config cannot be loaded: {error}; run from the repository's root"
    ) from error
  except flags.Error as error:
    raise UserError(str(error)) from error
  except SystemExit:  # --help, which absl ends with 1
    sys.exit(0)


def _telling_part(error: Exception) -> str:
  """One line without the errors around it and the tracebacks quoted in it: ml_collections has both."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  message = error.args[0] if isinstance(error, KeyError) else str(error)
  lines = message.strip().splitlines()
  is_quoting = "Traceback" in message or "failure to load" in message
  return f"--config: {lines[-1].strip()}" if is_quoting else " ".join(lines)


def run():
  """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback."""
  try:
    app.run(main, flags_parser=_parse)
  except (UserError, ValueError, OSError) as error:
    verbosity = flags.FLAGS["verbosity"]
    if verbosity.present and verbosity.value >= logging.INFO:  # asked for, to look for a bug
      traceback.print_exc()
    print(f"error: {_telling_part(error)}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
    sys.stderr.flush()
    os._exit(130)  # at once: a save under way would complain at length that its threads are gone


if __name__ == "__main__":
  run()
