"""The points of a sweep: from the flags `--sweep=FIELD=VALUE,VALUE` and `--seeds=0,1,2` to names and configs.

Called by main. Pure functions; nothing is read or trained.
"""

import ast
import copy
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instructjax.core.blocks import leaves, nearest
from instructjax.core.config import Config, from_config_dict
from instructjax.core.errors import UserError
from instructjax.core.foreign import named

RECORD = "point.json"  # in a point's folder: its values, and which settings each of its stages was made with
_MOST = 1000  # points of a sweep
_LONGEST = 40  # letters of a value in a folder's name
_BRACKETS = {"(": ")", "[": "]"}
_LABELS = ("preset", "stage")


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.

  Attributes:
    name: of its folder, such as `ppo.beta_0.05-seed_1`.
    values: swept field, by its dotted name -> its value here.
    config: the run's.
  """

  name: str
  values: Mapping[str, Any]
  config: Config


def points(sweeps: Sequence[str], seeds: str | None, base: Mapping[str, Any]) -> list[Point]:
  """All combinations of the swept values, the last flag's values varying fastest, and seeds slowest.

  With seeds slowest, the points of a seed follow one another, and the first has trained what the others reuse.

  Args:
    sweeps: of the form FIELD=VALUE,VALUE.
    seeds: of the form 0,1,2; None for the config's seed.
    base: the config as a nested dict, which the points change.
  Raises:
    UserError: a field is unknown, or a value is no value of it or breaks a rule; the message names the point.
  """
  axes = [_axis(text, base) for text in sweeps]
  if seeds is not None:
    axes.insert(0, _axis(f"seed={seeds}", base, "--seeds"))
  names = [field for field, _ in axes]
  for name in names:
    if names.count(name) > 1:
      both = " and --seeds" if name == "seed" and seeds is not None else ""
      raise UserError(f"--sweep={name}{both} is given twice; give all its values in one flag")
  count = 1
  for _, values in axes:
    count *= len(values)
  if count > _MOST:
    raise UserError(f"--sweep asks for {count} points, where at most {_MOST} are run in one sweep")
  result = []
  for chosen in itertools.product(*(values for _, values in axes)):
    values = dict(zip(names, chosen))
    name = _name(values)
    try:
      result.append(Point(name, values, _config(base, values)))
    except UserError as error:
      raise UserError(f"point {name} of the sweep: {error}") from error
  return result


def _axis(text: str, base: Mapping[str, Any], flag: str = "--sweep") -> tuple[str, list[Any]]:
  field, equals, rest = text.partition("=")
  if not equals or not field:
    raise UserError(
      f"{flag}={named(text)} must be of the form FIELD=VALUE,VALUE, as ppo.beta=0,.05"
    )
  known = list(leaves(Config))
  if field not in known:
    near = nearest(field, known)
    hint = f"did you mean {' or '.join(near)}?" if near else "--settings lists them"
    raise UserError(f"{flag} has no field {named(field)}; {hint}")
  if field in _LABELS:
    raise UserError(f"{flag}={field} cannot be swept: run each {field} in a --workdir of its own")
  present = _at(base, field)
  where = f"{flag}={rest}" if flag == "--seeds" else f"{flag}={text}"
  texts = _split(rest)
  if not all(texts):
    raise UserError(f"{named(where)} has an empty value")
  values = [_value(one, present, where) for one in texts]
  for value in values:
    if values.count(value) > 1:
      raise UserError(f"{named(where)} has the value {named(str(value))} twice")
  return field, values


def _split(text: str) -> list[str]:
  """The parts between commas that are in no bracket."""
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in _BRACKETS) - (letter in _BRACKETS.values())
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return [part.strip() for part in parts]


def _value(text: str, present: Any, where: str) -> Any:
  """A value of the kind that the config has at present; whether it is allowed is checked with the whole config."""
  if isinstance(present, str):
    return text
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    pass
  if isinstance(present, list | tuple) and text[:1] in _BRACKETS:
    return tuple(part for part in _split(text[1:-1]) if part)
  raise UserError(
    f"{named(where)}: {named(text)} is no value of it; it is {named(str(present))} now"
  )


def _at(base: Mapping[str, Any], field: str) -> Any:
  result: Any = base
  for part in field.split("."):
    result = result[part]
  return result


def _config(base: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
  changed = copy.deepcopy(dict(base))
  for field, value in values.items():
    *blocks, last = field.split(".")
    block = changed
    for part in blocks:
      block = block[part]
    block[last] = value
  return from_config_dict(changed)


def _name(values: Mapping[str, Any]) -> str:
  """A folder's name; the seed comes last. It has neither `=` nor a comma, which other flags separate paths with."""
  ordered = sorted(values.items(), key=lambda item: item[0] == "seed")
  return "-".join(f"{field}_{_slug(value)}" for field, value in ordered)


def _slug(value: Any) -> str:
  text = f"{value:g}" if isinstance(value, float) else str(value)
  if isinstance(value, float) and float(text) != value:
    text = repr(value)
  slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_.")[-_LONGEST:]
  # Two values may look alike once odd letters are gone.
  return slug if slug == text else f"{slug}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
