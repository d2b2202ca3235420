"""Errors that reach the user as one clear line: commands print them without a traceback and exit 2.

Raised anywhere; imports nothing of the project. Whatever else is raised is a fault of this package and
keeps its traceback (commands/cli.py), a plain ValueError included.
"""

import contextlib
import errno
import os
import pathlib
import re

# What a file system refuses, as against what a program gets wrong.
_REFUSALS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EIO,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EMFILE,
  errno.ENFILE,
)
# tensorstore raises a ValueError, "... [OS error 28: ENOSPC No space left on device]"; Rust says "(os error 28)".
_OS_ERROR = re.compile(r"\bOS error\b", re.IGNORECASE)


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
  """Makes a failed write (a full disk, most often) a UserError that names `path`; other errors pass through.

  Raises:
    UserError: a file system refused what was done inside.
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, UserError) or not is_refused_by_files(error):
      raise
    raise UserError(
      f"cannot write {path}: {reason(error)}. What was saved before is untouched: make room if the"
      " disk is full, and run the same command again."
    ) from error


def is_refused_by_files(error: BaseException) -> bool:
  """Whether an error, or one that it was raised from, says that a file system refused something.

  Libraries wrap what the system says: it is looked for by type and by words.
  """
  cause: BaseException | None = error
  while cause is not None:
    text = str(cause)
    if isinstance(cause, OSError) or _OS_ERROR.search(text):
      return True
    if any(os.strerror(number) in text for number in _REFUSALS):
      return True
    cause = cause.__cause__
  return False


def reason(error: Exception) -> str:
  """The telling part of a library's message: its first line, of a long one the end."""
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  line = line.split(" See full TensorStore details")[0].rstrip(".")
  return line if len(line) <= 200 else "..." + line[-200:]
