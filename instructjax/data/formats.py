"""Published formats of rows: which one a row has, and its values under the keys that `records.parse_record` expects.

Called by `sources`, and by `readers` for the columns of a table. docs/data.md shows every format. A source may name the
format, `?format=alpaca`, or where its values are, `?prompt=question&response=answer`; otherwise the keys decide.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from instructjax.core.errors import UserError
from instructjax.data import annotations, dialogues
from instructjax.data.messages import BadRecord, kind_of, listed, quoted
from instructjax.data.ranking import is_score
from instructjax.data.records import KEYS

OWN = "own"
# What a source may name beside a format that does not say it.
_NAMED = {"argilla": ("prompt", "ranks"), "label_studio": ("prompt",)}
_OPTIONS = re.compile(r"(?P<path>.+?)\?(?P<options>[a-z_]+=[^?]*)", re.DOTALL)
_UNKNOWN_COLUMNS = re.compile(r"\.responses|.+-suggestion")  # of annotation tools

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
  """What stands behind the `?` of a source.

  Attributes:
    format: name of one of FORMATS, or OWN; None if the keys decide.
    columns: key of a record -> where its value is: a key, a path such as `answers.0.text`, or several with commas.
    other: options of the scheme itself, such as data_dir.
  """

  format: str | None
  columns: Mapping[str, str]
  other: Mapping[str, str]


def split_options(
  rest: str, where: str, kind: str | None, own: Sequence[str]
) -> tuple[str, Options]:
  """Splits PATH[?OPTION=VALUE[&...]] into the path and the options.

  Args:
    rest: the part of a source after `SCHEME:`.
    where: the field and its value, for messages.
    kind: one of records.KINDS; None for any of them.
    own: names of the scheme's own options.
  Raises:
    UserError: an option is not known, or its value is not.
  """
  match = _OPTIONS.fullmatch(rest)
  if not match or os.path.lexists(rest):
    return rest, Options(None, {}, {})
  pairs = [part.partition("=") for part in match["options"].split("&")]
  given = {name: value for name, _, value in pairs}
  keys = [key for of, keys in KEYS.items() if kind in (of, None) for key in keys]
  known = ("format", *dict.fromkeys(keys), *own)
  for name, value in given.items():
    if name not in known or not value:
      raise UserError(
        f"{where}: {quoted(name, 40)} must be one of {', '.join(known)}, and must have a value"
      )
  if len(given) < len(pairs):
    raise UserError(f"{where} names an option twice")
  chosen = given.pop("format", None)
  names = [OWN, *(name for name, form in FORMATS.items() if kind in (None, *form.kinds))]
  if chosen is not None and chosen not in names:
    raise UserError(
      f"{where}: format={quoted(chosen, 40)} of {kind} must be one of {', '.join(names)}"
    )
  columns = {name: value for name, value in given.items() if name not in own}
  fixed = [name for name in columns if name not in _NAMED.get(chosen or OWN, ())]
  if chosen not in (None, OWN) and fixed:
    raise UserError(f"{where}: format={chosen!r} says itself where {fixed[0]!r} is; leave one out")
  return match["path"], Options(chosen, columns, {n: v for n, v in given.items() if n in own})


@dataclasses.dataclass(frozen=True)
class Format:
  """A format of rows.

  Attributes:
    kinds: the kinds of record that a row can become.
    needs: keys that a row must have.
    also: further keys that are read where they are there; None for all keys.
    convert: (row, kind, options' columns, place) -> rows with the keys of `records`.
    is_row: whether a row that has the keys is of this format.
  """

  kinds: tuple[str, ...]
  needs: tuple[str, ...]
  also: tuple[str, ...] | None
  convert: Callable[[Row, str, Mapping[str, str], str], list[Row]]
  is_row: Callable[[Row], bool] = lambda row: True


def convert(obj: Any, kind: str, where: str, options: Options) -> tuple[str, list[Row]]:
  """(the format's name, the rows) of a decoded row. A row holds several records where several annotators ranked it.

  Raises:
    BadRecord: the keys are those of no known format, or of several; or the row does not hold what its format asks for.
  """
  if not isinstance(obj, dict):
    raise BadRecord(f"{where}: must be a JSON object, got {kind_of(obj)}")
  row = {key: value for key, value in obj.items() if value is not None}
  name = options.format
  if name is None and options.columns:
    name = OWN
  if name is None:
    name = recognise(row, kind, where)
  if name == OWN:
    return OWN, [_mapped(row, options.columns, where) if options.columns else obj]
  form = FORMATS[name]
  if not row.keys() >= set(form.needs):
    needs = " and ".join(form.needs)
    raise BadRecord(
      f"{where}: needs {needs}, as format {name} (keys found: {listed(obj) or 'none'})"
    )
  return name, form.convert(row, kind, options.columns, where)


def recognise(row: Row, kind: str, where: str) -> str:
  """The name of the format that a row's keys and values show.

  Raises:
    BadRecord: it is none of the known ones, or it may be one or another.
  """
  if _is_own(row, kind):
    return OWN
  names = [
    name
    for name, form in FORMATS.items()
    if kind in form.kinds and row.keys() >= set(form.needs) and form.is_row(row)
  ]
  if len(names) > 1:
    raise BadRecord(
      f"{where}: may be {' or '.join(names)}; name one in the source: ?format={names[0]}"
    )
  if names:
    return names[0]
  first = _OWN_KEYS[kind][0][0]
  if not row or row.keys() & set(KEYS[kind]):
    return OWN  # with something missing, which `records` names
  is_list = lambda value: isinstance(value, list) and value and isinstance(value[0], dict)
  inner = [key for key, value in row.items() if is_list(value)]
  rows = f"; if the rows are under {listed(inner[:1])}, write that list to a file" if inner else ""
  raise BadRecord(
    f"{where}: {first!r} is missing (keys found: {listed(row)}); formats of {kind}:"
    f" {known(kind)}; or {_hint(kind)}{rows}"
  )


def known(kind: str) -> str:
  """The keys of the known formats of a kind, for messages."""
  own = [f"{OWN} ({'+'.join(keys)})" for keys in _OWN_KEYS[kind]]
  forms = [
    f"{name} ({'+'.join(form.needs)})" if form.needs else name
    for name, form in FORMATS.items()
    if kind in form.kinds
  ]
  return ", ".join(own + forms)


def columns(names: Sequence[str], kind: str, where: str, options: Options) -> list[str]:
  """The columns of a table that rows of this kind need.

  Other columns are not read: they may hold large images, or types that have no equivalent in Python.

  Raises:
    UserError: there are none.
  """
  wanted: set[str] = set()
  forms = [
    form for name, form in FORMATS.items() if kind in form.kinds and options.format in (None, name)
  ]
  if options.columns:
    # A whole name first, because names may hold dots and commas.
    for path in options.columns.values():
      wanted |= {path} if path in names else {part.partition(".")[0] for part in path.split(",")}
  if options.format in (None, OWN) and not options.columns:
    wanted |= set(KEYS[kind])
  if not options.columns or options.format:
    for form in forms:
      if set(form.needs) <= set(names) and (
        form.needs or options.format or any(map(_UNKNOWN_COLUMNS.search, names))
      ):
        wanted |= set(names) if form.also is None else {*form.needs, *form.also}
  found = [name for name in names if name in wanted]
  if not found:
    raise UserError(
      f"{where}: has no column of {kind} ({', '.join(KEYS[kind])}), only {', '.join(names) or 'none'}; {_hint(kind)}"
    )
  return found


def _hint(kind: str) -> str:
  keys = _OWN_KEYS[kind][0]
  return "name them in the source: ?" + "&".join(f"{key}=KEY" for key in keys)


# Sets of keys of which a row needs one. The first stands for the kind in messages.
_OWN_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
  "documents": (("text",),),
  "prompts": (("prompt",), ("messages",)),
  "demonstrations": (("prompt", "response"), ("messages",)),
  "comparisons": (
    ("prompt", "responses", "ranks"),
    ("responses", "comparisons"),
    ("responses", "scores"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "response", "score"),
  ),
}


def _is_own(row: Row, kind: str) -> bool:
  if any(row.keys() >= set(keys) for keys in _OWN_KEYS[kind]):
    return True
  # Whole chats hold their prompt. A string may be JSON text of one.
  is_chat = lambda value: (
    isinstance(value, list) or (isinstance(value, str) and value.lstrip()[:1] == "[")
  )
  return kind == "comparisons" and all(is_chat(row.get(key)) for key in ("chosen", "rejected"))


def _mapped(row: Row, columns: Mapping[str, str], where: str) -> Row:
  result = {}
  for key, path in columns.items():
    if path in row:
      result[key] = row[path]
    elif "," in path:
      result[key] = [_at(row, part, key, where) for part in path.split(",")]
    else:
      result[key] = _at(row, path, key, where)
  return result


def _at(row: Row, path: str, key: str, where: str) -> Any:
  value: Any = row
  for part in (path,) if path in row else path.split("."):
    if isinstance(value, dict) and part in value:
      value = value[part]
    elif isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
      value = value[int(part)]
    else:
      raise BadRecord(
        f"{where}: {key!r} is read from {quoted(path, 80)}, which is missing (keys found: {listed(row) or 'none'})"
      )
  return value


def _joined(first: str, second: str, answer: str) -> Callable[[Row, str, Mapping, str], list[Row]]:
  """A converter for an instruction with an optional input: both with a blank line after them, and the answer."""

  def convert_(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
    parts = [row[first], row.get(second, "")]
    for name, part in zip((first, second), parts, strict=True):
      if not isinstance(part, str):
        raise BadRecord(f"{where}: {name!r} must be a string, got {kind_of(part)}")
    if not parts[0].strip():
      raise BadRecord(f"{where}: {first!r} is empty")
    prompt = "".join(part.rstrip() + "\n\n" for part in parts if part.strip())
    return [
      {"prompt": prompt} if kind == "prompts" else {"prompt": prompt, "response": row.get(answer)}
    ]

  return convert_


def _completion(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  return [{"prompt": row["prompt"], "response": row["completion"]}]


def _conversations(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  found = row["conversations"] if "conversations" in row else row["conversation"]
  if isinstance(found, list) and isinstance(row.get("system"), str) and row["system"].strip():
    found = [{"role": "system", "content": row["system"]}, *found]
  return [{"messages": found}]


def _hh(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  return [dialogues.convert(row, kind, where)]


def _completions(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  """NeMo-RL's and UltraFeedback's: a list of answers, each with its rank from 0, or with its score."""
  prompt = row["context"] if "context" in row else row["instruction"]
  if kind == "prompts":
    return [{"prompt": prompt}]
  given = row["completions"]
  if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
    raise BadRecord(f"{where}: 'completions' must be a list of objects")
  text = "completion" if "context" in row else "response"
  names = ("rank",) if "context" in row else ("overall_score", "fine-grained_score", "score")
  name = next(
    (name for name in names if all(item.get(name) is not None for item in given)), names[0]
  )
  values = [item.get(name) for item in given]
  if not all(map(is_score, values)) or not all(text in item for item in given):
    raise BadRecord(
      f"{where}: each of 'completions' must have {text!r} and a number under {name!r}"
    )
  # Of ranks less is better, and they may begin at 0.
  scores = [-value for value in values] if name == "rank" else values
  return [{"prompt": prompt, "responses": [item[text] for item in given], "scores": scores}]


def _helpsteer(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  return [{"prompt": row["prompt"], "response": row["response"], "score": row["helpfulness"]}]


def _preference(prompt: str, first: str, second: str, strength: str):
  """A converter for two answers and a number: below 0 the first is better, above 0 the second, 0 is a tie."""

  def convert_(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
    if kind == "prompts":
      return [{"prompt": row[prompt]}]
    if not is_score(row[strength]):
      raise BadRecord(f"{where}: {strength!r} must be a number")
    return [
      {
        "prompt": row[prompt],
        "responses": [row[first], row[second]],
        "scores": [-row[strength], row[strength]],
      }
    ]

  return convert_


def _openai_pair(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  given = row["input"]
  prompt = given.get("messages") if isinstance(given, dict) else given
  if kind == "prompts":
    return [{"prompt": prompt}]
  return [
    {"prompt": prompt, "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
  ]


def _argilla(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  return annotations.argilla(row, columns, where)


def _label_studio(row: Row, kind: str, columns: Mapping[str, str], where: str) -> list[Row]:
  return annotations.label_studio(row, columns, where)


_ASKED = ("prompts", "demonstrations")
_RANKED = ("prompts", "comparisons")

FORMATS: dict[str, Format] = {
  "completion": Format(("demonstrations",), ("prompt", "completion"), (), _completion),
  "alpaca": Format(
    _ASKED, ("instruction", "output"), ("input",), _joined("instruction", "input", "output")
  ),
  "dolly": Format(
    _ASKED, ("instruction", "response"), ("context",), _joined("instruction", "context", "response")
  ),
  "sharegpt": Format(_ASKED, ("conversations",), ("system",), _conversations),
  "conversation": Format(_ASKED, ("conversation",), ("system",), _conversations),
  "hh": Format(
    ("prompts", "demonstrations", "comparisons"),
    ("chosen", "rejected"),
    ("prompt", "labeler"),
    _hh,
    lambda row: (
      "prompt" not in row and all(dialogues.is_dialogue(row[key]) for key in ("chosen", "rejected"))
    ),
  ),
  "nemo_rl": Format(_RANKED, ("context", "completions"), (), _completions),
  "ultrafeedback": Format(_RANKED, ("instruction", "completions"), (), _completions),
  "helpsteer": Format(("comparisons",), ("prompt", "response", "helpfulness"), (), _helpsteer),
  "helpsteer2": Format(
    _RANKED,
    ("prompt", "response_1", "response_2", "preference_strength"),
    (),
    _preference("prompt", "response_1", "response_2", "preference_strength"),
  ),
  "helpsteer3": Format(
    _RANKED,
    ("context", "response1", "response2", "overall_preference"),
    (),
    _preference("context", "response1", "response2", "overall_preference"),
  ),
  "openai": Format(
    _RANKED, ("input", "preferred_output", "non_preferred_output"), (), _openai_pair
  ),
  "argilla": Format(("comparisons",), (), None, _argilla, annotations.is_argilla),
  "label_studio": Format(("comparisons",), (), None, _label_studio, annotations.is_label_studio),
}
