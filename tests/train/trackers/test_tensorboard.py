"""The event files of TensorBoard."""

import resource

import pytest
from tensorboardX.proto import event_pb2

from instructjax.train.trackers import Run
from instructjax.train.trackers.tensorboard import TensorBoard, create
from instructjax.train.tracking import Sender


def _write(directory, steps, *, start=0):
  board = TensorBoard()
  board.begin("sft", directory, start)
  for step in steps:
    board.log("sft", step, {"loss": step / 10}, [{"answer": "no table"}])
  board.report({"sft/loss": 1.0}, {"sft/findings": [{"a": 1}]})
  board.close("finished")


def _events(data):
  """TensorFlow's record format: 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
  while data:
    length = int.from_bytes(data[:8], "little")
    yield event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]


def test_the_steps_that_are_done_again_are_hidden(tmp_path):
  _write(tmp_path, [3], start=2)
  (events,) = tmp_path.glob("events*")
  records = list(_events(events.read_bytes()))
  assert records[0].file_version == "brain.Event:2"
  assert (records[1].step, records[1].session_log.status) == (3, event_pb2.SessionLog.START)
  (value,) = records[2].summary.value
  assert (records[2].step, value.tag) == (3, "loss") and value.simple_value == pytest.approx(0.3)
  assert len(records) == 3 and records[2].wall_time > 1e9


def test_each_stage_has_a_file_in_its_folder(tmp_path):
  board = TensorBoard()
  for stage in ("sft", "rm"):
    board.begin(stage, tmp_path / stage, 0)
    board.log(stage, 1, {"loss": 0.5}, ())
  board.close("finished")
  for stage in ("sft", "rm"):
    (events,) = (tmp_path / stage).glob("events*")
    assert [event.step for event in _events(events.read_bytes())] == [0, 1]


def test_it_keeps_no_ledger(tmp_path):
  run = Run("demo", "", tmp_path, {}, offline=False)
  told = []
  sender = Sender(create, run, None, told.append)
  sender.close("finished")
  assert not told and not list(tmp_path.iterdir())


def test_a_full_disk_raises(tmp_path):
  board = TensorBoard()
  board.begin("sft", tmp_path, 3)
  (events,) = tmp_path.glob("events*")
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
  try:
    with pytest.raises(OSError, match="File too large"):
      for step in range(4, 9):
        board.log("sft", step, {"a_long_name_of_a_metric": 0.5}, ())
    board.close("failed")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert events.stat().st_size <= 200
