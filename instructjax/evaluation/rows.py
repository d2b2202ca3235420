"""Finds and reads the data of tasks: JSON lines, JSON, CSV, TSV, parquet and `tfds:`.

Called by items.py. Of the project it imports data/, whose readers name the file and line of a bad row.
"""

import csv
import dataclasses
import fnmatch
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from instructjax.core import foreign
from instructjax.core.errors import UserError, reason
from instructjax.data import formats, text_files
from instructjax.data.messages import BadRecord
from instructjax.data.readers import READERS, Request, parquet_files
from instructjax.evaluation.task import Row, Task

_SCHEMES = ("tfds", "parquet", "jsonl")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_TABLES = {".csv": ",", ".tsv": "\t"}
_DEPTH = 4  # levels of folders below --data that are looked through
_TABLE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Data:
  """What --data says.

  Attributes:
    folders: where the files of tasks are looked for by name, in order.
    specs: `TASK` or `TASK.train` -> a file, or SCHEME:REST.
    tfds: whether a task without a file is looked for in TensorFlow Datasets.
  """

  folders: tuple[str, ...]
  specs: Mapping[str, str]
  tfds: bool


def parse_data(values: Sequence[str], names: Sequence[str]) -> Data:
  """What the values of --data say: folders, TASK=FILE, TASK=SCHEME:REST, TASK.train=... or `tfds:`.

  Args:
    values: as given.
    names: of all tasks.
  Raises:
    UserError: one is none of these, or a folder is not there.
  """
  folders: list[str] = []
  specs: dict[str, str] = {}
  for value in values:
    name, equals, spec = value.partition("=")
    if equals and name.removesuffix(".train") in names:
      if name in specs:
        raise UserError(f"--data names {name} twice; give one file or spec for it")
      specs[name] = _expanded(spec, name)
    elif value != "tfds:":
      path = os.path.expanduser(value)
      if not os.path.isdir(path):
        raise UserError(
          f"--data={foreign.named(value, 200)} must be a folder, tfds:, or TASK=FILE with one of the tasks"
          f" {', '.join(names)}"
        )
      folders.append(path)
  return Data(tuple(folders), specs, "tfds:" in values)


def _expanded(spec: str, name: str) -> str:
  if not spec:
    raise UserError(f"--data={name}= must name a file, or a spec such as tfds:NAME:SPLIT")
  return spec if spec.startswith(tuple(f"{s}:" for s in _SCHEMES)) else os.path.expanduser(spec)


def find(data: Data, name: str, task: Task, *, train: bool) -> str | None:
  """The file or spec of a task's rows; None if there is none.

  Args:
    data: what --data says.
    name: of the task.
    task: whose file is looked for.
    train: whether it is the training split.
  Raises:
    UserError: several files could be meant.
  """
  key = f"{name}.train" if train else name
  if key in data.specs:
    return data.specs[key]
  for pattern in task.shot_files if train else task.files:
    for folder in data.folders:
      matches = [path for path in _files_below(folder) if _fits(path, folder, pattern)]
      if len(matches) > 1:
        shown = ", ".join(os.path.relpath(path, folder) for path in matches[:3])
        raise UserError(
          f"{name}: {len(matches)} files below {folder} may be its data ({shown}); say which with --data={key}=FILE"
        )
      if matches:
        return matches[0]
  of_tfds = task.tfds[train]
  return f"tfds:{of_tfds}" if data.tfds and of_tfds and _is_in_tfds(of_tfds) else None


def _files_below(folder: str) -> list[str]:
  found = []
  for path, folders, files in os.walk(folder):
    depth = len(pathlib.Path(path).relative_to(folder).parts)
    folders[:] = sorted(folders) if depth < _DEPTH else []
    found += [os.path.join(path, file) for file in sorted(files)]
  return found


