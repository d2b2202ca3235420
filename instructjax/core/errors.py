"""Errors that the user can fix. Commands print them as one line without a traceback, and exit with code 2.

Any part may raise them. Every other exception, including a plain ValueError, is a bug in this package and keeps its
traceback (see commands/cli.py). Of the project this module imports text only.
"""

import contextlib
import errno
import os
import pathlib
import re

from instructjax.core.text import printable

# Errors of a disk, a mount or a bucket that may pass by themselves.
_PASSING = (errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
_BUSY = {429, *range(500, 600)}  # a server's answers: too many requests, and faults of its own
# Errors that come from the state of the file system (full, read-only, missing, not permitted), not from a bug.
_REFUSALS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EMFILE,
  errno.ENFILE,
  *_PASSING,
)
# tensorstore raises a ValueError with "... [OS error 28: ENOSPC No space left on device]", and libraries in Rust write
# "(os error 28)". Neither raises an OSError, so the message is all there is to go by.
_OS_ERROR = re.compile(r"\bOS error\b", re.IGNORECASE)


_LONGEST = 1200  # letters of a message; the longest of ours list all config fields of a block


class UserError(ValueError):
  """An error that the user can fix. The message says what failed and how to fix it."""


class StageStopped(UserError):
  """Training was stopped because a metric was not finite or exceeded its limit."""


class NotJoined(UserError):
  """The processes of one run could not connect to each other. Starting them again may help."""


class Preempted(Exception):
  """The run has saved its state and stopped after a SIGTERM; the same command continues it.

  It is not a UserError, because nobody made a mistake. See parallel/distributed.py.
  """


class Waiting(Exception):
  """The run has saved its state and stopped until people have done their part; the same command continues it.

  It is not a UserError, because nobody made a mistake, and starting it again at once does not help.
  """


@contextlib.contextmanager
def writing(path: pathlib.Path):
  """Turns a failed write, most often because of a full disk, into a UserError that names `path`.

  Errors that do not come from the file system pass through unchanged.

  Raises:
    UserError: the file system refused an operation inside the `with` block.
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
  """Whether the file system caused an error, directly or through the chain of causes.

  Libraries wrap the system's error in types of their own, so the message is searched as well as the type.
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


def may_pass(error: BaseException) -> bool:
  """Whether the cause of an error is a fault of storage that the same command may not meet again."""
  cause: BaseException | None = error
  while cause is not None:
    answers = (getattr(cause, name, None) for name in ("code", "status"))  # of gcsfs, of aiohttp
    if any(isinstance(answer, int) and answer in _BUSY for answer in answers):
      return True
    if isinstance(cause, OSError) and cause.errno in _PASSING:
      return True
    text = str(cause)
    if _OS_ERROR.search(text) and any(os.strerror(number) in text for number in _PASSING):
      return True
    cause = cause.__cause__
  return False


def raiser(error: BaseException) -> str:
  """The dotted name of the module whose code raised an error; "" if it was never raised."""
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  return "" if trace is None else trace.tb_frame.f_globals["__name__"]


def one_line(error: BaseException) -> str:
  """An error's message in one printable line, or the name of its type if it has no message.

  Messages quote what the user has given, which may be a megabyte: the middle of a very long message is left out.
  """
  text = printable(" ".join(str(error).split()) or type(error).__name__)
  return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"


def reason(error: Exception) -> str:
  """The informative part of a library's message: its first line, cut to the last 200 characters.

  Libraries quote the files they read, so characters that a terminal would obey are replaced. TensorStore puts details
  behind its words, such as ` [tensorstore_spec='...']`, which may be longer than they are.
  """
  line = (str(error).strip().splitlines() or [type(error).__name__])[0]
  line = line.split(" See full TensorStore details")[0].rstrip(".")
  line = re.split(r" \[[a-z_ ]+='", line)[0]
  return printable(line if len(line) <= 200 else "..." + line[-200:])
