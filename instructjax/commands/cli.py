"""Runs a command: parses its flags, and reports errors.

A mistake by the user is reported in one line, a bug with its traceback. Called by main, generate, export and the
commands of launch/. This module does not import JAX, so that --help and bad flags are answered at once.
"""

import io
import logging as python_logging
import os
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

import instructjax
from instructjax.core import environment
from instructjax.core.errors import (
  NotJoined,
  Preempted,
  UserError,
  Waiting,
  may_pass,
  one_line,
  raiser,
  reason,
)
from instructjax.core.text import printable, printable_lines
from instructjax.parallel import distributed, memory, supervisor

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in XLA's message
_NO_DEVICE = "Unable to initialize backend"  # in JAX's message
_FAULT = 1  # exit code after a bug
_MISTAKE = 2  # exit code after an error that the user can fix


def run(main: Callable[[list[str]], None], *, interrupted: str):
  """The entry point of every command. It ends the process if anything is raised.

  After a user's mistake it prints one line to stderr and exits with 2. After a bug it prints the traceback and exits
  with 1. `parallel.distributed` has more codes, for a run that was told to stop or waits for people, and for a lost
  process.

  Args:
    main: called with the command line's arguments that are no flags.
    interrupted: the message after Ctrl-C.
  """
  environment.fix()

  def whole(argv: list[str]):
    main(_ready(argv))
    # From here on only JAX's own shutdown is left, which may abort a process whose coordinator has ended before it.
    supervisor.say_code(0)

  try:
    app.run(whole, flags_parser=_parse)
  except Preempted as told:
    print(told, file=sys.stderr)
    distributed.end(distributed.PREEMPTED)
  except Waiting as told:
    print(printable(str(told)), file=sys.stderr)
    distributed.end(distributed.WAITING)
  except Exception as error:
    _end_with(error)
  except KeyboardInterrupt:
    print(interrupted, file=sys.stderr)
    sys.stderr.flush()  # os._exit does not flush
    # Exits without cleaning up: a checkpoint that is being saved would print long errors about missing threads.
    os._exit(130)


def _end_with(error: Exception):
  """Reports an error and ends the process."""
  # The loss of another process is checked first, because JAX reports it as many types, including ValueError.
  if distributed.is_loss(error):
    if not distributed.is_ending():
      _say(f"error: {supervisor.lost_message(reason(error))}")
    distributed.end(distributed.LOST)
  told = _what_to_mend(error)
  if told is not None:
    _say(f"error: {told}")
    if isinstance(error, NotJoined):
      distributed.end(distributed.LOST)
    if may_pass(error):
      distributed.end(distributed.STORAGE)
    distributed.end(_MISTAKE, mistake=told)
  print(
    f"This is a fault of instructjax {instructjax.__version__}, not a mistake of yours: please report it with the"
    " traceback that follows.",
    file=sys.stderr,
  )
  traceback.print_exception(error)
  distributed.end(_FAULT)


def _what_to_mend(error: Exception) -> str | None:
  """The line to show the user, or None if the error is a bug."""
  # An OSError that names a file comes from the user's files. One without a name may be a bug.
  if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
    return one_line(error)
  if isinstance(error, BrokenPipeError):  # the reader of stdout has ended, such as `| head`
    # Python flushes stdout once more at exit, which would raise the error again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


class _Sentence(python_logging.Formatter):
  """A log record as a sentence: `warning: 3 of 9 records are too long`."""

  def format(self, record: python_logging.LogRecord) -> str:
    text = f"{record.levelname.lower()}: {printable_lines(record.getMessage())}"
    return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _require_unicode(argv: list[str]):
  """Checks that the command line is UTF-8, since paths and prompts go to libraries that cannot take anything else.

  Raises:
    UserError: a byte of it is not.
  """
  for number, word in enumerate(argv[1:], start=1):
    name, equals, value = word.partition("=")
    is_flag = bool(equals) and word.startswith("-") and name.isprintable()
    try:
      (value if is_flag else word).encode()
    except UnicodeEncodeError as error:  # Python represents such bytes as lone surrogates
      what = name if is_flag else f"argument {number}"
      raise UserError(f"{what} is not UTF-8 (character {error.start + 1})") from error


def _show_odd_characters():
  """Prints characters that stdout's encoding lacks as escapes, instead of raising UnicodeEncodeError."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")


def _say(message: str):
  """Prints a message to stderr, after the traceback if the user has set --verbosity to debug the program."""
  verbosity = flags.FLAGS["verbosity"]
  if verbosity.present and (verbosity.value or 0) >= logging.INFO:
    traceback.print_exc()
  print(printable(message), file=sys.stderr)


def _ready(argv: list[str]) -> list[str]:
  """Sets up logging and the memory allocator, and returns the arguments that are no flags."""
  if not flags.FLAGS["verbosity"].present:
    # absl's default also shows internal messages of JAX and orbax.
    logging.set_verbosity(logging.WARNING)
    # And it begins each line with the time, the process and the line of code, which help only who debugs.
    logging.get_absl_handler().setFormatter(_Sentence())
  memory.keep_freed_memory()
  return argv[1:]


def _parse(argv: list[str]) -> list[str]:
  """Parses flags like absl, but reports a bad flag as a UserError, and exits with 0 after --help.

  Raises:
    UserError: a flag is unknown or has a bad value.
  """
  _require_unicode(argv)
  _show_odd_characters()
  try:
    return flags.FLAGS(argv)
  except UserError:
    raise
  except flags.Error as error:
    cause = error.__context__
    # absl wraps each ValueError and TypeError of a flag's parser. One from our own parsers is a UserError or a bug.
    if isinstance(cause, UserError) or (cause is not None and _is_raised_in("instructjax", cause)):
      raise cause from None
    raise UserError(str(error)) from error
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"a --flagfile cannot be read: {reason(error)}") from error
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    # ml_collections raises these if it cannot set a field of the config, for example to a value of another type. From
    # any other code they are bugs.
    if not _is_raised_in("ml_collections", error):
      raise
    raise UserError(f"--config cannot be changed so: {_telling_part(error)}") from error
  except SystemExit:  # absl exits with 1 after --help
    sys.exit(0)


def _is_raised_in(package: str, error: BaseException) -> bool:
  return raiser(error).partition(".")[0] == package


def _telling_part(error: Exception) -> str:
  """The message of the innermost error that ml_collections has wrapped, in one line."""
  while error.args and isinstance(error.args[0], Exception):
    error = error.args[0]
  message = error.args[0] if isinstance(error, KeyError) else str(error)
  return " ".join(str(message).split())