def _fits(path: str, folder: str, pattern: str) -> bool:
  """Whether the end of a path has a task's name for it: `squad/dev*.json` fits `a/squad/dev-v2.0.json.gz`."""
  parts = pathlib.Path(path).relative_to(folder).as_posix().lower().split("/")
  for ending in _COMPRESSED:
    parts[-1] = parts[-1].removesuffix(ending)
  wanted = pattern.lower().split("/")
  # `--data` may be the folder of the task itself, whose name is then the last of the folder's.
  parts = [*pathlib.Path(folder).resolve().as_posix().lower().split("/"), *parts]
  ends = parts[-len(wanted) :]
  return all(fnmatch.fnmatchcase(*pair) for pair in zip(ends, wanted, strict=True))


def _is_in_tfds(name: str) -> bool:
  """Whether a data set of TensorFlow Datasets is prepared on this machine; nothing is downloaded."""
  import tensorflow_datasets as tfds

  try:
    tfds.data_source(name.rpartition(":")[0], split=name.rpartition(":")[2], download=False)
  except Exception:  # tfds raises many types for what is not there
    return False
  return True


def files(spec: str) -> list[str]:
  """The files that a spec reads; their checksums tell whether the data changed."""
  scheme, _, rest = spec.partition(":")
  if scheme not in _SCHEMES or os.path.exists(spec):
    return [spec]
  reader = READERS[scheme]
  return reader.files(*formats.split_options(rest, spec, None, reader.options))


def read(spec: str) -> Iterator[Row]:
  """The rows of a file or spec.

  Raises:
    BadRecord: a row is damaged; the message begins with its file and line.
    UserError: the file cannot be read.
  """
  scheme, colon, rest = spec.partition(":")
  is_path = os.path.exists(spec) or not colon or scheme not in _SCHEMES
  path = pathlib.Path(spec)
  ending = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
  if is_path and ending.lower() in _TABLES:
    yield from _table(path, _TABLES[ending.lower()])
    return
  if is_path:
    scheme, rest = ("parquet" if ending == ".parquet" else "jsonl"), spec
  reader = READERS[scheme]
  place, options = formats.split_options(rest, f"--data={spec}", None, reader.options)
  if scheme == "parquet":
    options = dataclasses.replace(options, columns={name: name for name in _columns(place)})
  asked = Request(place, options, "documents", "all", f"--data={spec}")
  rows, decode, _ = reader.read(asked)
  for where, raw in rows:
    yield Row(where, decode(raw, "documents", where))


def _columns(path: str) -> list[str]:
  """All columns of parquet files, which the reader asks for by name."""
  import pyarrow.parquet

  try:
    return [n for file in parquet_files(path)[:1] for n in pyarrow.parquet.read_schema(file).names]
  except (OSError, pyarrow.ArrowException) as error:
    raise UserError(f"cannot read {path}: {reason(error)}") from error


def _table(path: pathlib.Path, comma: str) -> Iterator[Row]:
  """The rows of a CSV or TSV file whose first line names the columns."""
  # Fields of a CSV file may hold newlines in quotes, so the file is decoded as a whole.
  try:
    lines = io.StringIO(_raw(path).decode("utf-8-sig"), newline="")
  except UnicodeDecodeError as error:
    raise UserError(f"cannot read {path}: not UTF-8 (byte {error.start + 1})") from error
  quoting = (
    csv.QUOTE_MINIMAL if comma == "," else csv.QUOTE_NONE
  )  # a quote in a TSV file is a letter
  csv.field_size_limit(_TABLE_BYTES)
  reader = csv.reader(lines, delimiter=comma, quoting=quoting, strict=comma == ",")
  names: list[str] = []
  try:
    for cells in reader:
      where = f"{path}:{reader.line_num}"
      if not any(cells):
        continue
      if not names:
        names = cells
      elif len(cells) != len(names):
        raise BadRecord(f"{where}: {len(cells)} columns, and the first line names {len(names)}")
      else:
        yield Row(where, dict(zip(names, cells, strict=True)))
  except csv.Error as error:
    raise BadRecord(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _raw(path: pathlib.Path) -> bytes:
  foreign.require_file(path)
  try:
    with text_files.opened(str(path)) as file:
      data = file.read(_TABLE_BYTES + 1)
  except (OSError, EOFError) as error:
    raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
  if len(data) > _TABLE_BYTES:
    raise UserError(
      f"{path} holds more than the {_TABLE_BYTES >> 20} MiB that a table may have; give it as JSON lines or parquet"
    )
  return data
