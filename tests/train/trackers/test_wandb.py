"""Weights & Biases: what its library is told, by a stand-in; and what it wrote, by its own record types, where it is
installed.
"""

import importlib
import json
import sys
import types

import pytest

from instructjax.core.errors import UserError
from instructjax.train.trackers import Ledger, Run
from instructjax.train.trackers import wandb as tracker
from instructjax.train.tracking import Begun, Sender

ROWS = [{"prompt": "Say hi.", "answer": "Hi.", "score": 0.5}]


def _run(workdir, **changes):
  values = dict(name="demo", project="", workdir=workdir, config={"ppo": {"beta": 0.02}})
  return Run(**(values | dict(offline=True) | changes))


def _ledger(workdir, rows, place="instructjax"):
  ledger = Ledger(workdir / "wandb.jsonl", "abc", place)
  for step in range(rows):
    ledger.add("sft", step)
  return ledger


class FakeRun:
  """Stands for `wandb.Run`."""

  def __init__(self, module, mode, **init):
    self.id, self.url, self.told, self.init = init["id"], "https://wandb.example/run", [], init
    self.step = module.step
    self.settings = types.SimpleNamespace(mode=mode, sync_dir="there/offline-run-1")
    self.summary = types.SimpleNamespace(
      update=lambda values: self.told.append(("summary", values))
    )
    module.runs.append(self)

  def define_metric(self, name, step_metric):
    self.told.append(("define", name, step_metric))

  def log(self, values, step):
    self.told.append(("log", step, values))

  def mark_preempting(self):
    self.told.append(("preempting",))

  def finish(self, exit_code):
    self.told.append(("finish", exit_code))


@pytest.fixture
def fake(monkeypatch):
  """Stands for the package; `mode`, `project` and `has_key` are its own configuration."""
  module = types.SimpleNamespace(runs=[], mode="online", project=None, has_key=True, step=0)
  module.Settings = lambda **values: values
  module.setup = lambda settings: types.SimpleNamespace(
    settings=types.SimpleNamespace(mode=module.mode, project=module.project)
  )
  module.login = lambda prompt, verify: module.has_key
  module.Table = lambda columns, data: ("table", columns, data)
  module.init = lambda mode, **init: FakeRun(module, mode, **init)
  monkeypatch.setitem(sys.modules, "wandb", module)
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
  return module


def test_what_is_sent(tmp_path, fake):
  opened = tracker.create(_run(tmp_path, offline=False), None)
  opened.begin("rm/fold_1", tmp_path, 0)
  opened.log("rm/fold_1", 0, {"loss": 0.7}, ())
  opened.log("rm/fold_1", 5, {"loss": 0.5}, ROWS)
  opened.report({"rm/accuracy": 0.75}, {})
  opened.report({}, {"evaluate/findings": [{"finding": "length"}]})
  opened.close("finished")
  (run,) = fake.runs
  axis, table = (
    "rm/fold_1/step",
    ("table", ["prompt", "answer", "score"], [["Say hi.", "Hi.", 0.5]]),
  )
  assert run.told == [
    ("define", "rm/fold_1/loss", axis),
    ("log", 0, {"rm/fold_1/loss": 0.7, axis: 0}),
    ("define", "rm/fold_1/samples", axis),
    ("log", 1, {"rm/fold_1/loss": 0.5, "rm/fold_1/samples": table, axis: 5}),
    ("summary", {"rm/accuracy": 0.75}),
    ("summary", {}),
    ("log", 3, {"evaluate/findings": ("table", ["finding"], [["length"]])}),
    ("finish", 0),
  ]
  assert (run.init["name"], run.init["project"], run.init["dir"]) == (
    "demo",
    "instructjax",
    tmp_path,
  )
  assert run.init["config"] == {"ppo": {"beta": 0.02}} and run.init["resume"] == "allow"
  assert (opened.id, opened.place, opened.where) == (run.id, "instructjax", run.url)


def test_a_resumed_run_goes_on_under_its_id_and_row(tmp_path, fake):
  fake.step = 5  # of the server
  opened = tracker.create(_run(tmp_path, offline=False), _ledger(tmp_path, 7))
  assert opened.received == 5
  opened.log("sft", 3, {"loss": 0.5}, ())
  opened.close("stopped")
  assert opened.id == "abc" and fake.runs[0].told[1:] == [
    ("log", 5, {"sft/loss": 0.5, "sft/step": 3}),
    ("preempting",),
    ("finish", 1),
  ]
  other = tracker.create(_run(tmp_path, project="another"), _ledger(tmp_path, 7))
  assert other.id != "abc" and other.place == "another" and other.received == 0


