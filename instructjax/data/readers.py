"""Readers of common data formats: JSON lines, Anthropic-HH, parquet, Hugging Face `datasets`, tfds, and labeling.

Called by `sources`. A new format is a row of READERS and the functions that the row names. `read` takes a Request and
returns (rows, decode, has_own_split):
  rows: an iterable of (place, raw value). The place is `file:line`, counted from 1, in text files. In tables it is
    `file:row`, counted from 0 as in the libraries that open them.
  decode: a function that turns (raw value, kind, place) into the input of `formats.convert`.
  has_own_split: whether the rows are already those of the request's split. If not, `sources` holds some of them out.

A problem with a single row raises BadRecord in `decode`, so that it can be skipped. A problem with the whole source
raises UserError.

Imports `text_files` and `formats`. pyarrow, `datasets` and tensorflow_datasets are imported only where they are used.
"""

import dataclasses
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from instructjax.core import foreign, places
from instructjax.core.errors import UserError, reason
from instructjax.data import formats, label_records, text_files
from instructjax.data.records import BadRecord

_TFDS = re.compile(r"(?P<name>[^:?]+(:\d+\.[\d*]+\.[\d*]+)?)(:(?P<split>[^?]+))?")
_HUB = re.compile(
  r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]:%+-]+))?"
)
_BATCH = 256  # rows of a table read at once; few, because a row may hold a whole book

RawRecords = Iterable[tuple[str, Any]]
Decode = Callable[[Any, str, str], Any]


@dataclasses.dataclass(frozen=True)
class Request:
  """What is to be read.

  Attributes:
    path: the part of the source between `SCHEME:` and `?`.
    options: what stands behind the `?`.
    kind: one of records.KINDS.
    split: train, validation or all.
    source: the config's field and its value, for messages.
  """

  path: str
  options: formats.Options
  kind: str
  split: str
  source: str


def _jsonl(asked: Request) -> tuple[RawRecords, Decode, bool]:
  """`jsonl:PATH` reads JSON lines, or an array in JSON, from a file or from the files of a glob, sorted by name."""
  files = text_file_paths(asked.path)
  if not files:
    raise UserError(f"{asked.source} finds no file")
  return itertools.chain.from_iterable(map(text_files.rows, files)), text_files.decode, False


def _hh(asked: Request) -> tuple[RawRecords, Decode, bool]:
  """`hh:PATH` reads JSON lines in the format of Anthropic-HH, see dialogues.py."""
  if asked.kind == "documents":
    raise UserError(f"{asked.source} must be another source: hh: holds dialogues only")
  return _jsonl(asked)


def _labels(asked: Request) -> tuple[RawRecords, Decode, bool]:
  """`labels:DIR_OR_URL[?until=N][&items=M][&cohort=heldout]` reads the database of a labeling project.

  See label_records.py. Each record is on the side of the split where its item is. With `until`, submissions after the
  N-th do not count, and with `items`, items after the M-th, so that a run can be resumed while people go on. With
  `cohort=heldout` it gives what held-out labelers have made of the held-out prompts, which is left out otherwise.
  """
  until, last = _number(asked.options, "until"), _number(asked.options, "items")
  cohort = _cohort(asked.options)
  rows = label_records.rows(asked.path, asked.kind, asked.split, until, cohort, last)
  return rows, lambda row, kind, where: row, True


def labeling_project(spec: str) -> tuple[str, dict[str, str]] | None:
  """(folder or URL, options) of the project that a source `labels:` reads; None for another source.

  Raises:
    UserError: its options are not known.
  """
  scheme, _, rest = spec.partition(":")
  if scheme != "labels":
    return None
  path, options = formats.split_options(rest, spec, None, READERS[scheme].options)
  return path, dict(options.other)


def _number(options: formats.Options, name: str) -> int:
  text = options.other.get(name, "0")
  if not text.isdecimal() or len(text) > 18:
    what = {"until": "a submission", "items": "an item"}[name]
    raise UserError(f"{name}={text[:40]!r} of labels: must be the number of {what}")
  return int(text)


def _cohort(options: formats.Options) -> str:
  name = options.other.get("cohort", "training")
  if name not in label_records.COHORTS:
    raise UserError(
      f"cohort={name[:40]!r} of labels: must be one of {', '.join(label_records.COHORTS)}"
    )
  return name


def _matches(path: str) -> list[str]:
  """The files that a path stands for: those that match it if it is a glob, sorted by name; else the path itself."""
  if glob.has_magic(path) and not os.path.lexists(path):
    return sorted(glob.glob(path, recursive=True))
  return [path]


