"""Frozen dataclasses from nested dicts, with every value checked: what is made of config.py's blocks.

Called by config.py, and by context.py for what makes two runs of a stage the same. Knows no field: types come from the
dataclasses' hints, rules from their `validate(where)`, and which fields a resumed run may change from their metadata.
"""

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from instructjax.core.errors import UserError

_Block = TypeVar("_Block")

# Metadata of fields that may change while a run is stopped: they move numbers by rounding, or do not touch them.
ROUNDING = types.MappingProxyType({"on_resume": "rounding"})
SAME_NUMBERS = types.MappingProxyType({"on_resume": "same numbers"})


def determining(block: Any) -> dict[str, Any]:
  """The fields that decide a block's numbers, as plain values: all but those that may change on resume."""
  result = {}
  for field in dataclasses.fields(block):
    value = getattr(block, field.name)
    if "on_resume" not in field.metadata:
      result[field.name] = determining(value) if dataclasses.is_dataclass(value) else value
  return result


def marked(block: Any, metadata: Mapping) -> dict[str, Any]:
  """The fields marked with `metadata`, ROUNDING or SAME_NUMBERS."""
  fields = dataclasses.fields(block)
  return {field.name: getattr(block, field.name) for field in fields if field.metadata == metadata}


def require_positive(block: Any, where: str, *names: str):
  """Raises UserError where one of the block's fields is not above 0; `where` is the block's path in the config."""
  for name in names:
    value = getattr(block, name)
    require(value > 0, f"{where}.{name}={value} must be positive")


def require(condition: bool, message: str):
  """Raises UserError(message) where the condition does not hold."""
  if not condition:
    raise UserError(message)


def validate(block: Any, where: str):
  """Applies the rules of a block, after those of the blocks inside it."""
  for field in dataclasses.fields(block):
    value = getattr(block, field.name)
    if dataclasses.is_dataclass(value):
      validate(value, f"{where}.{field.name}")
  if hasattr(block, "validate"):
    block.validate(where)


def build(cls: type[_Block], values: dict, where: str) -> _Block:
  """The dataclass with these values, its blocks built likewise.

  Raises:
    UserError: a field is unknown (with the nearest known ones), missing or of the wrong type.
  """
  return _build(cls, values, where, [f"{where}.{name}" for name in leaves(cls)])


def leaves(cls, where: str = "") -> Iterator[str]:
  """Dotted names of all fields of a dataclass that are no blocks themselves."""
  for name, hint in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint):
      yield from leaves(hint, f"{where}{name}.")
    else:
      yield where + name


def nearest(name: str, known: list[str], limit: int = 3) -> list[str]:
  """The known dotted names that somebody may have meant, the likeliest first.

  A field of this very name in another block counts more than one that is spelt alike: a level is forgotten, or one too
  many is given, more often than a letter. Of several, those that share most of the path are taken.
  """
  *path, field = name.split(".")
  same = [one for one in known if one.split(".")[-1] == field]
  closest = max((_shared(path, one) for one in same), default=None)
  same = [one for one in same if _shared(path, one) == closest]
  if same:
    return same[:limit]
  siblings = {
    one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == ".".join(path)
  }
  close = difflib.get_close_matches(field, siblings, n=1)
  return [siblings[one] for one in close] or difflib.get_close_matches(name, known, n=1, cutoff=0.7)


def _shared(path: list[str], name: str) -> tuple[int, int]:
  """How much of a path a dotted name has: blocks from the outermost on, then blocks anywhere."""
  blocks = name.split(".")[:-1]
  pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path, blocks))
  return len(list(pairs)), len(set(path) & set(blocks))


def _build(cls: type[_Block], values: dict, where: str, known: list[str]) -> _Block:
  """`build`; known: dotted names of all fields of the outermost dataclass."""
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      near = nearest(f"{where}.{name}", known)
      hint = f"did you mean {' or '.join(near)}?" if near else f"known fields: {', '.join(hints)}"
      raise UserError(f"{where}.{name} is not a config field; {hint}")
  missing = [name for name in hints if name not in values]
  require(not missing, f"{where} lacks {', '.join(missing)}; add them to the config file")
  return cls(
    **{name: _convert(hint, values[name], f"{where}.{name}", known) for name, hint in hints.items()}
  )


def _convert(hint, value: Any, where: str, known: list[str]):
  """The value as the field's type, or a UserError that says what the field takes."""
  if dataclasses.is_dataclass(hint):
    require(isinstance(value, dict), f"{where}={value!r} must be a block of fields")
    return _build(hint, value, where, known)
  origin, options = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    require(value in options, f"{where}={value!r} must be one of {', '.join(map(repr, options))}")
    return value
  if origin is types.UnionType:
    return None if value is None else _convert(options[0], value, where, known)
  if origin is tuple:
    require(
      isinstance(value, (tuple, list)),
      f"{where}={value!r} must be a tuple of {options[0].__name__}",
    )
    return tuple(_convert(options[0], item, f"{where}[{i}]", known) for i, item in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
  require(right, f"{where}={value!r} must be of type {hint.__name__}, got {type(value).__name__}")
  return value
