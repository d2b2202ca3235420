"""Loads records from a source: a simulated task (`demo:`, `conversation:`), or the file formats of `readers`.

stages/run_data.py calls `load` and `render`, and stages/pipeline.py calls `load`. Imports `records`, `formats` and
`readers`, and a simulated task only if it is used.
"""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.data import formats
from instructjax.data.messages import listed, quoted
from instructjax.data.readers import READERS, Request
from instructjax.data.records import (
  KINDS,
  BadRecord,
  Chat,
  Demonstration,
  Document,
  Prompt,
  Ranking,
  Record,
  parse_record,
  parse_scored,
  ranking_of_scored,
)

logger = logging.getLogger(__name__)

_LISTED = 5  # reasons named in the log
_SIMULATED = tuple(spec.removesuffix(":") for spec in places.SIMULATED)
_SCHEMES = (*_SIMULATED, *READERS)
_KIND_OF: dict[type, str] = {
  Prompt: "prompts",
  Demonstration: "demonstrations",
  Ranking: "comparisons",
}

Split = Literal["train", "validation", "test", "all"]


def load(
  spec: str,
  kind: str,
  split: Split,
  *,
  seed: int,
  validation_fraction: float,
  on_bad_record: Literal["raise", "skip"],
  setting: str = "",
) -> Sequence[Record]:
  """Loads all records of one kind and split.

  If the source has no validation split, the hash of a record's prompt decides whether the record is held out. The
  choice is thus the same for every seed, machine and order of records, and all records with the same prompt are on the
  same side. For documents the whole text is hashed, and for chats the JSON of the messages, so that the choice does not
  depend on the chat template.

  Args:
    spec: `demo:` or `conversation:` for a simulated task, or `SCHEME:REST` with a scheme of `readers.READERS`.
      The readers' docstrings describe REST and the splits; `formats` describes the options that may end it.
    kind: one of records.KINDS.
    split: train, validation, test or all. Only simulated tasks have a test split; elsewhere test means validation. all
      means every record of the source.
    seed: used by simulated tasks only.
    validation_fraction: share of records to hold out, in (0, 1).
    on_bad_record: raise stops at the first bad record. skip drops bad records, and logs how many there were of each
      reason, and where the first one is.
    setting: what gave the spec, for messages, as `--data`; '' for the field data.KIND of the config.
  Raises:
    BadRecord: a record is bad, and on_bad_record is raise.
    UserError: the spec names no known scheme, the source cannot be read, or no records are left.
    ValueError: kind, split or on_bad_record is not one of those above.
  """
  setting = setting or f"data.{kind}"
  scheme, rest = _scheme(spec, setting)
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
  if split not in ("train", "validation", "test", "all"):
    raise ValueError(f"split={split!r} must be train, validation, test or all")
  if on_bad_record not in ("raise", "skip"):
    raise ValueError(f"on_bad_record={on_bad_record!r} must be raise or skip")
  if scheme in _SIMULATED:
    return _simulated(spec, kind, split, seed, setting)
  if split == "test":  # files have two splits only
    split = "validation"
  source, reader = f"{setting}={quoted(spec)}", READERS[scheme]
  path, options = formats.split_options(rest, source, kind, reader.options)
  if not path:
    raise UserError(f"{source} must name what to read after {scheme}:")
  if reader.format is not None:
    options = dataclasses.replace(options, format=reader.format)
  asked = Request(path, options, kind, split, source)
  rows, decode, has_own_split = reader.read(asked)
  decoded = ((where, lambda raw=raw, where=where: decode(raw, kind, where)) for where, raw in rows)
  records = _parse(decoded, asked, spec, on_bad_record)
  if has_own_split or split == "all":
    return records
  chosen = [
    record
    for record in records
    if _is_held_out(record, validation_fraction) == (split == "validation")
  ]
  if not chosen:
    prompts = len({_key(record) for record in records})
    same = f" (they have {prompts} different prompt{'s' * (prompts > 1)})"
    raise UserError(
      f"{source}: none of its {len(records)} records{same * (kind != 'documents')} fall in the {split} split"
      f" with data.validation_fraction={validation_fraction}; add records of other prompts, or change the fraction"
    )
  return chosen


