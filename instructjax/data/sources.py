"""Where records come from: `demo:`, `jsonl:PATH`, `hh:PATH`, `tfds:NAME`.

Called by the stages, through `load`. Imports `records`, and the default preset (`demo`) when it is
asked for.
"""

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

from instructjax.data.records import KINDS, BadRecord, Record, parse_record

logger = logging.getLogger(__name__)

_LISTED = 5  # bad records named in the log
_TURN = "\n\nAssistant:"  # what precedes each answer in an Anthropic-HH dialogue
_TFDS = re.compile(
  r"(?P<name>[^:?]+(:\d+\.[\d*]+\.[\d*]+)?)(:(?P<split>[^?]+))?(\?data_dir=(?P<data_dir>.+))?"
)

_Rows = Iterable[tuple[str, Any]]  # (file:line, raw value)
_Decode = Callable[
  [Any, str, str], Any
]  # (raw value, kind, file:line) -> what parse_record takes; may raise BadRecord


def load(
  spec: str,
  kind: str,
  split: Literal["train", "validation"],
  *,
  seed: int,
  validation_fraction: float,
  on_bad_record: Literal["raise", "skip"],
) -> list[Record]:
  """All records of one kind and split.

  A source without a validation split of its own holds out the records whose prompt (document: whole
  text) has a SHA-256 in the lowest `validation_fraction`: the same for every seed, machine and
  order, and all records of a prompt together.

  Args:
    spec: one of
      `demo:` the default preset's documents, prompts, demonstrations.
      `jsonl:PATH` JSON lines in UTF-8, gzipped if PATH ends in .gz; keys as in
        `records.parse_record`. Blank lines are passed over.
      `hh:PATH` JSON lines in Anthropic-HH's form: prompt, chosen, rejected, or chosen and rejected
        as whole dialogues, cut after the last "\\n\\nAssistant:". Gives comparisons,
        demonstrations (the chosen answer) and prompts.
      `tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR]` any TensorFlow Datasets builder stored
        as array_record, read without TensorFlow. Without SPLIT: its train and validation splits,
        or if it has no `validation`, what is held out of train. With SPLIT (slices too,
        `train[:50%]`), what is held out of that.
    kind: one of records.KINDS.
    split: train, validation, test (of `demo:` its own, of other sources the same as validation), or all of a source
      that has no split of its own.
    seed: only `demo:` depends on it.
    validation_fraction: in (0, 1).
    on_bad_record: raise stops at the first bad record; skip logs how many were skipped, and the
      first few by place and reason.
  """
  scheme, colon, rest = spec.partition(":")
  if not colon or scheme not in _SCHEMES:
    raise ValueError(
      f"data.{kind}={spec!r} must start with one of {', '.join(name + ':' for name in _SCHEMES)}"
    )
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
  if split not in ("train", "validation", "test", "all"):
    raise ValueError(f"split={split!r} must be train, validation, test or all")
  if on_bad_record not in ("raise", "skip"):
    raise ValueError(f"data.on_bad_record={on_bad_record!r} must be raise or skip")
  if scheme == "demo":
    from instructjax import demo  # imported only where it is used

    return demo.load(kind, split, seed)
  if split == "test":
    split = "validation"
  rows, decode, has_own_split = _SCHEMES[scheme](rest, kind, split)
  records = _parse(rows, decode, spec, kind, on_bad_record)
  if has_own_split or split == "all":
    return records
  chosen = [
    record
    for record in records
    if _is_held_out(record, validation_fraction) == (split == "validation")
  ]
  if not chosen:
    raise ValueError(
      f"data.{kind}={spec!r}: none of its {len(records)} records fall in the {split} split with"
      f" data.validation_fraction={validation_fraction}"
    )
  return chosen


def simulation(spec: str):
  """The default preset's labelers and gold score where the records are its own, or None."""
  if not spec.startswith("demo:"):
    return None
  from instructjax import demo

  return demo


def _parse(rows: _Rows, decode: _Decode, spec: str, kind: str, on_bad_record: str) -> list[Record]:
  records, bad = [], []
  for where, raw in rows:
    try:
      records.append(parse_record(kind, decode(raw, kind, where), where))
    except BadRecord as error:
      if on_bad_record == "raise":
        raise
      bad.append(str(error))
  if bad:
    first = "; ".join(bad[:_LISTED]) + ("; ..." if len(bad) > _LISTED else "")
    logger.warning(
      "%s: skipped %d of %d records: %s", spec, len(bad), len(bad) + len(records), first
    )
  if not records:
    raise ValueError(
      f"data.{kind}={spec!r} holds no records"
      + (f" but {len(bad)} bad ones: {bad[0]}" if bad else "")
    )
  return records


