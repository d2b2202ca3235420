"""The tasks of the evaluation, one file each. A file here with a `TASK` is a task of the file's name.

Adding one touches nothing else: docs/evaluation.md shows how.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from instructjax.evaluation.task import Task

# What --scorers may give: scorers of text that tasks are judged by.
JUDGES = ("toxicity", "truth", "info")


@functools.cache
def found() -> Mapping[str, Task]:
  """Name -> task, sorted by name."""
  names = sorted(info.name for info in pkgutil.iter_modules(__path__))
  return {name: importlib.import_module(f"{__name__}.{name}").TASK for name in names}