def text_file_paths(path: str) -> list[str]:
  """The files that the path of `jsonl:` stands for.

  Raises:
    UserError: it is a folder.
  """
  found = _matches(path)
  if found and os.path.isdir(found[0]):
    raise UserError(
      f"cannot read {found[0]}: Is a directory; name its files, as in {found[0].rstrip('/')}/*.jsonl"
    )
  return found


def _parquet(asked: Request) -> tuple[RawRecords, Decode, bool]:
  """`parquet:PATH` reads a file, the *.parquet files of a folder, or the files that match a glob, sorted by name."""
  files = parquet_files(asked.path)
  if not files:
    raise UserError(f"{asked.source} finds no file that ends in .parquet")
  return _parquet_rows(files, asked), _decode_table_row, False


def parquet_files(path: str) -> list[str]:
  """The files that `parquet:PATH` stands for, sorted by name."""
  if os.path.isdir(path):
    return sorted(glob.glob(f"{glob.escape(path)}/*.parquet"))
  return _matches(path)


def _parquet_rows(files: list[str], asked: Request) -> RawRecords:
  import pyarrow
  import pyarrow.parquet

  for path in files:
    foreign.require_file(pathlib.Path(path))
    try:
      with open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
        columns = formats.columns(file.schema_arrow.names, asked.kind, path, asked.options)
        yield from _table_rows(file.iter_batches(_BATCH, columns=columns), path)
    # Names that are no UTF-8.
    except (
      OSError,
      UnicodeDecodeError,
      pyarrow.ArrowException,
    ) as error:
      why = getattr(error, "strerror", None) or reason(error)
      raise UserError(f"cannot read {path}: {why}") from error


def _datasets(asked: Request) -> tuple[RawRecords, Decode, bool]:
  """`datasets:PATH[:SPLIT]` reads a folder that Hugging Face's `datasets` has written with save_to_disk.

  Where there is no such folder, `datasets:[ORG/]NAME[/CONFIG][:SPLIT]` reads a data set of Hugging Face's hub, which is
  downloaded once.

  Without SPLIT, a DatasetDict is trained on its train split. Its validation split is held out, or else its test split;
  if it has neither, some records of train are held out. With SPLIT, or if the folder holds a single Dataset, some
  records of that split or dataset are held out.
  """
  path, own_split = datasets_folder(asked.path)
  loaded = _loaded_dataset(asked.path, asked.source)
  if not isinstance(loaded, dict):
    if own_split:
      raise UserError(f"{asked.source} must be datasets:{path}: it has no splits")
    return _dataset_rows({path: loaded}, asked), _decode_table_row, False
  chosen = own_split or "train"
  if chosen not in loaded:
    raise UserError(
      f"{asked.source} has no split {chosen!r}: name one of its splits, as in"
      f" datasets:{path}:{next(iter(loaded), 'SPLIT')} (it has {', '.join(loaded) or 'none'})"
    )
  held_out = [name for name in ("validation", "test") if name in loaded and not own_split]
  if held_out and asked.split == "validation":
    chosen = held_out[0]
  names = list(loaded) if asked.split == "all" and not own_split else [chosen]
  rows = _dataset_rows({f"{path}/{name}": loaded[name] for name in names}, asked)
  return rows, _decode_table_row, bool(held_out)


def _loaded_dataset(rest: str, source: str) -> Any:
  """The Dataset or DatasetDict of a local folder, or else of the hub."""
  try:
    import datasets  # the extra of this name
  except ImportError as error:
    raise UserError(
      f"{source} needs Hugging Face's datasets package: pip install 'instructjax[datasets]'"
    ) from error
  path, _ = datasets_folder(rest)
  hub = _HUB.fullmatch(rest)
  try:
    if os.path.exists(path) or not hub:
      return datasets.load_from_disk(path)
    return datasets.load_dataset(hub["name"], hub["config"])
  # `datasets` raises many types, including pyarrow's and those of the network.
  except Exception as error:
    if os.path.exists(path) or not hub:
      raise UserError(f"{source} cannot be read: {reason(error)}") from error
    raise UserError(
      f"{source} is no folder, and cannot be read from Hugging Face's hub: {reason(error)}"
    ) from error


def datasets_folder(rest: str) -> tuple[str, str]:
  """Splits the PATH[:SPLIT] of `datasets:PATH[:SPLIT]` into (folder, split); the split is "" if none is named."""
  path, colon, own_split = rest.rpartition(":")
  if not colon or os.path.exists(rest):
    return rest, ""
  return path, own_split


def _dataset_rows(datasets: dict[str, Any], asked: Request) -> RawRecords:
  import pyarrow

  for where, dataset in datasets.items():
    wanted = dataset.select_columns(
      formats.columns(dataset.column_names, asked.kind, where, asked.options)
    )
    tables = wanted.with_format("arrow").iter(batch_size=_BATCH)
    try:
      yield from _table_rows((batch for table in tables for batch in table.to_batches()), where)
    except (OSError, pyarrow.ArrowException) as error:
      raise UserError(f"cannot read {where}: {reason(error)}") from error


