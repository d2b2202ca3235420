"""A command's module with its own flags only, as in a process that runs no other command.

Commands define flags of the same names, and absl has one table of flags for the whole process, in which the tests of
many commands run.
"""

import contextlib
import importlib
import types
from collections.abc import Generator

from absl import flags

_OURS = ("instructjax", "launch")
_loaded: dict[str, dict[str, flags.Flag]] = {}  # module -> its flags, which it defines only once


@contextlib.contextmanager
def command(name: str) -> Generator[types.ModuleType]:
  """Imports a command's module; inside, the table holds the flags of absl and of that command alone."""
  values = flags.FLAGS
  before = {key: _copy(value) for key, value in vars(values).items()}
  for flag in list(values):
    if str(values.find_module_defining_flag(flag)).partition(".")[0] in _OURS:
      delattr(values, flag)
  others = set(values)
  try:
    for flag, known in _loaded.get(name, {}).items():
      values[flag] = known
    module = importlib.import_module(name)
    _loaded.setdefault(name, {flag: values[flag] for flag in values if flag not in others})
    values.mark_as_parsed()  # not parsed: some of its flags may be required
    yield module
  finally:
    vars(values).update(before)


def _copy(value):
  """A copy of a table, and of the lists in it."""
  if not isinstance(value, dict):
    return value
  return {key: list(x) if isinstance(x, list) else x for key, x in value.items()}
