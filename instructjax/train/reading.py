"""Reading what a run wrote: whatever damaged files make a library raise becomes one UserError.

Called by checkpoint.py and finished.py.
"""

import contextlib
import gc
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging

from instructjax.core.errors import UserError, reason

_HANGING_READ = "_read_array_index_and_device_put"


def read(path: pathlib.Path, read_files: Callable[[], Any]) -> Any:
  """read_files(), with whatever damaged files make it raise as one UserError."""
  with quiet_orbax(absl_logging.FATAL), warnings.catch_warnings():
    warnings.filterwarnings(
      "ignore", f"coroutine '{_HANGING_READ}' was never awaited", RuntimeWarning
    )
    try:
      return read_files()
    except Exception as error:  # orbax and tensorstore raise bare Exception for damaged files
      why = reason(error)
    gc.collect()  # hanging reads complain when they are collected: now, while nobody listens
  raise UserError(
    f"cannot read {path}: {why}. If it is damaged, delete it and run again: the run goes on from"
    " what was saved before."
  )


@contextlib.contextmanager
def quiet_orbax(level: int):
  """Lets absl log only at `level` and above: orbax has thirty lines to say about a save.

  When one array of many cannot be read, orbax 0.12 leaves the other reads hanging, and each
  complains at length when it is collected.
  """
  hook, verbosity = sys.unraisablehook, absl_logging.get_verbosity()
  sys.unraisablehook = lambda event: None if _HANGING_READ in repr(event.object) else hook(event)
  absl_logging.set_verbosity(min(level, verbosity))
  try:
    yield
  finally:
    sys.unraisablehook = hook
    absl_logging.set_verbosity(verbosity)