def _is_held_out(record: Record, fraction: float) -> bool:
  text = record.text if hasattr(record, "text") else record.prompt
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _jsonl(path: str, kind: str, split: str) -> tuple[_Rows, _Decode, bool]:
  return _lines(path), _decode_json, False


def _hh(path: str, kind: str, split: str) -> tuple[_Rows, _Decode, bool]:
  if kind == "documents":
    raise ValueError(f"data.documents='hh:{path}' must be another source: hh: holds dialogues only")
  return _lines(path), _decode_hh, False


def _lines(path: str) -> _Rows:
  opener = gzip.open if path.endswith(".gz") else open
  try:
    # Iterating over bytes ends lines at \n alone; str.splitlines would at U+2028 too.
    with opener(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield f"{path}:{number}", line
  except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip file cut short or damaged
    raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _decode_json(line: bytes, kind: str, where: str) -> Any:
  def unique(pairs):
    obj = dict(pairs)
    if len(obj) < len(pairs):
      raise BadRecord(f"{where}: a key occurs twice")
    return obj

  try:
    return json.loads(line.rstrip().decode("utf-8-sig"), object_pairs_hook=unique)
  except UnicodeDecodeError as error:
    raise BadRecord(f"{where}: not UTF-8 (byte {error.start + 1})") from error
  except json.JSONDecodeError as error:
    raise BadRecord(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
  except RecursionError as error:
    raise BadRecord(f"{where}: nested too deeply") from error


def _decode_hh(line: bytes, kind: str, where: str) -> Any:
  """A row of Anthropic-HH in the keys that `parse_record` knows."""
  obj = _decode_json(line, kind, where)
  if not isinstance(obj, dict) or not {"chosen", "rejected"} <= obj.keys():
    raise BadRecord(f"{where}: needs chosen and rejected")
  if "prompt" not in obj:
    parts = [_split_dialogue(obj[key], key, where) for key in ("chosen", "rejected")]
    if parts[0][0] != parts[1][0]:
      raise BadRecord(f"{where}: chosen and rejected differ before their last answer")
    obj = {"prompt": parts[0][0], "chosen": parts[0][1], "rejected": parts[1][1]}
  names = {
    "prompts": {"prompt": "prompt"},
    "demonstrations": {"prompt": "prompt", "chosen": "response"},
    "comparisons": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
  }[kind]
  return {new: obj[old] for old, new in names.items()}


def _split_dialogue(dialogue: Any, key: str, where: str) -> tuple[str, str]:
  if not isinstance(dialogue, str) or _TURN not in dialogue:
    raise BadRecord(f"{where}: {key!r} must be a dialogue with an 'Assistant:' turn")
  head, _, answer = dialogue.rpartition(_TURN)
  return head + _TURN, answer


def _tfds(rest: str, kind: str, split: str) -> tuple[_Rows, _Decode, bool]:
  match = _TFDS.fullmatch(rest)
  if not match:
    raise ValueError(
      f"data.{kind}='tfds:{rest}' must be tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR]"
    )
  name, own_split = match["name"], match["split"]
  import tensorflow_datasets as tfds  # 0.5 s to import, so only when asked for

  try:
    builder = tfds.builder(name, **({"data_dir": match["data_dir"]} if match["data_dir"] else {}))
    has_own_split = own_split is None and "validation" in builder.info.splits
    chosen = own_split or (split if has_own_split else "train")
    source = tfds.data_source(name, split=chosen, data_dir=match["data_dir"])
  except Exception as error:  # tfds raises many types of its own
    raise ValueError(
      f"data.{kind}='tfds:{rest}' cannot be read: {str(error).strip().splitlines()[0]}"
    ) from error
  rows = ((f"tfds:{name}:{chosen}:{row}", source[row]) for row in range(len(source)))
  return rows, _decode_tfds, has_own_split


def _decode_tfds(example: Any, kind: str, where: str) -> Any:
  try:
    return _plain(example)
  except UnicodeDecodeError as error:
    raise BadRecord(f"{where}: not UTF-8 (byte {error.start + 1})") from error


def _plain(value: Any) -> Any:
  """A tfds example in JSON's types: text for bytes, lists and numbers for numpy's."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if hasattr(value, "tolist"):
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return value


_SCHEMES: dict[str, Callable | None] = {"demo": None, "jsonl": _jsonl, "hh": _hh, "tfds": _tfds}
