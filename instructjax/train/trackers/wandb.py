"""Weights & Biases, the extra `wandb`: one W&B run for a run of the main job. Called by `tracking`."""

import importlib
import os
import pathlib
import secrets
import struct
from collections.abc import Iterator, Mapping

from instructjax.core.errors import UserError
from instructjax.train.trackers import Ledger, Run, Status, TableRows

# Seconds that W&B has, at the end, to send what is left. It stays on the disk, from where `wandb sync` sends it.
_LAST_SECONDS = 60.0
_BLOCK = 32768  # bytes of a block of a .wandb file


def create(run: Run, before: Ledger | None) -> "Wandb":
  """Opens the run, or goes on with the one that the ledger names.

  Where the data go is W&B's own configuration (WANDB_MODE, WANDB_BASE_URL, WANDB_ENTITY and its settings files), unless
  `run.offline` keeps them in the workdir.

  Raises:
    UserError: W&B has no API key.
    Exception: whatever W&B raises, as without a network.
  """
  if run.offline:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would send its own errors
  wandb = importlib.import_module("wandb")
  # Without its lines in the terminal, and without reading what the run prints.
  settings = wandb.Settings(silent=True, console="off", finish_timeout=_LAST_SECONDS)
  shared = wandb.setup(settings).settings
  mode = "offline" if run.offline else shared.mode
  if mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
    raise UserError(
      "W&B has no API key: run `wandb login`, set WANDB_API_KEY, or keep it here with --config.log.offline=True"
    )
  project = run.project or shared.project or "instructjax"
  known = before if before and before.place == project else None
  opened = wandb.init(
    project=project,
    name=run.name,
    id=known.id if known else secrets.token_hex(6),
    resume="allow",
    dir=run.workdir,
    config=dict(run.config),
    allow_val_change=True,  # a resumed run may have other settings of execution
    mode=mode,
    settings=settings,
  )
  return Wandb(wandb, opened, project, _received(opened, run.workdir, known))


def _received(opened, workdir: pathlib.Path, known: Ledger | None) -> int:
  """How many rows W&B has. It writes seconds late, and what it has not written is lost with a killed process."""
  if known is None:
    return 0
  if opened.settings.mode == "disabled":
    return len(known.rows)
  if opened.settings.mode not in ("offline", "dryrun"):
    return opened.step  # of the server
  record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
  steps = [-1]
  for path in workdir.glob(f"wandb/*run-*-{known.id}/run-{known.id}.wandb"):
    for data in _records(path.read_bytes()):
      history = record_type.FromString(data).history
      steps += [int(i.value_json) for i in history.item if "_step" in (i.key, *i.nested_key)]
  return max(steps) + 1


def _records(data: bytes) -> Iterator[bytes]:
  """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format.

  Source: https://github.com/google/leveldb/blob/main/doc/log_format.md, in blocks of 32 KiB, the first of which begins
  with the header. W&B has no reader in Python.
  """
  at, record = 7, b""
  while at + 7 <= len(data):
    left = _BLOCK - at % _BLOCK
    if left < 7:  # too little for the next one's checksum, length and kind
      at += left
      continue
    length, kind = struct.unpack_from("<HB", data, at + 4)
    if kind == 0 or at + 7 + length > len(data):  # not written to its end
      return
    record += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # the whole record, or its last part
      yield record
      record = b""


class Wandb:
  """An open W&B run. Metrics are STAGE/NAME, drawn over STAGE/step: each stage counts its own steps."""

  def __init__(self, wandb, run, project: str, received: int):
    self._wandb, self._run, self.place, self.received = wandb, run, project, received
    self._calls = received  # the number of the next row, the same whether the rows before are here or on the server
    self._defined: set[str] = set()

  @property
  def id(self) -> str:
    return self._run.id

  @property
  def where(self) -> str:
    settings = self._run.settings
    if settings.mode == "disabled":
      return "disabled"
    if settings.mode in ("offline", "dryrun"):
      return f"offline; to send it: wandb sync {settings.sync_dir}"
    return self._run.url or ""

  def begin(self, stage: str, directory: pathlib.Path, start: int):
    """Nothing: a stage is known by its first metrics."""

  def log(self, stage: str, step: int, metrics: Mapping[str, float], rows: TableRows):
    """Adds a row to the run's history."""
    values = {f"{stage}/{name}": value for name, value in metrics.items()}
    if rows:
      values[f"{stage}/samples"] = self._table(rows)
    axis = f"{stage}/step"
    for name in values.keys() - self._defined:
      # One by one: a pattern for a stage would fit the metrics of its cross-validation folds too.
      self._run.define_metric(name, step_metric=axis)
      self._defined.add(name)
    self._send({**values, axis: step})

  def report(self, numbers: Mapping[str, float], tables: Mapping[str, TableRows]):
    """Writes numbers to the run's summary, and tables to its history."""
    self._run.summary.update(dict(numbers))
    self._send({name: self._table(rows) for name, rows in tables.items()})

  def close(self, status: Status):
    if status == "stopped":
      self._run.mark_preempting()  # the same command goes on with it
    self._run.finish(exit_code=0 if status == "finished" else 1)

  def _table(self, rows: TableRows):
    return self._wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])

  def _send(self, values: Mapping):
    if values:
      self._run.log(values, step=self._calls)
    self._calls += 1
