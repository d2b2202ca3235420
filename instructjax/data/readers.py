"""Readers of the forms that people keep data in: JSON lines, HH, parquet, `datasets`, tfds.

Called by `sources`. Each reader of READERS takes (what follows the scheme's colon, kind, split) and
returns (rows, decode, has_own_split):
  rows: (`file:row`, raw value) one after the other; `file:line` for lines of text, which count from
    1, while a table's rows count from 0 as in every library that opens it.
  decode: (raw value, kind, `file:row`) -> what `records.parse_record` takes; may raise BadRecord.
  has_own_split: whether the rows are of `split` already; if not, `sources` holds some out.
Whatever is wrong with a source as a whole is a UserError.

Imports `records`; pyarrow, `datasets` and tensorflow_datasets are imported where they are used.
"""

import glob
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from instructjax.core.errors import UserError, reason
from instructjax.data.records import KEYS, BadRecord

_TURN = "\n\nAssistant:"  # what precedes each answer in an Anthropic-HH dialogue
_TFDS = re.compile(
  r"(?P<name>[^:?]+(:\d+\.[\d*]+\.[\d*]+)?)(:(?P<split>[^?]+))?(\?data_dir=(?P<data_dir>.+))?"
)
_BATCH = 256  # rows of a table decoded at once: they may be whole books

Rows = Iterable[tuple[str, Any]]
Decode = Callable[[Any, str, str], Any]


