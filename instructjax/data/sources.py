"""Where records come from: `demo:` and the files that `readers` knows.

Called by context.py and the stages, through `load` and `render`. Imports `records` and `readers`,
and the default preset (`demo`) when it is asked for.
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
  """All records of one kind and split.

  A source without a validation split of its own holds out the records whose prompt (document: whole
  text) has a SHA-256 in the lowest `validation_fraction`: the same for every seed, machine and
  order, and all records of a prompt together. A prompt that is a `Chat` counts as the JSON of its
  messages, so no chat template decides which side it falls on.

  Args:
    spec: one of
      `demo:` the default preset's documents, prompts, demonstrations.
      `SCHEME:REST` one of `readers.READERS`, whose functions say what REST is and which splits
        there are.
    kind: one of records.KINDS.
    split: train, validation, test (of `demo:` its own, of other sources the same as validation), or
      all of a source that has no split of its own.
    seed: only `demo:` depends on it.
    validation_fraction: in (0, 1).
    on_bad_record: raise stops at the first bad record; skip logs how many were skipped, and the
      first few by place and reason.
  """
  scheme, colon, rest = spec.partition(":")
  if not colon or scheme not in _SCHEMES:
    raise UserError(
      f"data.{kind}={spec!r} must start with one of {', '.join(name + ':' for name in _SCHEMES)}"
    )
  if kind not in KINDS:
    raise UserError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
  if split not in ("train", "validation", "test", "all"):
    raise UserError(f"split={split!r} must be train, validation, test or all")
  if on_bad_record not in ("raise", "skip"):
    raise UserError(f"data.on_bad_record={on_bad_record!r} must be raise or skip")
  if scheme == "demo":
    from instructjax.data import demo  # imported only where it is used

    return demo.load(kind, split, seed)
  if split == "test":
    split = "validation"
  rows, decode, has_own_split = READERS[scheme](rest, kind, split)
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


def render(
  records: Sequence[Record],
  render_chat: Callable[[Sequence[Mapping[str, str]]], str],
  *,
  on_bad_record: Literal["raise", "skip"],
) -> Sequence[Record]:
  """The records with every chat prompt as text; the same list where there is none.

  Args:
    records: of one kind.
    render_chat: from messages with role and content to text: a tokenizer's chat template. Called
      only for chat prompts, so a tokenizer without a template serves plain ones.
    on_bad_record: what to do about a prompt that render_chat refuses, as in `load`: a template may
      want the user and the assistant to take turns, and no message may hold a special token.

  Raises:
    UserError: of render_chat, with the kind and the number of the prompt among `records`.
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
  """The default preset's labelers and gold score where the records are its own, or None."""
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
  return int.from_bytes(digest[:8], "big") < fraction * 2**64
