"""The cache of compiled programs in a workdir, which a resumed run starts from.

Called by main.py after the processes have joined. An entry is machine code that this process runs, so the cache is
used only in a folder that nobody else can write to.
"""

import os
import pathlib
import stat
import sys
import warnings

import jax
from jax._src import compilation_cache

_FOLDER = "compiled"
_SUFFIX = "-cache"  # of JAX's entries
_SECONDS = 0.5  # a program that takes less time to compile is not kept


def keep_programs(workdir: pathlib.Path):
  """Sets JAX's compilation cache to a folder of the workdir, or turns it off and says why in a line."""
  folder = workdir / _FOLDER
  why = _distrust(workdir) or _distrust(folder)
  if why:
    jax.config.update("jax_compilation_cache_dir", None)
    if jax.process_index() == 0:
      print(f"compiled programs are neither read nor kept: {why}", file=sys.stderr)
    return
  if jax.process_index() == 0:
    _drop_half_written(folder)
  # JAX warns if it cannot read or write an entry, because of a full disk for instance. It then compiles, so that
  # nothing is lost but time.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)


def _distrust(folder: pathlib.Path) -> str:
  """Why what lies in a folder may come from somebody else; '' if it cannot, or if there is no such folder yet."""
  try:
    status = os.stat(folder)
  except FileNotFoundError:
    return ""
  except OSError as error:
    return f"{folder} cannot be read ({error.strerror})"
  if status.st_uid != os.geteuid():
    return f"{folder} belongs to another user, whose programs would run under your name"
  if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
    return f"every user may write to {folder}, and their programs would run under your name"
  return ""


def _drop_half_written(folder: pathlib.Path):
  """Deletes entries that cannot be unpacked: JAX would complain of them at every start and never replace them."""
  for path in folder.glob(f"*{_SUFFIX}"):
    try:
      compilation_cache.decompress_executable(path.read_bytes())
    except Exception:  # the types depend on the library that unpacks
      path.unlink(missing_ok=True)