def _jsonl(path: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`jsonl:PATH`: JSON lines in UTF-8, gzipped if PATH ends in .gz. Blank lines are passed over."""
  return _lines(path), _decode_json, False


def _hh(path: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`hh:PATH`: JSON lines in Anthropic-HH's form: comparisons, demonstrations (chosen), prompts.

  prompt, chosen, rejected, or chosen and rejected as whole dialogues, cut after the last
  "\\n\\nAssistant:".
  """
  if kind == "documents":
    raise UserError(f"data.documents='hh:{path}' must be another source: hh: holds dialogues only")
  return _lines(path), _decode_hh, False


def _lines(path: str) -> Rows:
  opener = gzip.open if path.endswith(".gz") else open
  try:
    # Iterating over bytes ends lines at \n alone; str.splitlines would at U+2028 too.
    with opener(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield f"{path}:{number}", line
  except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip file cut short or damaged
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


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
  except ValueError as error:
    if isinstance(error, BadRecord):
      raise
    raise BadRecord(f"{where}: not JSON (a number of too many digits)") from error


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


def _parquet(path: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`parquet:PATH`: a file, a folder's *.parquet or those that a glob finds, in order of name."""
  files = parquet_files(path)
  if not files:
    raise UserError(f"data.{kind}='parquet:{path}' finds no file that ends in .parquet")
  return _parquet_rows(files, kind), _decode_table_row, False


def parquet_files(path: str) -> list[str]:
  """The files that `parquet:PATH` names, in order of name."""
  if pathlib.Path(path).is_dir():
    return sorted(glob.glob(f"{glob.escape(path)}/*.parquet"))
  if glob.has_magic(path) and not pathlib.Path(path).exists():
    return sorted(glob.glob(path, recursive=True))
  return [path]


def _parquet_rows(files: list[str], kind: str) -> Rows:
  import pyarrow
  import pyarrow.parquet

  for path in files:
    try:
      with open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
        columns = _columns(file.schema_arrow.names, kind, path)
        yield from _table_rows(file.iter_batches(_BATCH, columns=columns), path)
    except (OSError, pyarrow.ArrowException) as error:
      why = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
      raise UserError(f"cannot read {path}: {why}") from error


def _datasets(rest: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`datasets:PATH[:SPLIT]`: a folder that Hugging Face's `datasets` wrote with save_to_disk.

  Of a DatasetDict without SPLIT: train, and as validation its validation split, or its test split,
  or if it has neither, what is held out of train. Of a DatasetDict with SPLIT, or of a Dataset: what
  is held out of that.
  """
  try:
    import datasets  # the extra of this name
  except ImportError as error:
    raise UserError(
      f"data.{kind}='datasets:{rest}' needs Hugging Face's datasets package:"
      " pip install 'instructjax[datasets]'"
    ) from error
  path, own_split = datasets_folder(rest)
  try:
    loaded = datasets.load_from_disk(path)
  except Exception as error:  # of many types, pyarrow's too
    raise UserError(
      f"data.{kind}='datasets:{rest}' cannot be read: {str(error).strip().splitlines()[0]}"
    ) from error
  if isinstance(loaded, datasets.Dataset):
    if own_split:
      raise UserError(f"data.{kind}='datasets:{rest}' must be datasets:{path}: it has no splits")
    return _dataset_rows({path: loaded}, kind), _decode_table_row, False
  chosen = own_split or "train"
  if chosen not in loaded:
    raise UserError(
      f"data.{kind}='datasets:{rest}' has no split {chosen!r}: name one of its splits, as in"
      f" datasets:{path}:{next(iter(loaded))} (it has {', '.join(loaded)})"
    )
  held_out = [name for name in ("validation", "test") if name in loaded and not own_split]
  if held_out and split == "validation":
    chosen = held_out[0]
  names = list(loaded) if split == "all" and not own_split else [chosen]
  rows = _dataset_rows({f"{path}/{name}": loaded[name] for name in names}, kind)
  return rows, _decode_table_row, bool(held_out)


def datasets_folder(rest: str) -> tuple[str, str]:
  """(folder, split or "") of `datasets:PATH[:SPLIT]`."""
  path, colon, own_split = rest.rpartition(":")
  if not colon or pathlib.Path(rest).exists():
    return rest, ""
  return path, own_split


def _dataset_rows(datasets: dict[str, Any], kind: str) -> Rows:
  import pyarrow

  for where, dataset in datasets.items():
    wanted = dataset.select_columns(_columns(dataset.column_names, kind, where))
    tables = wanted.with_format("arrow").iter(batch_size=_BATCH)
    try:
      yield from _table_rows((batch for table in tables for batch in table.to_batches()), where)
    except (OSError, pyarrow.ArrowException) as error:
      raise UserError(f"cannot read {where}: {reason(error)}") from error


def _columns(names: list[str], kind: str, where: str) -> list[str]:
  """The columns that `kind` is made of: others may be images, or of types that Python has not."""
  wanted = [name for name in KEYS[kind] if name in names]
  if not wanted:
    raise UserError(
      f"{where}: has no column of {kind} ({', '.join(KEYS[kind])}), only {', '.join(names) or 'none'}"
    )
  return wanted


def _table_rows(batches: Iterable[Any], where: str) -> Rows:
  """Every row as a batch of one, so that a value that cannot be decoded is one bad record."""
  slices = (batch.slice(row, 1) for batch in batches for row in range(batch.num_rows))
  return ((f"{where}:{number}", row) for number, row in enumerate(slices))


def _decode_table_row(row: Any, kind: str, where: str) -> Any:
  try:
    (example,) = row.to_pylist()
  except UnicodeDecodeError as error:
    raise BadRecord(f"{where}: not UTF-8 (byte {error.start + 1})") from error
  except (ValueError, OverflowError, NotImplementedError) as error:  # dates outside Python's range
    raise BadRecord(
      f"{where}: holds a value that Python cannot ({type(error).__name__})"
    ) from error
  return _decode_example(example, kind, where)


def _tfds(rest: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR]`: any TensorFlow Datasets builder.

  Stored as array_record, and read without TensorFlow. Without SPLIT: its train and validation
  splits, or if it has no `validation`, what is held out of train. With SPLIT (slices too,
  `train[:50%]`), what is held out of that.
  """
  match = parse_tfds(rest)
  if not match:
    raise UserError(
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
    raise UserError(
      f"data.{kind}='tfds:{rest}' cannot be read: {str(error).strip().splitlines()[0]}"
    ) from error
  return _tfds_rows(source, f"tfds:{name}:{chosen}"), _decode_example, has_own_split


def parse_tfds(rest: str) -> re.Match | None:
  """name, split and data_dir of `tfds:...`; None where it is not spelt so."""
  return _TFDS.fullmatch(rest)


def _tfds_rows(source: Any, where: str) -> Rows:
  for row in range(len(source)):
    try:
      example = source[row]
    except Exception as error:  # of many types, for a damaged or missing shard
      raise UserError(f"cannot read {where}:{row}: {reason(error)}") from error
    yield f"{where}:{row}", example


def _decode_example(example: dict[str, Any], kind: str, where: str) -> Any:
  """A row of a table in JSON's types; a null cell is an absent key."""
  try:
    return {key: _objects(_plain(cell)) for key, cell in example.items() if cell is not None}
  except UnicodeDecodeError as error:
    raise BadRecord(f"{where}: not UTF-8 (byte {error.start + 1})") from error


def _plain(value: Any) -> Any:
  """Text for bytes, lists and numbers for numpy's."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if hasattr(value, "tolist"):
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return value


def _objects(value: Any) -> Any:
  """A list of objects of an object of equally long lists, as tfds stores a list of messages."""
  if not isinstance(value, dict) or not all(isinstance(cells, list) for cells in value.values()):
    return value
  if len({len(cells) for cells in value.values()}) != 1:
    return value
  return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


READERS: dict[str, Callable[[str, str, str], tuple[Rows, Decode, bool]]] = {
  "jsonl": _jsonl,
  "hh": _hh,
  "parquet": _parquet,
  "datasets": _datasets,
  "tfds": _tfds,
}
