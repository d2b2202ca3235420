"""MLflow: what its client is told, by a stand-in; and what its own client reads back, where it is installed."""

import json
import sys
import types

import pytest

from instructjax.train.trackers import Ledger, Run
from instructjax.train.trackers import mlflow as tracker
from instructjax.train.trackers.mlflow import allowed, flat
from instructjax.train.tracking import Begun, Sender

ROWS = [{"prompt": "Say hi.", "answer": "Hi.", "score": 0.5}]
CONFIG = {"ppo": {"beta": 0.02}, "log": {"trackers": ("mlflow",)}}


def _run(workdir, **changes):
  values = dict(name="demo", project="", workdir=workdir, config=CONFIG, offline=True)
  return Run(**(values | changes))


def _ledger(workdir, place):
  ledger = Ledger(workdir / "mlflow.jsonl", "old", place)
  for step in range(3):
    ledger.add("sft", step)
  return ledger


def _found(run_id, metrics):
  info = types.SimpleNamespace(run_id=run_id, experiment_id="7")
  return types.SimpleNamespace(info=info, data=types.SimpleNamespace(metrics=metrics))


class FakeClient:
  """Stands for `MlflowClient`; what was called is in `told`."""

  def __init__(self, tracking_uri):
    self.uri, self.told, self.metrics = tracking_uri, [], {}

  def get_experiment_by_name(self, name):
    return None

  def create_experiment(self, name, artifact_location):
    self.told.append(("experiment", name, artifact_location))
    return "7"

  def create_run(self, experiment, run_name):
    self.told.append(("run", experiment, run_name))
    return _found("abc", self.metrics)

  def update_run(self, run_id, status):
    self.told.append((run_id, status))

  def get_run(self, run_id):
    return _found(run_id, self.metrics)

  def log_batch(self, run_id, metrics=(), params=()):
    assert len(metrics) <= 1000 and len(params) <= 100
    self.metrics |= {name: value for name, value, _, _ in metrics}
    self.told += [(name, value, step) for name, value, _, step in metrics]
    self.told += [("param", *param) for param in params]

  def log_dict(self, run_id, values, file):
    self.told.append((file, json.loads(json.dumps(values))))

  def set_terminated(self, run_id, status):
    self.told.append((run_id, status))


@pytest.fixture
def fake(monkeypatch):
  """Stands for the package; its clients are in `clients`."""
  module = types.SimpleNamespace(clients=[], uri="http://me:secret@mlflow.example:5000")
  entities = types.SimpleNamespace(Metric=lambda *m: m, Param=lambda *p: p)
  module.entities, module.get_tracking_uri = entities, lambda: module.uri

  def client(tracking_uri):
    module.clients.append(FakeClient(tracking_uri))
    return module.clients[-1]

  module.MlflowClient = client
  monkeypatch.setitem(sys.modules, "mlflow", module)
  for name in (
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
  ):
    monkeypatch.delenv(name, raising=False)
  return module


def test_what_is_sent(tmp_path, fake):
  opened = tracker.create(_run(tmp_path, offline=False), None)
  (client,) = fake.clients
  assert client.told == [
    ("experiment", "instructjax", None),
    ("run", "7", "demo"),
    ("param", "ppo.beta", "0.02"),
    ("param", "log.trackers", "('mlflow',)"),
    ("config.json", {"ppo": {"beta": 0.02}, "log": {"trackers": ["mlflow"]}}),
  ]
  client.told.clear()
  opened.begin("ppo", tmp_path, 0)
  opened.log("ppo", 5, {"reward": 0.5}, ROWS)
  opened.report({"rm/accuracy": 0.75}, {"evaluate/findings": [{"finding": "length"}]})
  opened.report(
    {"rm/accuracy": 0.75, "rm/pairs": 8.0}, {}
  )  # evaluated again: the same is not said twice
  opened.close("stopped")
  table = {"columns": ["prompt", "answer", "score"], "data": [["Say hi.", "Hi.", 0.5]]}
  assert client.told == [
    ("ppo/reward", 0.5, 5),
    ("ppo/samples/00000005.json", table),
    ("rm/accuracy", 0.75, 0),
    ("evaluate/findings.json", {"columns": ["finding"], "data": [["length"]]}),
    ("rm/pairs", 8.0, 0),
    ("abc", "KILLED"),
  ]


