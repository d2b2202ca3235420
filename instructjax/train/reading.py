"""Reads what a run wrote, and turns whatever a library raises over damaged files into one UserError.

Called by checkpoint.py, saved_state.py and finished.py.
"""

import contextlib
import functools
import gc
import logging
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging

from instructjax.core.errors import UserError, reason

_HANGING_READ = "_read_array_index_and_device_put"
_CLOSED_LOOP = "Event loop is closed"


def read(path: pathlib.Path, read_files: Callable[[], Any], *, advice: str) -> Any:
  """Returns `read_files()`.

  Args:
    path: what is read, for the message.
    read_files: reads it.
    advice: a sentence that says what to do if it cannot be read.
  Raises:
    UserError: it raised anything; the message names `path` and gives the library's reason and the advice.
  """
  with quiet_orbax(absl_logging.FATAL), warnings.catch_warnings():
    warnings.filterwarnings(
      "ignore", f"coroutine '{_HANGING_READ}' was never awaited", RuntimeWarning
    )
    try:
      return read_files()
    # Not narrower: orbax and tensorstore raise bare Exception for damaged files.
    except Exception as error:
      why = reason(error)
    # Reads that orbax left hanging complain when they are collected. Here the complaints are still silenced; `error`,
    # which holds on to those reads, is gone once the except clause has ended.
    gc.collect()
  raise UserError(f"cannot read {path}: {why}. {advice}")


@contextlib.contextmanager
def quiet_orbax(level: int):
  """Silences absl's log below `level`, because orbax writes about thirty lines for each save.

  It also silences complaints of hanging reads: when one array of many cannot be read, orbax 0.12 leaves the other reads
  hanging, and each of them complains at length when it is garbage-collected. Writes do the same, at once and later: see
  `silence_late_writes`.
  """
  hook, verbosity = sys.unraisablehook, absl_logging.get_verbosity()
  sys.unraisablehook = functools.partial(_pass_on, hook)
  absl_logging.set_verbosity(min(level, verbosity))
  # It reports each write beside the one whose error orbax raises.
  loop_log = logging.getLogger("asyncio")
  loop_level = loop_log.level
  loop_log.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    loop_log.setLevel(loop_level)
    sys.unraisablehook = hook
    absl_logging.set_verbosity(verbosity)


def silence_late_writes():
  """From here on, says nothing of writes that go on after orbax has given up a checkpoint.

  Where one write of many fails, orbax raises its error and leaves the others to tensorstore's threads. For seconds
  after, they tell their results to a loop that is closed, and orbax's own threads log what else has failed. Nothing
  says when the last of them has ended, so this is never undone; a run ends after a failed save.
  """
  hook = sys.unraisablehook
  if getattr(hook, "func", None) is not _pass_on:  # once is enough
    sys.unraisablehook = functools.partial(_pass_on, hook)
  absl_logging.get_absl_logger().addFilter(_is_not_orbax)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _pass_on(hook: Callable[[Any], Any], event: Any):
  """Passes an error that Python cannot raise on to a hook, unless it is of a read or write that orbax has given up."""
  if _HANGING_READ not in repr(event.object) and str(event.exc_value) != _CLOSED_LOOP:
    hook(event)


def _is_not_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in pathlib.Path(record.pathname).parts
