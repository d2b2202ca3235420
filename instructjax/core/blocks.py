"""Frozen dataclasses from nested dicts, with every value checked: what is made of config.py's blocks.

Called by config.py, and by context.py for what makes two runs of a stage the same. Knows no field: types come from the
dataclasses' hints, rules from their `validate(where)`, and which fields a resumed run may change from their metadata.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from instructjax.core.errors import UserError

# Metadata of fields that may change while a run is stopped: they move numbers by rounding, or do not touch them.
ROUNDING = types.MappingProxyType({"on_resume": "rounding"})
SAME_NUMBERS = types.MappingProxyType({"on_resume": "same numbers"})


def determining(block) -> dict[str, Any]:
  """The fields that decide a block's numbers, as plain values: all but those that may change on resume."""
  result = {}
  for field in dataclasses.fields(block):
    value = getattr(block, field.name)
    if "on_resume" not in field.metadata:
      result[field.name] = determining(value) if dataclasses.is_dataclass(value) else value
  return result


def marked(block, metadata: Mapping) -> dict[str, Any]:
  """The fields marked with `metadata`, ROUNDING or SAME_NUMBERS."""
  fields = dataclasses.fields(block)
  return {field.name: getattr(block, field.name) for field in fields if field.metadata == metadata}


def require_positive(block, where: str, *names: str):
  """Raises UserError where one of the block's fields is not above 0; `where` is the block's path in the config."""
  for name in names:
    value = getattr(block, name)
    require(value > 0, f"{where}.{name}={value} must be positive")


def require(condition: bool, message: str):
  """Raises UserError(message) where the condition does not hold."""
  if not condition:
    raise UserError(message)


def validate(block, where: str):
  """Applies the rules of a block, after those of the blocks inside it."""
  for field in dataclasses.fields(block):
    value = getattr(block, field.name)
    if dataclasses.is_dataclass(value):
      validate(value, f"{where}.{field.name}")
  if hasattr(block, "validate"):
    block.validate(where)


def build(cls, values: dict, where: str):
  """The dataclass with these values, its blocks built likewise.

  Raises:
    UserError: a field is unknown (with the nearest known one), missing or of the wrong type.
  """
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      near = difflib.get_close_matches(name, hints, n=1)
      suggestion = (
        f"; did you mean {where}.{near[0]}?" if near else f"; known fields: {', '.join(hints)}"
      )
      raise UserError(f"{where}.{name} is not a config field{suggestion}")
  missing = [name for name in hints if name not in values]
  require(not missing, f"{where} lacks {', '.join(missing)}; add them to the config file")
  return cls(
    **{name: _convert(hint, values[name], f"{where}.{name}") for name, hint in hints.items()}
  )


def _convert(hint, value: Any, where: str):
  """The value as the field's type, or a ValueError that says what the field takes."""
  if dataclasses.is_dataclass(hint):
    require(isinstance(value, dict), f"{where}={value!r} must be a block of fields")
    return build(hint, value, where)
  origin, options = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    require(value in options, f"{where}={value!r} must be one of {', '.join(map(repr, options))}")
    return value
  if origin is types.UnionType:
    return None if value is None else _convert(options[0], value, where)
  if origin is tuple:
    require(
      isinstance(value, (tuple, list)),
      f"{where}={value!r} must be a tuple of {options[0].__name__}",
    )
    return tuple(_convert(options[0], item, f"{where}[{i}]") for i, item in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
  require(right, f"{where}={value!r} must be of type {hint.__name__}, got {type(value).__name__}")
  return value