def test_where_never_shows_a_password(tmp_path, fake):
  opened = tracker.create(_run(tmp_path, offline=False), None)
  assert fake.clients[0].uri == fake.uri
  assert opened.where == "http://mlflow.example:5000/#/experiments/7/runs/abc"
  assert opened.place == "http://mlflow.example:5000, experiment instructjax"


def test_a_resumed_run_goes_on_under_its_id(tmp_path, fake):
  first = tracker.create(_run(tmp_path, offline=False), None)
  again = tracker.create(_run(tmp_path, offline=False), _ledger(tmp_path, first.place))
  assert (again.id, again.received) == ("old", 3)
  assert fake.clients[1].told[0] == ("old", "RUNNING") and len(fake.clients[1].told) == 2
  moved = tracker.create(_run(tmp_path), _ledger(tmp_path, first.place))
  assert moved.id == "abc"


def test_offline_is_the_workdir(tmp_path, fake):
  opened = tracker.create(_run(tmp_path), None)
  (client,) = fake.clients
  assert client.uri == f"sqlite:///{tmp_path}/mlflow.db"
  assert client.told[0] == ("experiment", "instructjax", f"file://{tmp_path}/mlartifacts")
  assert opened.where == f"sqlite:///{tmp_path}/mlflow.db, experiment instructjax, run abc"


def test_a_local_file_is_the_same_from_another_folder(tmp_path, fake, monkeypatch):
  monkeypatch.chdir(tmp_path)
  fake.uri = "sqlite:///mlflow.db"
  opened = tracker.create(_run(tmp_path, offline=False), None)
  assert opened.place == f"sqlite:///{tmp_path}/mlflow.db, experiment instructjax"
  assert fake.clients[0].uri == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize(
  "ours, theirs, name", [("", "env", "env"), ("a", "env", "a"), ("", "", "instructjax")]
)
def test_the_experiment(tmp_path, fake, monkeypatch, ours, theirs, name):
  monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", theirs)
  tracker.create(_run(tmp_path, project=ours), None)
  assert fake.clients[0].told[0][1] == name


def test_limits_of_a_request(tmp_path, fake):
  config = {"block": {f"field{i}": i for i in range(230)} | {"long": "x" * 9000}}
  opened = tracker.create(_run(tmp_path, config=config), None)
  opened.log("ppo", 1, {f"metric{i}": 1.0 for i in range(1500)}, ())
  told = fake.clients[0].told  # the client itself asserts the limits
  assert len([call for call in told if call[0] == "param"]) == 231
  assert len([call for call in told if call[-1] == 1]) == 1500
  assert len(flat(config)["block.long"]) == 6000


def test_names():
  assert allowed("ppo/seconds/process_0") == "ppo/seconds/process_0"
  assert allowed("python:a.b:é(x)") == "python_a.b___x_"


@pytest.mark.filterwarnings("ignore")
def test_what_its_own_client_reads_back(tmp_path, monkeypatch):
  mlflow = pytest.importorskip("mlflow")
  for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_TRACKING_URI"):
    monkeypatch.delenv(name, raising=False)
  ledger, told = tmp_path / "trackers" / "mlflow.jsonl", []
  # The second process goes on after step 2 and does step 3 again.
  for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    sender = Sender(tracker.create, _run(tmp_path), ledger, told.append)
    past = [{"step": 1}] if start else []
    sender.begin(Begun("ppo", tmp_path / "ppo", start, past, is_new=not start))
    for step in steps:
      sender.log("ppo", step, {"reward": step / 4}, ROWS if step == 4 else ())
    sender.report(
      {"evaluate/findings/length/holds": 1.0}, {"evaluate/findings": [{"finding": "a"}]}
    )
    sender.close("finished")
  client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
  experiment = client.get_experiment_by_name("instructjax")
  (run,) = client.search_runs([experiment.experiment_id])
  history = client.get_metric_history(run.info.run_id, "ppo/reward")
  assert [(point.step, point.value) for point in history] == [
    (1, 0.25),
    (2, 0.5),
    (3, 0.75),
    (4, 1.0),
  ]
  assert len(client.get_metric_history(run.info.run_id, "evaluate/findings/length/holds")) == 1
  assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
  assert run.data.params == {"ppo.beta": "0.02", "log.trackers": "('mlflow',)"}
  table = client.download_artifacts(run.info.run_id, "ppo/samples/00000004.json", str(tmp_path))
  with open(table) as file:
    assert json.load(file)["data"] == [["Say hi.", "Hi.", 0.5]]
  assert len(told) == 2 and all(run.info.run_id in line for line in told)
