"""What trackers are given: every step once over all processes of a run; and that none of them can stop or delay one."""

import dataclasses
import json
import threading
import time

import pytest

from instructjax.core import config as config_lib
from instructjax.core import results
from instructjax.core.errors import Preempted, UserError
from instructjax.train import tracking
from instructjax.train.metrics import MetricsWriter
from instructjax.train.trackers import Ledger, Run, read_ledger
from instructjax.train.tracking import Sender, Tracking, Worker, flat_numbers
from tests.core.plain import load

ROWS = [{"prompt": "Say hi.", "answer": "Hi."}]


class Server:
  """A tracker's server, which keeps what it was sent; its runs have the ids run0, run1, ..."""

  def __init__(self, place="here"):
    self.runs, self.place = {}, place

  def create(self, run, before):
    known = before if before and before.place == self.place else None
    return Client(self, known.id if known else f"run{len(self.runs)}")

  def lose(self, count):
    """The last rows of the first run never arrived."""
    del self.runs["run0"]["rows"][-count:]
    kept = [row for row in self.runs["run0"]["rows"] if row]
    self.runs["run0"]["logged"][:] = kept

  def steps(self, name="run0"):
    return [(stage, step) for stage, step, _, _ in self.runs[name]["logged"]]


class Client:
  """Sends to a `Server`."""

  def __init__(self, server, name):
    self.id, self.place, self.where = name, server.place, f"at {name}"
    empty = {"logged": [], "reported": [], "ended": [], "rows": []}
    self.run = server.runs.setdefault(name, empty)
    self.received = len(self.run["rows"])

  def begin(self, stage, directory, start):
    pass

  def log(self, stage, step, metrics, rows):
    self.run["logged"].append((stage, step, dict(metrics), list(rows)))
    self.run["rows"].append(self.run["logged"][-1])

  def report(self, numbers, tables):
    self.run["reported"].append((dict(numbers), dict(tables)))
    self.run["rows"].append(None)

  def close(self, status):
    self.run["ended"].append(status)


class Process:
  """One process of a run whose steps lose step / 10; its lines are in `told`."""

  def __init__(self, workdir, server, *, is_final=True, every=1):
    self.workdir, self.every, self.told = workdir, every, []
    run = Run("demo", "", workdir, {"seed": 0}, offline=False)
    ledger = workdir / "trackers" / "fake.jsonl" if is_final else None
    make = lambda tell: Sender(server.create, run, ledger, tell)
    worker = Worker("fake", make, is_final=is_final, tell=self.told.append)
    self.tracking = Tracking([worker], self.told.append)

  def train(self, stage, start, steps, loss=lambda step: step / 10, rows=()):
    folder = self.workdir / stage
    self.tracking.begin(stage, folder, start, lambda step: step % self.every == 0)
    writer = MetricsWriter(folder, start_step=start)
    for step in steps:
      line = {"loss": loss(step), "seconds": time.monotonic()}
      writer.write(step, line)
      self.tracking.log(stage, step, line, rows)
    writer.close()

  def end(self, error=None):
    self.tracking.__exit__(type(error) if error else None, error, None)
    return self.told


def test_metrics_samples_results_and_the_end(tmp_path):
  server = Server()
  process = Process(tmp_path, server)
  process.train("sft", 0, [0, 1], rows=ROWS)
  process.tracking.report("sft", {"loss": 1.5}, {"findings": ROWS, "empty": []})
  assert process.end() == ["fake: at run0"]
  run = server.runs["run0"]
  assert server.steps() == [("sft", 0), ("sft", 1)]
  assert run["logged"][1][2]["loss"] == 0.1 and run["logged"][1][3] == ROWS
  assert run["reported"] == [({"sft/loss": 1.5}, {"sft/findings": ROWS})]
  assert run["ended"] == ["finished"]
  lines = (tmp_path / "trackers/fake.jsonl").read_text().splitlines()
  assert list(map(json.loads, lines)) == [
    {"id": "run0", "place": "here"},
    ["sft", 0],
    ["sft", 1],
    ["", 0],
  ]


def test_steps_that_a_resumed_run_does_again_are_sent_once(tmp_path):
  """Killed at step 7 with a checkpoint of step 4, and again at step 6 of it; the third process comes to step 9."""
  server = Server()
  for start, stop in ((0, 7), (4, 6), (4, 9)):
    process = Process(tmp_path, server)
    process.train("ppo", start, range(start + 1, stop + 1))
    assert process.end() == ["fake: at run0"]
  assert server.steps() == [("ppo", step) for step in range(1, 10)]
  assert list(server.runs) == ["run0"]


