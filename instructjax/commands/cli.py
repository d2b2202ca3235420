"""Running a command: its flags parsed, every mistake of the user's told in one line, every bug with its traceback.

Called by main, generate, export and the commands of launch; imports no JAX, so that --help and a bad flag answer at
once.
"""

import os
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

import instructjax
from instructjax.core.errors import NotJoined, Preempted, UserError, reason
from instructjax.parallel import distributed, memory

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # how XLA says it
_NO_DEVICE = "Unable to initialize backend"  # how JAX says it
_FAULT = 1  # exit code of a bug
_MISTAKE = 2  # exit code of what the user can mend


def run(main: Callable[[list[str]], None], *, interrupted: str):
  """Entry point: a user's mistake is one line on stderr and exit code 2; a bug its traceback and exit code 1.

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
  told = _what_to_mend(error)
  if told is not None:
    _say(f"error: {told}")
    distributed.end(distributed.LOST if isinstance(error, NotJoined) else _MISTAKE)
  print(
    f"This is a fault of instructjax {instructjax.__version__}, not a mistake of yours: please report it with the"
    " traceback that follows.",
    file=sys.stderr,
  )
  traceback.print_exception(error)
  distributed.end(_FAULT)


def _what_to_mend(error: Exception) -> str | None:
  """What to tell the user, in one line; None of a bug."""
  if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
    return " ".join(str(error).split())
  if isinstance(error, BrokenPipeError):  # as `| head` leaves it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
    return "the program that reads this output has ended"
  if isinstance(error, MemoryError) or (
    isinstance(error, RuntimeError) and _OUT_OF_MEMORY in str(error)
  ):
    return (
      f"out of memory: {reason(error)}. Use smaller batches or lengths, --config.execution.remat=full, or"
      " more devices with --config.mesh.fsdp"
    )
  if isinstance(error, RuntimeError) and _NO_DEVICE in str(error):
    return f"JAX has no device to run on: {reason(error)}; see JAX_PLATFORMS and the driver"
  return None


def _say(message: str):
  verbosity = flags.FLAGS["verbosity"]
  if verbosity.present and (verbosity.value or 0) >= logging.INFO:  # asked for, to look for a bug
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
  except UserError:
    raise
  except flags.Error as error:
    if isinstance(error.__context__, UserError):  # of a flag's own parser, which absl wraps
      raise error.__context__ from None
    raise UserError(str(error)) from error
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    # ml_collections, setting a field of the config: a value of another type, say.
    raise UserError(f"--config cannot be changed so: {_telling_part(error)}") from error
  except SystemExit:  # --help, which absl ends with 1
    sys.exit(0)


def _telling_part(error: Exception) -> str:
  """One line, without the errors that ml_collections wraps around it."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  message = error.args[0] if isinstance(error, KeyError) else str(error)
  return " ".join(str(message).split())
