"""Builds frozen dataclasses from nested dicts and checks every value.

config.py uses it to build the configuration. context.py uses it to decide whether two runs of a stage are the same run.

No field is named here. Types come from the dataclasses' type hints. Rules come from their `validate(where)` methods,
which raise UserError. The metadata of a field says whether a resumed run may change it.
"""

import dataclasses
import difflib
import itertools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from instructjax.core.errors import UserError

_Block = TypeVar("_Block")

# Metadata of fields that a user may change before resuming a run. A ROUNDING field changes results by rounding error
# only. A SAME_NUMBERS field does not change them at all.
ROUNDING = types.MappingProxyType({"on_resume": "rounding"})
SAME_NUMBERS = types.MappingProxyType({"on_resume": "same numbers"})
# Metadata of text fields that name a place on the machine: a file or folder, weights (also hf://ORG/NAME), or a source
# of records (SCHEME:PATH). The places may differ between the hosts of a run, and what lies there may not.
FILE = types.MappingProxyType({"path": "file"})
WEIGHTS = types.MappingProxyType({"path": "weights"})
SOURCE = types.MappingProxyType({"path": "source"})
# Metadata of whole numbers that may need 63 bits. All others fit in 31, as the arrays do which hold them.
WIDE = types.MappingProxyType({"bits": 63})

# The float32 numbers between which a number of the config must lie in size, unless it is 0: arithmetic on the devices
# makes 0 of smaller ones, and infinity of larger ones.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38


def determining(block: Any) -> dict[str, Any]:
  """The fields that determine a block's results, as nested plain values.

  Fields that may change on resume are left out, so two runs with equal values can continue from each other.
  """
  result = {}
  for field in dataclasses.fields(block):
    value = getattr(block, field.name)
    if "on_resume" not in field.metadata:
      result[field.name] = determining(value) if dataclasses.is_dataclass(value) else value
  return result


def marked(block: Any, metadata: Mapping) -> dict[str, Any]:
  """The block's own fields that carry this metadata.

  Args:
    block: a config dataclass.
    metadata: ROUNDING or SAME_NUMBERS.
  """
  fields = dataclasses.fields(block)
  return {
    field.name: getattr(block, field.name)
    for field in fields
    if metadata.items() <= field.metadata.items()
  }


def require_positive(block: Any, where: str, *names: str):
  """Checks that fields are greater than 0.

  Args:
    block: a config dataclass.
    where: the block's path in the config, for the message.
    *names: the fields to check.
  Raises:
    UserError: a field is 0 or negative.
  """
  for name in names:
    value = getattr(block, name)
    require(value > 0, f"{where}.{name}={value} must be positive")


def require(condition: bool, message: str):
  """Checks a condition that the user is responsible for.

  Raises:
    UserError: the condition is false; the error carries `message`.
  """
  if not condition:
    raise UserError(message)


def validate(block: Any, where: str):
  """Checks a block and all blocks inside it.

  Raises:
    UserError: a value breaks a rule.
  """
  # Inner blocks go first: the rules of an outer block may rely on valid values inside it.
  for field in dataclasses.fields(block):
    value = getattr(block, field.name)
    if dataclasses.is_dataclass(value):
      validate(value, f"{where}.{field.name}")
  if hasattr(block, "validate"):
    block.validate(where)


def build(cls: type[_Block], values: dict, where: str) -> _Block:
  """Builds a dataclass, and the dataclasses nested inside it, from a nested dict.

  Args:
    cls: the dataclass to build.
    values: field name -> value; a nested dataclass is given as a dict.
    where: the block's path in the config, for messages.
  Raises:
    UserError: a field is unknown (with the nearest known ones), missing or of the wrong type.
  """
  return _build(cls, values, where, [f"{where}.{name}" for name in leaves(cls)])


def leaves(cls, where: str = "") -> Iterator[str]:
  """Dotted names of all fields, at any depth, that hold a value rather than a block."""
  for name, hint in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint):
      yield from leaves(hint, f"{where}{name}.")
    else:
      yield where + name