def _table_rows(batches: Iterable[Any], where: str) -> RawRecords:
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


def _tfds(asked: Request) -> tuple[RawRecords, Decode, bool]:
  """`tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR]` reads any TensorFlow Datasets builder.

  The data must be stored as array_record, which is read without TensorFlow. Without SPLIT, the train and validation
  splits are used; if there is no validation split, some records of train are held out. With SPLIT, which may be a slice
  such as `train[:50%]`, some records of that split are held out.
  """
  match = _TFDS.fullmatch(asked.path)
  if not match:
    raise UserError(f"{asked.source} must be tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR]")
  name, own_split = match["name"], match["split"]
  import tensorflow_datasets as tfds  # 0.5 s to import, so only when asked for

  try:
    builder = tfds.builder(name, **_data_dir(asked.options))
    has_own_split = own_split is None and "validation" in builder.info.splits
    chosen = own_split or (asked.split if has_own_split else "train")
    source = tfds.data_source(name, split=chosen, **_data_dir(asked.options))
  except Exception as error:  # tfds raises many types
    raise UserError(f"{asked.source} cannot be read: {reason(error)}") from error
  return _tfds_rows(source, f"tfds:{name}:{chosen}"), _decode_example, has_own_split


def _data_dir(options: formats.Options) -> dict[str, Any]:
  return {name: places.expand(value, name) for name, value in options.other.items()}


def _tfds_rows(source: Any, where: str) -> RawRecords:
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


def _text_files(path: str, options: formats.Options) -> list[str]:
  return text_file_paths(path)


def _parquet_files(path: str, options: formats.Options) -> list[str]:
  return parquet_files(path)


def _datasets_files(rest: str, options: formats.Options) -> list[str]:
  """The Arrow files, which for a data set of the hub lie in the cache of `datasets`."""
  folder, _ = datasets_folder(rest)
  if os.path.isdir(folder):
    return sorted(glob.glob(f"{glob.escape(folder)}/**/*.arrow", recursive=True))
  loaded = _loaded_dataset(rest, f"datasets:{rest}")
  parts = loaded.values() if isinstance(loaded, dict) else [loaded]
  return sorted(file["filename"] for part in parts for file in part.cache_files)


def _datasets_place(rest: str, options: formats.Options) -> str:
  folder, split = datasets_folder(rest)
  if not os.path.isdir(folder):  # the name of a data set of the hub
    return ""
  return rest.removesuffix(f":{split}") if split else rest


def _tfds_files(path: str, options: formats.Options) -> list[str]:
  """The files of all splits, by name."""
  import tensorflow_datasets as tfds  # 0.5 s to import, so only when asked for

  match = _TFDS.fullmatch(path)
  if match is None:
    raise ValueError(f"tfds:{path} was not read: it is not spelt as `_tfds` wants it")
  folder = tfds.builder(match["name"], **_data_dir(options)).data_path
  return sorted(glob.glob(f"{glob.escape(os.fspath(folder))}/*.array_record*"))


class Reader(NamedTuple):
  """A data format.

  Attributes:
    read: see the top of this file.
    files: the files that it reads, in order, from the path and its options. What they hold is part of the fingerprint
      of the stages that read them.
    place: the part of the spec that says where the files are. Everything else says how they are read.
    options: names of its own options, beside those of `formats`.
    format: the format of every row; None if the keys of a row decide.
    checksum: of what is read, where files do not tell it; from the path and its options.
  """

  read: Callable[[Request], tuple[RawRecords, Decode, bool]]
  files: Callable[[str, formats.Options], list[str]]
  place: Callable[[str, formats.Options], str]
  options: tuple[str, ...] = ()
  format: str | None = None
  checksum: Callable[[str, formats.Options], str] | None = None


def _whole(path: str, options: formats.Options) -> str:
  return path


READERS = {
  "jsonl": Reader(_jsonl, _text_files, _whole),
  "hh": Reader(_hh, _text_files, _whole, format="hh"),
  "parquet": Reader(_parquet, _parquet_files, _whole),
  "datasets": Reader(_datasets, _datasets_files, _datasets_place),
  "tfds": Reader(
    _tfds,
    _tfds_files,
    lambda path, options: "".join(f"{name}={value}" for name, value in options.other.items()),
    options=("data_dir",),
  ),
  # Its file changes with every click; what is read changes with what labelers send.
  "labels": Reader(
    _labels,
    lambda path, options: [],
    _whole,
    options=("until", "items", "cohort"),
    format=formats.OWN,
    checksum=lambda path, options: label_records.digest(
      path, _number(options, "until"), _cohort(options), _number(options, "items")
    ),
  ),
}