@pytest.mark.parametrize("lost", range(9))
def test_what_never_arrived_is_sent_again(tmp_path, lost):
  """Killed at step 3 of ppo_ptx with a checkpoint of step 2; W&B had not written its last rows yet."""
  server = Server()
  first = Process(tmp_path, server)
  first.train("ppo", 0, [1, 2, 3, 4])
  first.tracking.report("ppo", {"done": 1.0})
  first.train("ppo_ptx", 0, [1, 2, 3])
  first.end()
  if lost:
    server.lose(lost)
  second = Process(tmp_path, server)
  second.train("ppo_ptx", 2, [3, 4])
  second.end()
  steps = [("ppo", step) for step in range(1, 5)] + [("ppo_ptx", step) for step in range(1, 5)]
  assert server.steps() == steps
  assert all(row[2]["loss"] == row[1] / 10 for row in server.runs["run0"]["logged"])
  assert len(read_ledger(tmp_path / "trackers/fake.jsonl").rows) == len(server.runs["run0"]["rows"])


def test_a_killed_run_without_a_checkpoint_goes_on_too(tmp_path):
  server = Server()
  for stop in (5, 8):
    process = Process(tmp_path, server)
    process.train("ppo", 0, range(stop))
    process.end()
  assert server.steps() == [("ppo", step) for step in range(8)]


def test_other_numbers_after_a_resume_are_told_of_once(tmp_path):
  server = Server()
  first = Process(tmp_path, server)
  first.train("ppo", 0, range(1, 8))
  first.end()
  second = Process(tmp_path, server)
  second.train("ppo", 4, range(5, 10), loss=lambda step: step / 10 + (step > 5) * 1e-6)
  line = (
    "ppo: from step 6 on, steps that are done again come to other numbers than before the run was resumed; fake keep"
    " the old ones of these steps, metrics.jsonl has the new"
  )
  assert sorted(second.end()) == ["fake: at run0", line]
  assert [row[2]["loss"] for row in server.runs["run0"]["logged"]][5:7] == [0.6, 0.7]


def test_a_tracker_that_can_take_steps_twice_gets_them(tmp_path):
  server = Server()
  for start, stop in ((0, 3), (2, 4)):
    process = Process(tmp_path, server, is_final=False)
    process.train("ppo", start, range(start + 1, stop + 1), loss=lambda step, stop=stop: stop)
    assert len(process.end()) == 1
  assert [step for _, step in server.steps() + server.steps("run1")] == [1, 2, 3, 3, 4]
  assert not (tmp_path / "trackers").exists()


def test_a_stage_that_is_trained_anew_begins_a_new_run(tmp_path):
  server = Server()
  first = Process(tmp_path, server)
  first.train("sft", 0, [1, 2])
  first.train("rm", 0, [1, 2])
  first.end()
  (tmp_path / "rm/metrics.jsonl").unlink()
  second = Process(tmp_path, server)
  second.train("rm", 0, [1, 2, 3])
  told = second.end()
  assert "fake: rm is trained anew, which begins a new run" in told and "fake: at run1" in told
  assert server.steps("run0") == [("sft", 1), ("sft", 2), ("rm", 1), ("rm", 2)]
  assert server.steps("run1") == [("rm", 1), ("rm", 2), ("rm", 3)]


def test_another_place_begins_a_new_run(tmp_path):
  for server in (Server("here"), Server("there")):
    process = Process(tmp_path, server)
    process.train("sft", 0, [1])
    process.end()
  assert server.steps() == [("sft", 1)]
  assert read_ledger(tmp_path / "trackers/fake.jsonl").place == "there"


def test_a_tracker_that_is_switched_on_late_gets_the_steps_before(tmp_path):
  folder = tmp_path / "ppo"
  writer = MetricsWriter(folder, start_step=0)
  for step in range(1, 6):
    writer.write(step, {"loss": step / 10, **({"validation/loss": 2.0} if step == 3 else {})})
  writer.close()
  server = Server()
  process = Process(tmp_path, server, every=2)
  process.train("ppo", 4, [5, 6])
  process.end()
  assert server.steps() == [("ppo", 2), ("ppo", 3), ("ppo", 4), ("ppo", 6)]
  assert server.runs["run0"]["logged"][1][2] == {"loss": 0.3, "validation/loss": 2.0}


