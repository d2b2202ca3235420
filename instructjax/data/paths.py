"""What the path of a source stands for: a file, several files by a glob, a folder.

Called by `readers` and `text_files`. Imports nothing of the project but the errors.
"""

import glob
import os
import stat

from instructjax.core.errors import UserError


def expanded(path: str) -> str:
  """The path with a leading ~ replaced by the home folder."""
  return os.path.expanduser(path)


def matches(path: str) -> list[str]:
  """The files that a path stands for: those that match it if it is a glob, sorted by name; else the path itself."""
  path = expanded(path)
  if glob.has_magic(path) and not os.path.lexists(path):
    return sorted(glob.glob(path, recursive=True))
  return [path]


def require_file(path: str):
  """Checks that a path is a file that can be read again and again, as a run needs it.

  Raises:
    UserError: it is absent, a folder, a pipe or a device, or may not be read.
  """
  try:
    mode = os.stat(path).st_mode
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
  if stat.S_ISDIR(mode):
    raise UserError(f"cannot read {path}: Is a directory")
  if not stat.S_ISREG(mode):
    raise UserError(f"cannot read {path}: it must be a file, which can be read more than once")
