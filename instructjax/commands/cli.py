"""Running a command: its flags parsed, and every mistake of the user's told in one line. Called by main, generate and
export; imports no JAX, so that --help and a bad flag answer at once.
"""

import os
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from instructjax.core.errors import NotJoined, Preempted, UserError, reason
from instructjax.parallel import distributed, memory

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # how XLA says it


def run(main: Callable[[list[str]], None], *, interrupted: str):
  """Entry point: a user's mistake is one line on stderr and exit code 2, never a traceback.

  Args:
    main: is given what is left of the command line after the flags.
    interrupted: what to say after Ctrl-C.
  """
  try:
    app.run(lambda argv: main(_ready(argv)), flags_parser=_parse)
  except Preempted as told:
    print(told, file=sys.stderr)
    distributed.end(distributed.PREEMPTED)
  except Exception as error:
    _end_with(error)
  except KeyboardInterrupt:
    print(interrupted, file=sys.stderr)
    sys.stderr.flush()
    os._exit(130)  # at once: a save under way would complain at length that its threads are gone


def _end_with(error: Exception):
  """Says in one line what the user can mend; a bug keeps its traceback."""
  if distributed.is_loss(error):  # before all others: some of JAX's errors are ValueErrors
    _say(f"error: {distributed.lost_message(reason(error))}")
    distributed.end(distributed.LOST)
  elif isinstance(error, (UserError, ValueError, OSError)):
    _say(f"error: {_telling_part(error)}")
    distributed.end(distributed.LOST if isinstance(error, NotJoined) else 2)
  elif isinstance(error, RuntimeError) and _OUT_OF_MEMORY in str(error):
    _say(
      f"error: out of memory: {reason(error)}. Use smaller batches or lengths, --config.execution.remat=full, or"
      " more devices with --config.mesh.fsdp"
    )
    distributed.end(2)
  elif distributed.is_joined():
    traceback.print_exc()
    distributed.end(1)
  else:
    raise error


def _say(message: str):
  verbosity = flags.FLAGS["verbosity"]
  if verbosity.present and verbosity.value >= logging.INFO:  # asked for, to look for a bug
    traceback.print_exc()
  print(message, file=sys.stderr)


def _ready(argv: list[str]) -> list[str]:
  """The arguments that are no flags; logs and memory are set up for what comes."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # absl's default shows what JAX and orbax do inside
  memory.keep_freed_memory()
  return argv[1:]


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
