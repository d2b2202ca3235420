"""Reads --models=NAME=PATH,... of the commands `evaluate` and `rewards`, which call it. Imports nothing slow."""

import pathlib
import re
from collections.abc import Sequence

from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.core.foreign import named

# Names become parts of the names of files.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def parse(values: Sequence[str], example: str) -> dict[str, str]:
  """Name -> path of the models that --models names; a path alone is named by its last part.

  Args:
    values: of the flag.
    example: a value, for messages.
  Raises:
    UserError: there is none, one has no name or path, or a name is there twice.
  """
  result: dict[str, str] = {}
  for value in values:
    name, equals, path = value.partition("=")
    if not equals:
      name, path = pathlib.PurePath(value).name, value
    if not path or not _NAME.fullmatch(name):
      raise UserError(
        f"--models={named(value)} must be NAME=PATH, as in {example}; a name is of letters, digits, _, . and -"
      )
    if name in result:
      raise UserError(f"--models names {name} twice; give each model a name of its own")
    result[name] = places.require(path, "--models", places.WEIGHTS)
  if not result:
    raise UserError(f"--models must have a value, as in {example}")
  return result
