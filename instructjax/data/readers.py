"""Readers of common data formats: JSON lines, Anthropic-HH, parquet, Hugging Face `datasets`, and tfds.

Called by `sources`. A new format is a row of READERS and the functions that the row names. `read` takes (the part of
the spec after `SCHEME:`, kind, split) and returns (rows, decode, has_own_split):
  rows: an iterable of (place, raw value). The place is `file:line`, counted from 1, in text files. In tables it is
    `file:row`, counted from 0 as in the libraries that open them.
  decode: a function that turns (raw value, kind, place) into the input of `records.parse_record`.
  has_own_split: whether the rows are already those of `split`. If not, `sources` holds some of them out.

A problem with a single row raises BadRecord in `decode`, so that it can be skipped. A problem with the whole source
raises UserError.

Imports `records`. pyarrow, `datasets` and tensorflow_datasets are imported only where they are used.
"""

import glob
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from instructjax.core.errors import UserError, reason
from instructjax.data.records import KEYS, BadRecord

_TURN = "\n\nAssistant:"  # precedes each answer in an Anthropic-HH dialogue
_TFDS = re.compile(
  r"(?P<name>[^:?]+(:\d+\.[\d*]+\.[\d*]+)?)(:(?P<split>[^?]+))?(\?data_dir=(?P<data_dir>.+))?"
)
_BATCH = 256  # rows of a table read at once; few, because a row may hold a whole book

Rows = Iterable[tuple[str, Any]]
Decode = Callable[[Any, str, str], Any]