def _simulated(spec: str, kind: str, split: Split, seed: int, setting: str) -> Sequence[Record]:
  if kind == "comparisons":
    raise UserError(
      f"{setting}={quoted(spec)} must name rankings that lie somewhere, as jsonl:FILE: those of a simulated task are"
      " made by a run's stage collect, in its folder"
    )
  if split == "all":
    raise UserError(
      f"{setting}={quoted(spec)} must name records of people, as jsonl:FILE: those of a simulated task are drawn"
    )
  return _task(_scheme(spec, setting)[0]).load(kind, split, seed)


def _scheme(spec: str, setting: str) -> tuple[str, str]:
  scheme, colon, rest = spec.partition(":")
  if not colon or scheme not in _SCHEMES:
    raise UserError(
      f"{setting}={quoted(spec)} must start with one of {', '.join(name + ':' for name in _SCHEMES)}"
    )
  return scheme, rest


def files(spec: str) -> list[str]:
  """The files that a source reads, in order; none for a simulated task.

  Args:
    spec: SCHEME:REST as in the config.
  Raises:
    Exception: of any type, if the source cannot be read; it comes from the library that reads it.
  """
  scheme, _, rest = spec.partition(":")
  if scheme in _SIMULATED:
    return []
  reader = READERS[scheme]
  return reader.files(*formats.split_options(rest, spec, None, reader.options))


def how(spec: str) -> str:
  """How a source is read: its spec without the place of its files. For a simulated task, what its records depend on.

  Raises:
    UserError: its options are not known.
  """
  scheme, _, rest = spec.partition(":")
  if scheme in _SIMULATED:
    return _task(scheme).checksum()
  reader = READERS[scheme]
  if reader.checksum is not None:
    return f"{scheme}:{reader.checksum(*formats.split_options(rest, spec, None, reader.options))}"
  place = reader.place(*formats.split_options(rest, spec, None, reader.options))
  return f"{scheme}:{rest.replace(place, '', 1) if place else rest}"


def render(
  records: Sequence[Record],
  render_all: Callable[[Sequence[Sequence[Mapping[str, str]]]], Iterable[str | UserError]],
  *,
  on_bad_record: Literal["raise", "skip"],
) -> Sequence[Record]:
  """Converts the chat prompts of records to text. Returns the same list if there are none.

  Args:
    records: records of one kind.
    render_all: converts lists of messages with role and content to text, with the tokenizer's chat template; gives
      an error for one that it refuses. It is called for chat prompts only, so plain prompts work with a tokenizer that
      has no template.
    on_bad_record: what to do with a prompt that is refused, as in `load`. A template may require that user and
      assistant take turns, and no message may contain a special token.

  Raises:
    UserError: a prompt was refused and on_bad_record is raise, or no record is left. The message has the kind of record
      and the prompt's number among `records`. Or the template itself cannot be used.
  """
  chats = [
    [{"role": role, "content": text} for role, text in record.prompt.messages]
    for record in records
    if not isinstance(record, Document) and isinstance(record.prompt, Chat)
  ]
  if not chats:
    return records
  name = f"data.{_KIND_OF[type(records[0])]}"
  rendered = []
  bad = _Skipped()
  texts = iter(render_all(chats))
  for number, record in enumerate(records, start=1):
    if not isinstance(record, Document) and isinstance(record.prompt, Chat):
      text = next(texts)
      if isinstance(text, UserError):
        where = f"{record.where}: " if record.where else ""
        reason = f"{where}chat prompt {number} cannot be made text: {text}"
        if on_bad_record == "raise":
          raise UserError(f"{name}: {reason}") from text
        bad.add(reason, str(text))
        continue
      record = dataclasses.replace(record, prompt=text)
    rendered.append(record)
  bad.warn(name, len(records))
  if not rendered:
    raise UserError(f"{name}: no record is left: {bad.first()}")
  return rendered