def nearest(name: str, known: list[str], limit: int = 3) -> list[str]:
  """Suggests known dotted names for an unknown one, best first.

  A field with the same name in another block is preferred over one with a similar spelling, because users more often
  omit or add a level of the path than misspell a field. Among several such fields, the ones whose paths are most
  similar are returned.
  """
  *path, field = name.split(".")
  same = [one for one in known if one.split(".")[-1] == field]
  closest = max((_shared(path, one) for one in same), default=None)
  same = [one for one in same if _shared(path, one) == closest]
  if same:
    return same[:limit]
  # Otherwise assume a misspelt field in the right block; only then a misspelt block.
  siblings = {
    one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == ".".join(path)
  }
  close = difflib.get_close_matches(field, siblings, n=1)
  return [siblings[one] for one in close] or difflib.get_close_matches(name, known, n=1, cutoff=0.7)


def _shared(path: list[str], name: str) -> tuple[int, int]:
  """How similar a dotted name's path is to `path`, as a sort key.

  The first number counts equal leading blocks. The second, which breaks ties, counts shared blocks at any position.
  """
  blocks = name.split(".")[:-1]
  pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path, blocks))
  return len(list(pairs)), len(set(path) & set(blocks))


def _build(cls: type[_Block], values: dict, where: str, known: list[str]) -> _Block:
  """`build` for one level; `known` holds the dotted names of all fields of the outermost dataclass."""
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      # The suggestion may be in another block, so it is searched among all fields of the config.
      near = nearest(f"{where}.{name}", known)
      hint = f"did you mean {' or '.join(near)}?" if near else f"known fields: {', '.join(hints)}"
      raise UserError(f"{where}.{name} is not a config field; {hint}")
  missing = [name for name in hints if name not in values]
  require(not missing, f"{where} lacks {', '.join(missing)}; add them to the config file")
  fields: Any = dataclasses.fields(cls)  # pyrefly: ignore[bad-argument-type]  a block is a dataclass
  metadata = {field.name: field.metadata for field in fields}
  return cls(
    **{
      name: _convert(hint, values[name], f"{where}.{name}", known, metadata[name])
      for name, hint in hints.items()
    }
  )


def _convert(hint, value: Any, where: str, known: list[str], metadata: Mapping):
  """Converts a value to the type that a field's hint asks for.

  Raises:
    UserError: the value has another type, or is a number that no field may have; the message says what the field
      accepts.
  """
  if dataclasses.is_dataclass(hint):
    require(isinstance(value, dict), f"{where}={_quoted(value)} must be a block of fields")
    return _build(hint, value, where, known)
  origin, options = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    is_one = isinstance(value, str) and value in options
    require(is_one, f"{where}={_quoted(value)} must be one of {', '.join(map(repr, options))}")
    return value
  if origin is types.UnionType:  # the only unions in the config are `T | None`
    return None if value is None else _convert(options[0], value, where, known, metadata)
  if origin is tuple:
    require(
      isinstance(value, (tuple, list)),
      f"{where}={_quoted(value)} must be a tuple of {options[0].__name__}",
    )
    return tuple(
      _convert(options[0], item, f"{where}[{i}]", known, metadata) for i, item in enumerate(value)
    )
  # A config or flag may write 0 or 1 for a float.
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    require(abs(value) <= _LARGEST, f"{where}={_quoted(value)} must be a number of float32")
    value = float(value)
  # bool is a subclass of int in Python, and True is not a size.
  right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
  require(
    right, f"{where}={_quoted(value)} must be of type {hint.__name__}, got {type(value).__name__}"
  )
  _require_number(value, where, metadata)
  return value


def _require_number(value: Any, where: str, metadata: Mapping):
  """Checks what holds for every number of a config: it is finite, and the devices can hold it."""
  if isinstance(value, float):
    require(math.isfinite(value), f"{where}={value} must be a finite number")
    require(
      value == 0 or _SMALLEST <= abs(value) <= _LARGEST,
      f"{where}={value} must be 0 or a number of float32, from {_SMALLEST} to {_LARGEST} in size",
    )
  if isinstance(value, int) and not isinstance(value, bool) and "bits" not in metadata:
    require(
      -(2**31) <= value < 2**31,
      f"{where}={_quoted(value)} must be a whole number of 32 bits, below 2**31",
    )


def _quoted(value: Any) -> str:
  """A value for a message, as Python writes it, cut to a part of a line."""
  if isinstance(value, int) and abs(value) >= 10**80:  # Python refuses to spell very long ones
    return f"about 2**{value.bit_length() - 1}"
  try:
    text = repr(value)
  except ValueError:  # such an int is inside
    return f"a {type(value).__name__}"
  text = text if text.isprintable() else ascii(value)
  return text if len(text) <= 80 else text[:80] + "..."