def test_points_are_due_or_evaluated(tmp_path):
  server = Server()
  process = Process(tmp_path, server, every=4)
  process.tracking.begin("sft", tmp_path, 0, lambda step: step % 4 == 0)
  for step in range(1, 5):
    extra = {"validation/loss": 1.0} if step == 3 else {}
    process.tracking.log("sft", step, {"loss": 1.0, **extra}, ())
  process.end()
  assert server.steps() == [("sft", 3), ("sft", 4)]


@pytest.mark.parametrize("call", ["create", "begin", "log", "report", "close"])
def test_a_tracker_that_fails_is_off_and_told_of_once(tmp_path, monkeypatch, call):
  server = Server()

  def fail(*args):
    raise ConnectionError("no network\nand more")

  monkeypatch.setattr(*((server, "create", fail) if call == "create" else (Client, call, fail)))
  process = Process(tmp_path, server)
  process.train("sft", 0, [1, 2, 3])
  process.tracking.report("sft", {"loss": 1.0})
  off = "fake: off from here on, the run goes on without it: no network"
  assert [line for line in process.end() if line != "fake: at run0"] == [off]


def test_one_that_fails_leaves_the_others_on(tmp_path):
  server = Server()
  run = Run("demo", "", tmp_path, {}, offline=False)

  def broken(tell):
    raise OSError(28, "No space left on device")

  told = []
  workers = [
    Worker("broken", broken, is_final=True, tell=told.append),
    Worker(
      "good", lambda tell: Sender(server.create, run, None, tell), is_final=False, tell=told.append
    ),
  ]
  with Tracking(workers, told.append) as tracked:
    tracked.begin("sft", tmp_path, 0, lambda step: True)
    tracked.log("sft", 1, {"loss": 1.0}, ())
  assert server.steps() == [("sft", 1)]
  assert sum("No space left" in line for line in told) == 1


def test_a_tracker_that_hangs_delays_the_end_by_its_patience_only(tmp_path, monkeypatch):
  release = threading.Event()
  monkeypatch.setattr(tracking, "_PATIENCE", {"finished": 0.2, "failed": 0.1, "stopped": 0.1})
  monkeypatch.setattr(tracking, "_MOST", 3)
  monkeypatch.setattr(Client, "log", lambda *args: release.wait(20))
  process = Process(tmp_path, Server())
  before = time.monotonic()
  process.train("sft", 0, [1])
  told = process.end()
  assert time.monotonic() - before < 10
  assert (
    told[-1]
    == "fake: off from here on, the run goes on without it: it has not taken everything within 0 s"
  )
  release.set()


def test_a_tracker_that_is_too_slow_is_off(tmp_path, monkeypatch):
  release = threading.Event()
  monkeypatch.setattr(tracking, "_MOST", 3)
  monkeypatch.setattr(Client, "log", lambda *args: release.wait(20))
  process = Process(tmp_path, Server())
  process.train("sft", 0, range(1, 9))
  assert (
    "fake: off from here on, the run goes on without it: it is too slow, and 3 calls wait"
    in process.told
  )
  release.set()


@pytest.mark.parametrize(
  "error, status",
  [
    (None, "finished"),
    (Preempted("told to stop"), "stopped"),
    (KeyboardInterrupt(), "stopped"),
    (UserError("the loss is NaN"), "failed"),
  ],
)
def test_how_a_run_ended(tmp_path, error, status):
  server = Server()
  process = Process(tmp_path, server)
  process.train("sft", 0, [1])
  process.end(error)
  assert server.runs["run0"]["ended"] == [status]


def test_a_run_with_nothing_to_do_opens_nothing(tmp_path):
  server = Server()
  process = Process(tmp_path, server)
  process.tracking.report("collect", results.Nothing())
  assert process.end() == [] and not server.runs


def test_flat_numbers_hand_worked():
  judged = results.Judgement(
    accuracy=0.75,
    accuracy_stderr=float("nan"),
    pairs=8,
    prompts=4,
    score_std=1.5,
    calibration=results.Calibration((0.5, 0.9), (0.5, 1.0), (4, 4), 0.1),
  )
  measured = results.RewardModel(0.25, judged, None, (results.Fold(0.5, 0.625),))
  assert flat_numbers(measured) == {
    "demonstration_mean": 0.25,
    "validation/accuracy": 0.75,
    "validation/pairs": 8.0,
    "validation/prompts": 4.0,
    "validation/score_std": 1.5,
    "validation/calibration/expected_error": 0.1,
    "cross_validation/1/heldout": 0.5,
    "cross_validation/1/train": 0.625,
  }
  assert flat_numbers({"a": {"holds": True, "missing": None, "text": "no"}}) == {"a/holds": 1.0}


