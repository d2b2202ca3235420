"""Loads records from a source: the default preset (`demo:`), or the file formats of `readers`.

stages/run_data.py calls `load` and `render`, and stages/pipeline.py calls `load`. Imports `records` and `readers`, and
`demo` only if it is used.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from instructjax.core.errors import UserError
from instructjax.data.readers import READERS, Decode, Rows
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
)

logger = logging.getLogger(__name__)

_LISTED = 5  # bad records named in the log
_SCHEMES = ("demo", *READERS)
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
) -> Sequence[Record]:
  """Loads all records of one kind and split.

  If the source has no validation split, the hash of a record's prompt decides whether the record is held out. The
  choice is thus the same for every seed, machine and order of records, and all records with the same prompt are on the
  same side. For documents the whole text is hashed, and for chats the JSON of the messages, so that the choice does not
  depend on the chat template.

  Args:
    spec: `demo:` for the default preset, or `SCHEME:REST` with a scheme of `readers.READERS`. The readers' docstrings
      describe REST and the splits.
    kind: one of records.KINDS.
    split: train, validation, test or all. Only `demo:` has a test split; elsewhere test means validation. all means
      every record of the source.
    seed: used by `demo:` only.
    validation_fraction: share of records to hold out, in (0, 1).
    on_bad_record: raise stops at the first bad record. skip drops bad records, and logs their number and the places and
      reasons of the first few.
  Raises:
    BadRecord: a record is bad, and on_bad_record is raise.
    UserError: the spec names no known scheme, the source cannot be read, or no records are left.
    ValueError: kind, split or on_bad_record is not one of those above.
  """
  scheme, colon, rest = spec.partition(":")
  if not colon or scheme not in _SCHEMES:
    raise UserError(
      f"data.{kind}={spec!r} must start with one of {', '.join(name + ':' for name in _SCHEMES)}"
    )
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
  if split not in ("train", "validation", "test", "all"):
    raise ValueError(f"split={split!r} must be train, validation, test or all")
  if on_bad_record not in ("raise", "skip"):
    raise ValueError(f"on_bad_record={on_bad_record!r} must be raise or skip")
  if scheme == "demo":
    from instructjax.data import demo  # imported here because runs on own data do not need it

    return demo.load(kind, split, seed)
  if split == "test":  # files have two splits only
    split = "validation"
  rows, decode, has_own_split = READERS[scheme].read(rest, kind, split)
  records = _parse(rows, decode, spec, kind, on_bad_record)
  if has_own_split or split == "all":
    return records
  chosen = [
    record
    for record in records
    if _is_held_out(record, validation_fraction) == (split == "validation")
  ]
  if not chosen:
    raise UserError(
      f"data.{kind}={spec!r}: none of its {len(records)} records fall in the {split} split with"
      f" data.validation_fraction={validation_fraction}"
    )
  return chosen


def files(spec: str) -> list[str]:
  """The files that a source reads, in order; none for `demo:`.

  Args:
    spec: SCHEME:REST as in the config.
  Raises:
    Exception: of any type, if the source cannot be read; it comes from the library that reads it.
  """
  scheme, _, rest = spec.partition(":")
  return [] if scheme == "demo" else READERS[scheme].files(rest)


def how(spec: str) -> str:
  """How a source is read: its spec without the place of its files. For `demo:`, what its records depend on."""
  scheme, _, rest = spec.partition(":")
  if scheme == "demo":
    from instructjax.data import demo

    return demo.checksum()
  place = READERS[scheme].place(rest)
  return f"{scheme}:{rest.replace(place, '', 1) if place else rest}"


def render(
  records: Sequence[Record],
  render_chat: Callable[[Sequence[Mapping[str, str]]], str],
  *,
  on_bad_record: Literal["raise", "skip"],
) -> Sequence[Record]:
  """Converts the chat prompts of records to text. Returns the same list if there are none.

  Args:
    records: records of one kind.
    render_chat: converts messages with role and content to text, with the tokenizer's chat template. It is called for
      chat prompts only, so plain prompts work with a tokenizer that has no template.
    on_bad_record: what to do with a prompt that render_chat refuses, as in `load`. A template may require that user and
      assistant take turns, and no message may contain a special token.

  Raises:
    UserError: render_chat refused a prompt and on_bad_record is raise, or no record is left. The message has the kind
      of record and the prompt's number among `records`.
  """
  if not any(_is_chat(record) for record in records):
    return records
  name = f"data.{_KIND_OF[type(records[0])]}"
  rendered, bad = [], []
  for number, record in enumerate(records, start=1):
    if not isinstance(record, Document) and isinstance(record.prompt, Chat):
      messages = [{"role": role, "content": text} for role, text in record.prompt.messages]
      try:
        record = dataclasses.replace(record, prompt=render_chat(messages))
      except UserError as error:
        bad.append(f"chat prompt {number} cannot be made text: {error}")
        if on_bad_record == "raise":
          raise UserError(f"{name}: {bad[0]}") from error
        continue
    rendered.append(record)
  _warn_of_skipped(name, bad, len(records))
  if not rendered:
    raise UserError(f"{name}: no record is left: {bad[0]}")
  return rendered


def _warn_of_skipped(name: str, bad: Sequence[str], total: int):
  if bad:
    first = "; ".join(bad[:_LISTED]) + ("; ..." if len(bad) > _LISTED else "")
    logger.warning("%s: skipped %d of %d records: %s", name, len(bad), total, first)


def _is_chat(record: Record) -> bool:
  return not isinstance(record, Document) and isinstance(record.prompt, Chat)


def simulation(spec: str):
  """The module with the default preset's labelers and gold score if `spec` is `demo:`, else None."""
  if not spec.startswith("demo:"):
    return None
  from instructjax.data import demo

  return demo


def require_simulation(spec: str):
  """The default preset's labelers and gold score.

  Raises:
    UserError: the records are not its own.
  """
  found = simulation(spec)
  if found is None:
    raise UserError(f"simulated labelers know only the records of 'demo:', and these are {spec!r}")
  return found


def _parse(rows: Rows, decode: Decode, spec: str, kind: str, on_bad_record: str) -> list[Record]:
  records, bad = [], []
  for where, raw in rows:
    try:
      records.append(parse_record(kind, decode(raw, kind, where), where))
    except BadRecord as error:
      if on_bad_record == "raise":
        raise
      bad.append(str(error))
  _warn_of_skipped(spec, bad, len(bad) + len(records))
  if not records:
    raise UserError(
      f"data.{kind}={spec!r} holds no records"
      + (f" but {len(bad)} bad ones: {bad[0]}" if bad else "")
    )
  return records


def _is_held_out(record: Record, fraction: float) -> bool:
  text = record.text if isinstance(record, Document) else record.prompt
  if isinstance(text, Chat):
    text = json.dumps(text.messages, ensure_ascii=False, separators=(",", ":"))
  digest = hashlib.sha256(text.encode()).digest()
  # The first 8 bytes are a uniform number below 2^64. Python's own hash() would differ from process to process.
  return int.from_bytes(digest[:8], "big") < fraction * 2**64