def _jsonl(path: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`jsonl:PATH` reads JSON lines in UTF-8, gzipped if PATH ends in .gz. Blank lines are skipped."""
  return _lines(path), _decode_json, False


def _hh(path: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`hh:PATH` reads JSON lines in the format of Anthropic-HH.

  A row serves as a comparison, as a demonstration (the chosen answer), or as a prompt. It has the keys prompt, chosen
  and rejected; or only chosen and rejected, which are then whole dialogues that are split after the last
  "\\n\\nAssistant:".
  """
  if kind == "documents":
    raise UserError(f"data.documents='hh:{path}' must be another source: hh: holds dialogues only")
  return _lines(path), _decode_hh, False


def _lines(path: str) -> Rows:
  opener = gzip.open if path.endswith(".gz") else open
  try:
    # Iterating over bytes ends lines at \n only. str.splitlines would also end them at U+2028, which JSON strings may
    # contain.
    with opener(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield f"{path}:{number}", line
  except (OSError, EOFError, zlib.error) as error:  # the last two: a truncated or damaged gzip file
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _decode_json(line: bytes, kind: str, where: str) -> Any:
  def unique(pairs):
    obj = dict(pairs)
    if len(obj) < len(pairs):
      raise BadRecord(f"{where}: a key occurs twice")
    return obj

  try:
    # utf-8-sig drops the byte order mark that some editors write at the start of a file.
    return json.loads(line.rstrip().decode("utf-8-sig"), object_pairs_hook=unique)
  except UnicodeDecodeError as error:
    raise BadRecord(f"{where}: not UTF-8 (byte {error.start + 1})") from error
  except json.JSONDecodeError as error:
    raise BadRecord(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
  except RecursionError as error:
    raise BadRecord(f"{where}: nested too deeply") from error
  # BadRecord from the hook, or Python's limit on the digits of an integer.
  except ValueError as error:
    if isinstance(error, BadRecord):
      raise
    raise BadRecord(f"{where}: not JSON (a number of too many digits)") from error


def _decode_hh(line: bytes, kind: str, where: str) -> Any:
  """A row of Anthropic-HH with the keys that `parse_record` expects."""
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
  """`parquet:PATH` reads a file, the *.parquet files of a folder, or the files that match a glob, sorted by name."""
  files = parquet_files(path)
  if not files:
    raise UserError(f"data.{kind}='parquet:{path}' finds no file that ends in .parquet")
  return _parquet_rows(files, kind), _decode_table_row, False


def parquet_files(path: str) -> list[str]:
  """The files that `parquet:PATH` stands for, sorted by name."""
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
      why = getattr(error, "strerror", None) or reason(error)
      raise UserError(f"cannot read {path}: {why}") from error


def _datasets(rest: str, kind: str, split: str) -> tuple[Rows, Decode, bool]:
  """`datasets:PATH[:SPLIT]` reads a folder that Hugging Face's `datasets` has written with save_to_disk.

  Without SPLIT, a DatasetDict is trained on its train split. Its validation split is held out, or else its test split;
  if it has neither, some records of train are held out. With SPLIT, or if the folder holds a single Dataset, some
  records of that split or dataset are held out.
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
  except Exception as error:  # `datasets` raises many types, including pyarrow's
    raise UserError(f"data.{kind}='datasets:{rest}' cannot be read: {reason(error)}") from error
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
  """Splits the PATH[:SPLIT] of `datasets:PATH[:SPLIT]` into (folder, split); the split is "" if none is named."""
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
  """The columns that records of this kind consist of.

  Other columns are not read: they may hold large images, or types that have no equivalent in Python.

  Raises:
    UserError: the table has none of the columns.
  """
  wanted = [name for name in KEYS[kind] if name in names]
  if not wanted:
    raise UserError(
      f"{where}: has no column of {kind} ({', '.join(KEYS[kind])}), only {', '.join(names) or 'none'}"
    )
  return wanted


def _table_rows(batches: Iterable[Any], where: str) -> Rows:
  """Yields every row as a batch of one, so that a value that cannot be decoded spoils one record only."""
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
  """`tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR]` reads any TensorFlow Datasets builder.

  The data must be stored as array_record, which is read without TensorFlow. Without SPLIT, the train and validation
  splits are used; if there is no validation split, some records of train are held out. With SPLIT, which may be a slice
  such as `train[:50%]`, some records of that split are held out.
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
  except Exception as error:  # tfds raises many types
    raise UserError(f"data.{kind}='tfds:{rest}' cannot be read: {reason(error)}") from error
  return _tfds_rows(source, f"tfds:{name}:{chosen}"), _decode_example, has_own_split


def parse_tfds(rest: str) -> re.Match | None:
  """Matches the part after `tfds:`, with the groups name, split and data_dir; None if it has another form."""
  return _TFDS.fullmatch(rest)


def _tfds_rows(source: Any, where: str) -> Rows:
  for row in range(len(source)):
    try:
      example = source[row]
    except Exception as error:  # a damaged or missing shard raises one of many types
      raise UserError(f"cannot read {where}:{row}: {reason(error)}") from error
    yield f"{where}:{row}", example


def _decode_example(example: dict[str, Any], kind: str, where: str) -> Any:
  """A table row converted to JSON's types. A null cell becomes a missing key."""
  try:
    return {key: _objects(_plain(cell)) for key, cell in example.items() if cell is not None}
  except UnicodeDecodeError as error:
    raise BadRecord(f"{where}: not UTF-8 (byte {error.start + 1})") from error


def _plain(value: Any) -> Any:
  """Converts bytes to text, and numpy's arrays and scalars to lists and numbers."""
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
  """Converts a dict of equally long lists to a list of dicts.

  tfds stores a list of messages in columns. Any other value is returned unchanged.
  """
  if not isinstance(value, dict) or not all(isinstance(cells, list) for cells in value.values()):
    return value
  if len({len(cells) for cells in value.values()}) != 1:
    return value
  return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def _datasets_files(rest: str) -> list[str]:
  folder, _ = datasets_folder(rest)
  return sorted(str(path) for path in pathlib.Path(folder).rglob("*.arrow"))


def _tfds_files(rest: str) -> list[str]:
  """The files of all splits, by name."""
  import tensorflow_datasets as tfds  # 0.5 s to import, so only when asked for

  match = parse_tfds(rest)
  if match is None:
    raise ValueError(f"tfds:{rest} was not read: it is not spelt as `_tfds` wants it")
  where = {"data_dir": match["data_dir"]} if match["data_dir"] else {}
  folder = pathlib.Path(tfds.builder(match["name"], **where).data_path)
  return sorted(str(path) for path in folder.iterdir() if ".array_record" in path.name)


def _tfds_place(rest: str) -> str:
  match = parse_tfds(rest)
  return (match and match["data_dir"]) or ""


class Reader(NamedTuple):
  """A data format.

  Attributes:
    read: see the top of this file.
    files: the files that it reads, in order. What they hold is part of the fingerprint of the stages that read them.
    place: the part of the spec that says where the files are. Everything else says how they are read.
  """

  read: Callable[[str, str, str], tuple[Rows, Decode, bool]]
  files: Callable[[str], list[str]]
  place: Callable[[str], str]


READERS = {
  "jsonl": Reader(_jsonl, lambda path: [path], str),
  "hh": Reader(_hh, lambda path: [path], str),
  "parquet": Reader(_parquet, parquet_files, str),
  "datasets": Reader(_datasets, _datasets_files, lambda rest: datasets_folder(rest)[0]),
  "tfds": Reader(_tfds, _tfds_files, _tfds_place),
}
