"""Paths that a user gives, on the command line or in a config: `~` is expanded, and what can be no path is refused.

Called by config.py, by the commands, and by what reads files of installed packages. It looks at the file system only
for a workdir and for packages. Imports errors alone.
"""

import errno
import importlib.util
import os
import pathlib
import re

from instructjax.core.errors import UserError

# Sources of records that are no files: simulated tasks, which have labelers and a gold score.
SIMULATED = ("demo:", "conversation:")
# What weights may be named by instead of a path: a name on the hub, or a file inside an installed package.
WEIGHTS = ("hf://", "package:")

# What a labeling project may be named by instead of a folder.
DATABASES = ("postgresql://", "postgresql+psycopg://")

_LONGEST, _LONGEST_NAME = 4095, 255  # bytes of a path and of one name in it, on Linux
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}(/[A-Za-z0-9._=-]+)+")
_SHOWN = 200  # letters of a path in a message about its spelling


def expand(text: str, where: str, schemes: tuple[str, ...] = ()) -> str:
  """A path as the user means it: with `~` and `~NAME` replaced by home folders.

  Args:
    text: the path; '' stays ''.
    where: what gives it, for messages, as `--workdir`.
    schemes: what it may begin with instead of being a path, as `hf://`.
  Raises:
    UserError: it can be no path on this machine.
  """
  if text.startswith(schemes or ("\0",)):
    return text
  spelled = f"{where}={_short(text)}"
  if not text.isprintable():
    raise UserError(
      f"{spelled} must be a path of printable characters in UTF-8: it holds a control character or other bytes"
    )
  remote = _REMOTE.match(text)
  if remote:
    raise UserError(
      f"{spelled} must be a path on this machine; {remote[0]} is not read or written: mount it as a folder"
    )
  result = os.path.expanduser(text)
  if result.startswith("~"):
    raise UserError(f"{spelled}: there is no such user; ./{_short(text)} is a file of this name")
  names = [len(name.encode()) for name in result.split("/")]
  if max(names) > _LONGEST_NAME or len(result.encode()) > _LONGEST:
    raise UserError(
      f"{spelled} is too long: a path has at most {_LONGEST} bytes, and a name in it {_LONGEST_NAME}"
    )
  return result


def require(text: str, where: str, schemes: tuple[str, ...] = ()) -> str:
  """A path that must be given; arguments and errors as `expand`.

  Raises:
    UserError: it is empty, or can be no path on this machine.
  """
  if not text.strip():
    raise UserError(f"{where} must have a value: it is an empty path")
  return expand(text, where, schemes)


def expand_source(text: str, where: str) -> str:
  """A source of records, SCHEME:PATH[?OPTIONS], with `~` at the start of PATH expanded; other texts pass unchanged.

  Raises:
    UserError: PATH can be no path on this machine.
  """
  scheme, colon, rest = text.partition(":")
  if not colon:
    return text
  path, mark, options = rest.partition("?")
  urls = DATABASES if scheme == "labels" else ()
  return f"{scheme}:{expand(path, f'{where}={scheme}:...', urls)}{mark}{options}"


def bucket_of(text: str | None, scratch: str | None) -> tuple[str, str] | None:
  """A workdir in a bucket, as (its URL, the folder of this machine that stands for it); None for an ordinary path.

  Args:
    text: what --workdir says.
    scratch: the folder to use; None for one in the user's cache, which belongs to this workdir alone.
  Raises:
    UserError: it is no gs://BUCKET/FOLDER; or a scratch folder is given for an ordinary path.
  """
  if not text or not text.startswith("gs://"):
    if scratch is not None:
      raise UserError(
        "--scratch goes with --workdir=gs://BUCKET/FOLDER; an ordinary folder needs none"
      )
    return None
  url = text.rstrip("/")
  if not _BUCKET.fullmatch(url) or ".." in url:
    raise UserError(
      f"--workdir={_short(text)} must be gs://BUCKET/FOLDER, in letters, digits and ._=/-"
    )
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  default = os.path.join(home, "instructjax", *url.split("/")[2:])
  return url, default if scratch is None else scratch


def require_workdir(text: str | None, flag: str = "--workdir") -> pathlib.Path:
  """The folder of a run, absolute. It need not exist, but it must be possible to make it and to write in it.

  Args:
    text: the path.
    flag: what gives it, for messages.
  Raises:
    UserError: it is not.
  """
  if not text or not text.strip():
    raise UserError(f"{flag} must have a value, as runs/demo: the folder of this run")
  spelled = f"{flag}={_short(text)}"
  try:
    path = pathlib.Path(expand(text, flag)).resolve()
    existing = next(one for one in (path, *path.parents) if os.path.lexists(one))
    existing.stat()
  except RuntimeError:  # resolve() in Python 3.11 and 3.12
    raise UserError(f"{spelled} is a loop of symbolic links") from None
  except OSError as error:
    is_loop = error.errno == errno.ELOOP
    reason = "it is a loop of symbolic links" if is_loop else error.strerror
    raise UserError(f"{spelled} cannot be a run's folder: {reason}") from None
  if not existing.is_dir():
    raise UserError(f"{spelled} must be a folder, and {existing} is a file (Not a directory)")
  if not os.access(existing, os.W_OK | os.X_OK):
    raise UserError(f"{spelled} cannot be written: you may not write in {existing}")
  return path


def package_folder(name: str) -> pathlib.Path | None:
  """Where an installed Python package lies; nothing of it is run. None if there is none of this name."""
  spec = importlib.util.find_spec(name)
  if spec is None or not spec.submodule_search_locations:
    return None
  return pathlib.Path(spec.submodule_search_locations[0]).absolute()


def _short(text: str) -> str:
  shown = "".join(c if c.isprintable() else "?" for c in text[: _SHOWN + 1])
  return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
