"""TensorBoard: an event file in each stage's folder. Called by `tracking`."""

import importlib
import io
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from instructjax.train.trackers import Ledger, Run, Status, TableRows


def create(run: Run, before: Ledger | None) -> "TensorBoard":
  """The tracker of a run, which needs to know nothing of it: a stage's folder is all."""
  del run, before
  return TensorBoard()


class TensorBoard:
  """Writes scalars for TensorBoard.

  Not with tensorboardX's own writers: one writes in a thread, which prints a traceback on a full disk, and the other
  waits for the disk at every flush.
  """

  id = place = where = ""
  received = 0

  def __init__(self):
    # Here, because importing it takes most of a second. By its name, because no type checker sees its classes.
    self._proto = importlib.import_module("tensorboardX.proto.event_pb2")
    self._file: io.FileIO | None = None

  def begin(self, stage: str, directory: pathlib.Path, start: int):
    """Opens a file in the stage's folder."""
    del stage
    self._close()
    directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    self._file = open(directory / name, "ab", buffering=0)
    self._append(self._proto.Event(wall_time=time.time(), file_version="brain.Event:2"))
    if start:  # TensorBoard hides what earlier files say of the steps from here on
      again = self._proto.SessionLog(status=self._proto.SessionLog.START)
      self._append(self._proto.Event(step=start + 1, session_log=again))

  def log(self, stage: str, step: int, metrics: Mapping[str, float], rows: TableRows):
    """Appends an event for each metric. Samples are in the terminal only: TensorBoard has no tables."""
    from tensorboardX import summary

    del stage, rows
    for name, value in metrics.items():
      scalar = summary.scalar(name, value)
      self._append(self._proto.Event(wall_time=time.time(), step=step, summary=scalar))

  def report(self, numbers: Mapping[str, float], tables: Mapping[str, TableRows]):
    """Nothing: what is measured once is no curve."""

  def close(self, status: Status):
    del status
    self._close()

  def _close(self):
    if self._file:
      self._file.close()

  def _append(self, event: Any):
    """Writes in TensorFlow's record format: length, its checksum, the event, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    if self._file is None:
      raise ValueError("no stage has begun")
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    record = length + sums[0] + data + sums[1]
    while record:  # a disk that is nearly full takes a part first, and refuses the rest
      record = record[self._file.write(record) :]
