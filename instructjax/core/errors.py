"""Errors that reach the user as one clear line: commands print them without a traceback and exit 2.

Raised anywhere; imports nothing of the project. Whatever else is raised is a fault of this package and
keeps its traceback (commands/cli.py), a plain ValueError included.
"""

import contextlib
import pathlib


class UserError(ValueError):
  """Something the user can mend; the message says what failed and how to mend it."""


class StageStopped(UserError):
  """Training was stopped before it could do harm: a metric was not finite or above its limit."""


class NotJoined(UserError):
  """The processes of one run did not come together: starting them again may mend it."""


class Preempted(Exception):
  """The run was told to stop (SIGTERM) and has; the same command goes on. No mistake: see `distributed`."""


@contextlib.contextmanager
def writing(path: pathlib.Path):
  """Makes a failed write (a full disk, most often) a UserError that names `path`."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:  # tensorstore: a full disk is a ValueError
    raise UserError(
      f"cannot write {path}: {reason(error)}. What was saved before is untouched: make room if the"
      " disk is full, and run the same command again."
    ) from error


def reason(error: Exception) -> str:
  """The telling part of a library's message: its first line, of a long one the end."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  line = line.split(" See full TensorStore details")[0].rstrip(".")
  return line if len(line) <= 200 else "..." + line[-200:]