HEAD = '{"id": "run7", "place": "here"}\n'


def test_a_ledger_survives_a_round_trip(tmp_path):
  path = tmp_path / "trackers" / "fake.jsonl"
  ledger = Ledger(path, "run7", "here")
  ledger.write()
  ledger.add("sft", 3)
  ledger.add("", 0)
  again = read_ledger(path)
  assert (again.id, again.place, again.rows) == ("run7", "here", [("sft", 3), ("", 0)])
  assert again.has("sft", 3) and not again.has("sft", 2)
  assert again.has_any("sft") and not again.has_any("rm")
  assert again.cut(1) == [("", 0)] and read_ledger(path).rows == [("sft", 3)]


@pytest.mark.parametrize(
  "text", ["", "{", "[]", "5", '{"id": 1}', '{"id": 1, "place": ""}', "[" * 100_000, "\0\0\n"]
)
def test_a_damaged_ledger_begins_a_new_run(tmp_path, text):
  path = tmp_path / "fake.jsonl"
  path.write_text(text)
  assert read_ledger(path) is None


@pytest.mark.parametrize(
  "end", ['["sft"', '["sft", null]\n', "[1, 2]\n", "5\n", "null\n", "\0\0", "[" * 100_000]
)
def test_a_ledger_ends_before_a_damaged_line(tmp_path, end):
  path = tmp_path / "trackers" / "fake.jsonl"
  path.parent.mkdir()
  path.write_text(HEAD + '["sft", 1]\n' + end)
  assert read_ledger(path).rows == [("sft", 1)]
  server = Server()
  server.runs["run7"] = {"logged": [], "reported": [], "ended": [], "rows": [None]}
  process = Process(tmp_path, server)
  process.train("rm", 0, [2])
  process.end()
  assert read_ledger(path).rows == [("sft", 1), ("rm", 2)]


def _config(*trackers, **log):
  config = config_lib.from_config_dict(load())
  return dataclasses.replace(config, log=dataclasses.replace(config.log, trackers=trackers, **log))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_extra_is_named_at_the_start(tmp_path, monkeypatch, name):
  (tmp_path / name).mkdir()  # a folder in the working directory is not the package
  monkeypatch.syspath_prepend(tmp_path)
  real = tracking.importlib.util.find_spec
  hidden = lambda module: real(module) if module != name else type("Spec", (), {"origin": None})
  monkeypatch.setattr(tracking.importlib.util, "find_spec", hidden)
  with pytest.raises(UserError) as raised:
    tracking.open_run(_config("tensorboard", name), tmp_path)
  assert str(raised.value) == (
    f"config.log.trackers=('tensorboard', '{name}') needs the {name} extra: pip install 'instructjax[{name}]', or"
    f" leave {name} out"
  )


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
  monkeypatch.setattr(tracking.jax, "process_index", lambda: 1)
  with tracking.open_run(_config("tensorboard", "wandb"), tmp_path) as tracked:
    tracked.begin("sft", tmp_path, 0, lambda step: True)
    tracked.log("sft", 1, {"loss": 1.0}, ())
  assert not list(tmp_path.iterdir())


def test_tensorboard_by_config(tmp_path, capsys):
  with tracking.open_run(_config("tensorboard"), tmp_path) as tracked:
    tracked.begin("sft", tmp_path / "sft", 0, lambda step: True)
    tracked.log("sft", 1, {"loss": 1.0}, ())
  (events,) = (tmp_path / "sft").glob("events*")
  assert b"loss" in events.read_bytes()
  assert capsys.readouterr().out == ""


def test_the_run_is_named_by_its_workdir_or_by_config(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(tracking, "_worker", lambda name, run: seen.append(run))
  tracking.open_run(_config("wandb"), tmp_path / "demo") if _has("wandb") else None
  tracking.open_run(_config("tensorboard"), tmp_path / "demo")
  tracking.open_run(_config("tensorboard", run_name="mine", project="ours"), tmp_path / "demo")
  assert [run.name for run in seen[-2:]] == ["demo", "mine"] and seen[-1].project == "ours"
  json.dumps(seen[-1].config)  # services take it as JSON


def _has(name):
  found = tracking.importlib.util.find_spec(name)
  return found is not None and found.origin is not None