class _Skipped:
  """Counts what is left out, by reason."""

  def __init__(self):
    self._found: dict[str, list] = {}  # kind of reason -> [the first one's message, count]

  def add(self, message: str, reason: str):
    """Counts one record.

    Args:
      message: what is wrong with it and where.
      reason: what is wrong with it. Numbers and quoted names do not make another reason.
    """
    kind = re.sub(r"\d+", "0", reason)
    self._found.setdefault(kind, [message, 0])[1] += 1

  def count(self) -> int:
    return sum(count for _, count in self._found.values())

  def first(self) -> str:
    return next(iter(self._found.values()))[0]

  def warn(self, name: str, total: int):
    """Logs, in one line, how many records were skipped for each reason and where the first one is."""
    if not self._found:
      return
    reasons = sorted(self._found.values(), key=lambda found: -found[1])
    listed = [
      first if count == 1 else f"{first} (and {count - 1} more)"
      for first, count in reasons[:_LISTED]
    ]
    rest = sum(count for _, count in reasons[_LISTED:])
    more = f"; {rest} for other reasons" if rest else ""
    logger.warning(
      "%s: skipped %d of %d records: %s%s", name, self.count(), total, "; ".join(listed), more
    )


def simulation(spec: str) -> Any:
  """The module with the labelers and the gold score of a simulated task; None if `spec` is no such task.

  Where the gold score needs the run's base (`READS_BASE`), stages/judging.py makes it.
  """
  scheme, colon, _ = spec.partition(":")
  return _task(scheme) if colon and scheme in _SIMULATED else None


def _task(scheme: str) -> Any:
  # Imported here because runs on own data do not need them.
  if scheme == "demo":
    from instructjax.data import demo

    return demo
  from instructjax.data import conversation

  return conversation


def require_simulation(spec: str):
  """The labelers and the gold score of a simulated task.

  Raises:
    UserError: the records are not those of one.
  """
  found = simulation(spec)
  if found is None:
    raise UserError(
      f"simulated labelers know only the records of 'demo:' and 'conversation:', and these are {quoted(spec)}"
    )
  return found


def _parse(
  rows: Iterable[tuple[str, Callable[[], Any]]], asked: Request, spec: str, on_bad_record: str
) -> list[Record]:
  """The records of rows, each given as its place and a function that decodes it."""
  kind = asked.kind
  records: list[Record] = []
  bad = _Skipped()
  scored: dict[str | Chat, list[tuple[str, float, str]]] = {}  # prompt -> (answer, score, place)
  seen: set[str] = set()
  total = 0
  for where, decode in rows:
    total += 1
    try:
      obj = decode()
      name, parts = formats.convert(obj, kind, where, asked.options)
      is_news = asked.options.format is None and name not in (formats.OWN, *seen)
      if is_news and asked.split != "validation":  # which is read too, from the same file
        seen.add(name)
        logger.warning(
          "%s: %s is read as format %s (keys: %s)",
          asked.source.partition("=")[0],
          where,
          name,
          listed(obj),
        )
      if kind == "comparisons" and parts and parts[0].keys() >= {"response", "score"}:
        prompt, answer, score = parse_scored(parts[0], where)
        scored.setdefault(prompt, []).append((answer, score, where))
      else:
        records += [parse_record(kind, part, where) for part in parts]
    except BadRecord as error:
      if on_bad_record == "raise":
        raise
      bad.add(str(error), str(error).removeprefix(where))
  for prompt, answers in scored.items():
    if len(answers) > 1:
      records.append(ranking_of_scored(prompt, answers))
    else:
      bad.add(f"{answers[0][2]}: the only answer to its prompt", "the only answer to its prompt")
  bad.warn(spec, total)
  if not records:
    raise UserError(
      f"{asked.source} holds no records"
      + (f" but {bad.count()} bad ones: {bad.first()}" if bad.count() else "")
    )
  return records


def _key(record: Record) -> str:
  """What decides on which side of the split a record falls: its prompt, or a document's text."""
  text = record.text if isinstance(record, Document) else record.prompt
  if isinstance(text, Chat):
    return json.dumps(text.messages, ensure_ascii=False, separators=(",", ":"))
  return text


def _is_held_out(record: Record, fraction: float) -> bool:
  digest = hashlib.sha256(_key(record).encode()).digest()
  # The first 8 bytes are a uniform number below 2^64. Python's own hash() would differ from process to process.
  return int.from_bytes(digest[:8], "big") < fraction * 2**64