@pytest.mark.parametrize(
  "ours, theirs, project", [("", None, "instructjax"), ("", "env", "env"), ("a", "env", "a")]
)
def test_the_project(tmp_path, fake, ours, theirs, project):
  fake.project = theirs
  assert tracker.create(_run(tmp_path, project=ours), None).place == project


def test_offline_needs_no_key_and_says_how_to_send_it(tmp_path, fake):
  fake.has_key = False
  by_setting = tracker.create(_run(tmp_path), None)
  fake.mode = "offline"
  by_environment = tracker.create(_run(tmp_path, offline=False), None)
  where = "offline; to send it: wandb sync there/offline-run-1"
  assert by_setting.where == by_environment.where == where
  fake.mode = "disabled"
  disabled = tracker.create(_run(tmp_path, offline=False), _ledger(tmp_path, 7))
  assert (disabled.where, disabled.received) == ("disabled", 7)


def test_without_a_key_nobody_is_asked_for_one(tmp_path, fake):
  fake.has_key = False
  with pytest.raises(
    UserError, match="W&B has no API key: run `wandb login`, set WANDB_API_KEY, or"
  ):
    tracker.create(_run(tmp_path, offline=False), None)
  assert not fake.runs


# --- the library itself ---------------------------------------------------------------------------


def _read(path):
  """By W&B's own reader, where this version has one in Python."""
  pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
  try:
    datastore = importlib.import_module("wandb.sdk.internal.datastore")
  except ImportError:
    return [pb.Record.FromString(data) for data in tracker._records(path.read_bytes())]
  store, result = datastore.DataStore(), []
  store.open_for_scan(str(path))
  while data := store.scan_data():
    result.append(pb.Record.FromString(data))
  return result


def _rows(records):
  items = lambda record: {
    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
    for item in record.history.item
  }
  return [items(record) for record in records if record.WhichOneof("record_type") == "history"]


def _file(records, cut=None):
  """A .wandb file by the description of its format: records as whole as the blocks of 32 KiB allow."""
  data = b":W&B" + b"\xe1\xbe\0"
  for record in records:
    first, left = True, record
    while first or left:
      room = 32768 - len(data) % 32768
      if room < 7:
        data += bytes(room)
        room = 32768
      part, left = left[: room - 7], left[room - 7 :]
      kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[
        first, not left
      ]
      data += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
      first = False
  return data[:cut]


@pytest.mark.parametrize(
  "sizes", [[], [5], [32754, 3, 40000], [32747, 9], [100_000, 1], [0, 32740]]
)
def test_records_across_blocks(sizes):
  records = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
  assert list(tracker._records(_file(records))) == records
  assert list(tracker._records(_file(records, -1))) == records[:-1]
  assert list(tracker._records(_file(records) + bytes(40))) == records  # zeros: never written


@pytest.mark.filterwarnings("ignore")
def test_what_the_library_writes_offline(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
  for name in ("WANDB_PROJECT", "WANDB_MODE", "WANDB_API_KEY"):
    monkeypatch.delenv(name, raising=False)
  ledger, told = tmp_path / "trackers" / "wandb.jsonl", []
  # The second process goes on after step 2 and does step 3 again.
  for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    sender = Sender(tracker.create, _run(tmp_path), ledger, told.append)
    past = [{"step": 1}] if start else []
    sender.begin(Begun("ppo", tmp_path / "ppo", start, past, is_new=not start))
    for step in steps:
      sender.log("ppo", step, {"reward": step / 4}, ROWS if step == 4 else ())
    sender.report({"evaluate/findings/length/holds": 1.0}, {})
    sender.close("finished")
  wandb.teardown()
  files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
  records = [record for path in files for record in _read(path)]
  rows = _rows(records)
  assert [(r["ppo/step"], r["ppo/reward"], r["_step"]) for r in rows] == [
    (1, 0.25, 0),
    (2, 0.5, 1),
    (3, 0.75, 2),
    (4, 1.0, 3),
  ]
  assert rows[-1]["ppo/samples._type"] == "table-file" or "ppo/samples" in rows[-1]
  runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
  assert len({run.run_id for run in runs}) == 1
  assert {(run.display_name, run.project) for run in runs} == {("demo", "instructjax")}
  config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
  assert config["ppo"] == {"beta": 0.02}
  metrics = {r.metric.name: r.metric.step_metric for r in records if r.metric.name}
  assert metrics["ppo/reward"] == "ppo/step"
  summary = [
    ".".join(item.nested_key) or item.key for record in records for item in record.summary.update
  ]
  assert "evaluate/findings/length/holds" in summary
  (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/ppo/samples*.json")
  assert json.loads(table.read_text())["data"] == [["Say hi.", "Hi.", 0.5]]
  assert len(told) == 2 and all("wandb sync" in line for line in told)
