"""The outer loop: exact resume after a kill, cadence, evaluation, what stops it, its refusals."""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instructjax.core.config import CheckpointConfig, LogConfig, ProfileConfig
from instructjax.core.errors import Preempted, StageStopped, UserError
from instructjax.core.structs import TrainState
from instructjax.parallel import distributed
from instructjax.train.damaged import saved_steps
from instructjax.train.loop import StageRun, fit
from instructjax.train.metrics import MEASURED, read_metrics
from instructjax.train.saved_state import read_meta
from instructjax.train.tracking import Tracking

TX = optax.adam(1e-2)
FINGERPRINT = {"config": "c" * 64, "reference": "r" * 64}
EXECUTION = {"execution.dtype": "float32", "execution.remat": "none", "ppo.packed_rows": 0}


class Rows:
  """Batches shuffled anew each pass, with a position that can be saved, as the pipeline's are.

  `kill_at` makes the process die by SIGKILL while that batch is drawn.
  """

  def __init__(self, kill_at=None):
    self._drawn, self._kill_at = 0, kill_at

  def __next__(self):
    self._drawn += 1
    if self._drawn == self._kill_at:
      os.kill(os.getpid(), signal.SIGKILL)
    epoch, row = divmod(self._drawn - 1, 5)
    return np.random.default_rng(epoch).permutation(5)[row].astype(np.float32)

  def get_state(self):
    return {"drawn": self._drawn}

  def set_state(self, state):
    self._drawn = state["drawn"]


def _state(seed=0):
  params = {"w_D": jax.random.normal(jax.random.key(seed), (16,))}
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=TX.init(params), key=jax.random.key(seed + 1)
  )


@functools.partial(jax.jit, donate_argnums=0)
def _step(state, x):
  """Noise from the state's key, Adam, a target from the batch: all that a resume can lose."""
  noise_D = jax.random.normal(jax.random.fold_in(state.key, state.step), (16,))
  loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w_D"] + 0.1 * noise_D - x) ** 2))(
    state.params
  )
  updates, opt_state = TX.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "kl": 10.0 * state.step}
  return TrainState(state.step + 1, params, opt_state, state.key), metrics


def _run(
  directory,
  *,
  every=3,
  keep=2,
  log=4,
  fingerprint=FINGERPRINT,
  profile="",
  libraries=(),
  tracking=None,
  **execution,
):
  return StageRun(
    started=0.0,
    name="toy",
    directory=pathlib.Path(directory),
    checkpoint=CheckpointConfig(every_steps=every, keep=keep),
    log=LogConfig(every_steps=log, samples=1, trackers=(), project="", run_name="", offline=True),
    profile=ProfileConfig(profile),
    tracking=Tracking(()) if tracking is None else tracking,
    fingerprint=fingerprint,
    files={},
    changeable={
      "rounding": EXECUTION | execution,
      "same numbers": {"ppo.max_kl": 1.0},
      "libraries": {"jax": "0.10.2", "numpy": "2.4.6"} | dict(libraries),
    },
  )


def _fit(directory, *, num_steps=10, step_fn=_step, batches=None, run=None, **kwargs):
  kwargs.setdefault("progress", False)
  run = run or _run(directory)
  return fit(run, _state(), step_fn, batches or Rows(), num_steps=num_steps, **kwargs)


def _bytes(state):
  leaves = (state.step, state.params, state.opt_state, jax.random.key_data(state.key))
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(leaves)]


def _records(directory):
  return [
    {k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in read_metrics(directory)
  ]


def killed_run(directory):
  """Entry of the subprocess below: dies while it draws the 9th batch."""
  _fit(directory, batches=Rows(kill_at=9), num_steps=10)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
  code = f"import test_loop; test_loop.killed_run({str(tmp_path / 'killed')!r})"
  here = pathlib.Path(__file__).parent
  path = os.pathsep.join([str(here), str(here.parents[1])])
  child = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
  assert child.returncode == -signal.SIGKILL
  assert saved_steps(tmp_path / "killed") and saved_steps(tmp_path / "killed")[-1] <= 6

  draws = Rows()
  resumed = _fit(tmp_path / "killed", batches=draws)
  whole = _fit(tmp_path / "whole")
  assert _bytes(resumed) == _bytes(whole)
  assert draws.get_state() == {"drawn": 10}
  assert _records(tmp_path / "killed") == _records(tmp_path / "whole")
  assert [record["step"] for record in _records(tmp_path / "whole")] == list(range(1, 11))


class Stopped(Exception):
  """Stands for whatever ends a run."""


class StoppedRows(Rows):
  """Ends the run while that batch is drawn."""

  def __init__(self, stop_at):
    super().__init__()
    self._stop_at = stop_at

  def __next__(self):
    if self._drawn + 1 == self._stop_at:
      raise Stopped
    return super().__next__()


STEPS = 7


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  return _bytes(_fit(folder, num_steps=STEPS)), (folder / "metrics.jsonl").read_bytes()


@settings(
  max_examples=8,
  deadline=None,
  database=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(stops=[6], every=3, keep=1)  # the line of step 4, after the checkpoint, is in the file
@given(
  stops=st.lists(st.integers(1, STEPS), max_size=3),
  every=st.integers(1, 4),
  keep=st.integers(1, 3),
)
def test_any_interruptions_come_to_the_same_bits(
  tmp_path_factory, uninterrupted, stops, every, keep
):
  """A run that is ended at the first of `stops`, gone on with and ended at the second, and so on."""
  folder = tmp_path_factory.mktemp("split")
  run = _run(folder, every=every, keep=keep)
  for stop in stops:  # a stop before the step that the run goes on from does not happen
    with contextlib.suppress(Stopped):
      _fit(folder, num_steps=STEPS, batches=StoppedRows(stop), run=run)
  state = _fit(folder, num_steps=STEPS, run=run)
  seconds = re.compile(rb', "(seconds|checkpoint/)[^"]*": [^,}]+')
  metrics = (folder / "metrics.jsonl").read_bytes()
  assert _bytes(state) == uninterrupted[0]
  assert seconds.sub(b"", metrics) == seconds.sub(b"", uninterrupted[1])


class ToldToStop(Rows):
  """SIGTERM comes while the 5th batch is drawn."""

  def __next__(self):
    if self._drawn == 4:
      os.kill(os.getpid(), signal.SIGTERM)
    return super().__next__()


def test_sigterm_saves_after_the_step_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
  monkeypatch.setattr(distributed, "_told_to_stop", threading.Event())
  before = signal.getsignal(signal.SIGTERM)
  try:
    distributed.join(None)
    with pytest.raises(Preempted, match="toy: told to stop .SIGTERM., saved at step 5; the same"):
      _fit(tmp_path / "told", batches=ToldToStop())
  finally:
    signal.signal(signal.SIGTERM, before)
  assert saved_steps(tmp_path / "told") == [3, 5]
  assert [record["step"] for record in _records(tmp_path / "told")] == [1, 2, 3, 4, 5]
  distributed._told_to_stop.clear()
  assert _bytes(_fit(tmp_path / "told")) == _bytes(_fit(tmp_path / "whole"))
  assert _records(tmp_path / "told") == _records(tmp_path / "whole")


def test_a_finished_stage_does_nothing_again(tmp_path, capsys):
  first = _fit(tmp_path)

  def never(state, batch):
    raise AssertionError("a step was run")

  again = _fit(tmp_path, step_fn=never, progress=True)
  assert _bytes(again) == _bytes(first)
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
  "changes, told",
  [
    ({}, ""),
    (
      {"execution.remat": "full"},
      "toy goes on with execution.remat=full (was none): results may differ by rounding only\n",
    ),
    (
      {"execution.dtype": "bfloat16", "ppo.packed_rows": 4},
      "toy goes on with execution.dtype=bfloat16 (was float32), ppo.packed_rows=4 (was 0): results"
      " may differ by rounding of bfloat16\n",
    ),
  ],
)
def test_a_run_that_goes_on_otherwise_says_so_in_one_line(tmp_path, capsys, changes, told):
  _fit(tmp_path, num_steps=4)
  _fit(tmp_path, run=_run(tmp_path, **changes), progress=True)
  printed = capsys.readouterr().out.splitlines(keepends=True)
  assert "".join(line for line in printed if "goes on" in line) == told
  assert read_meta(tmp_path, 10)["changeable"]["rounding"] == EXECUTION | changes


def test_a_run_that_goes_on_under_other_versions_says_so_in_one_line(tmp_path, capsys):
  _fit(tmp_path, num_steps=4)
  _fit(tmp_path, num_steps=7, run=_run(tmp_path), progress=True)
  assert "goes on" not in capsys.readouterr().out
  later = _run(tmp_path, libraries={"jax": "0.12.0", "flax": "0.13"})
  _fit(tmp_path, run=later, progress=True)
  told = [line for line in capsys.readouterr().out.splitlines() if "goes on" in line]
  assert told == [
    "toy goes on under jax 0.12.0 (was 0.10.2), flax 0.13 (was absent): results may differ from those of the"
    " old versions"
  ]
  assert read_meta(tmp_path, 10)["changeable"]["libraries"]["jax"] == "0.12.0"


def test_cadence_of_saving(tmp_path):
  _fit(tmp_path, keep_steps=(2, 5))
  assert saved_steps(tmp_path) == [2, 5, 9, 10]
  assert read_meta(tmp_path, 5)["fingerprint"] == FINGERPRINT
  record = _records(tmp_path)[4]
  assert {"step": 5, **read_meta(tmp_path, 5)["metrics"]} == record


def test_evaluation_is_logged_and_its_best_is_kept(tmp_path):
  seen = []

  def evaluate(state, step):
    assert int(state.step) == step
    seen.append(step)
    return {"loss": jnp.float32(abs(step - 4))}

  _fit(tmp_path, evaluate=evaluate, evaluate_steps=(0, 3, 4, 6, 9), best_metric="validation/loss")
  assert seen == [0, 3, 4, 6, 9]
  assert saved_steps(tmp_path) == [4, 9, 10]  # 4, saved only because it was evaluated, is the best
  found = {r["step"]: r["validation/loss"] for r in _records(tmp_path) if "validation/loss" in r}
  assert found == {0: 4.0, 3: 1.0, 4: 0.0, 6: 2.0, 9: 5.0}
  assert _records(tmp_path)[0] == {"step": 0, "validation/loss": 4.0}


@pytest.mark.parametrize("metric", ["loss", "grad_norm"])
def test_not_finite_stops_before_it_is_saved(tmp_path, metric):
  def step(state, x):
    number = int(state.step) + 1
    state, metrics = _step(state, x)
    if number == 6:  # a step at which it would be saved
      metrics[metric] = jnp.float32(jnp.nan)
    return state, metrics

  with pytest.raises(StageStopped) as stopped:
    _fit(tmp_path, step_fn=step)
  message = str(stopped.value)
  assert f"toy stopped at step 6: {metric} is nan" in message
  assert "step 3, is kept" in message
  assert "lower its learning rate" in message
  assert saved_steps(tmp_path) == [3]
  assert _records(tmp_path)[-1]["step"] == 5


@pytest.mark.parametrize(
  ("name", "value", "told"),
  [
    ("grad_norm", np.nan, "grad_norm is nan"),
    ("loss", -np.inf, "loss is -inf"),
    ("kl", 7.0, "kl is 7, above its limit 6"),
  ],
)
def test_a_step_between_two_saves_stops_the_run_too(tmp_path, name, value, told):
  """Bad at step 4 alone: at step 6, the next save, the numbers are good again."""

  def step(state, x):
    number = int(state.step) + 1
    state, metrics = _step(state, x)
    bad = {name: jnp.float32(value)} if number == 4 else {}
    return state, metrics | {"kl": jnp.float32(6.0)} | bad  # at its limit, not above

  with pytest.raises(StageStopped, match=f"toy stopped at step 4: {told}.*step 3, is kept"):
    _fit(tmp_path, step_fn=step, limits={"kl": 6.0})
  assert saved_steps(tmp_path) == [3]
  assert [record["step"] for record in _records(tmp_path)] == [1, 2, 3]


def test_a_limit_stops_with_its_advice(tmp_path):
  run = _run(tmp_path, fingerprint={})
  with pytest.raises(StageStopped, match="kl is 50, above its limit 45.*step 3, is kept"):
    _fit(tmp_path, run=run, limits={"kl": 45.0})
  assert saved_steps(tmp_path) == [3]
  with pytest.raises(StageStopped, match="Nothing was saved yet"):
    _fit(tmp_path / "other", limits={"kl": 5.0})


def test_a_validation_that_is_not_finite_stops(tmp_path):
  with pytest.raises(StageStopped, match="validation/loss is inf"):
    _fit(tmp_path, evaluate=lambda state, step: {"loss": np.inf}, evaluate_steps=(3,))
  assert saved_steps(tmp_path) == []


def test_another_run_is_refused(tmp_path):
  _fit(tmp_path, num_steps=3)
  run = _run(tmp_path, fingerprint=FINGERPRINT | {"reference": "x" * 64})
  with pytest.raises(
    ValueError, match=r"another reference \(rrrrrrrr, this run has xxxxxxxx\).*--workdir"
  ):
    _fit(tmp_path, run=run)
  with pytest.raises(ValueError, match="holds step 3, beyond num_steps=2"):
    _fit(tmp_path, num_steps=2)


def test_a_full_disk_names_the_path_and_the_run_goes_on_later(tmp_path, monkeypatch):
  usage, calls = shutil.disk_usage, []

  def disk_usage(path):
    calls.append(path)
    return usage(path)._replace(free=0) if len(calls) == full_at else usage(path)

  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", disk_usage)
    full_at = 1  # before the first step
    message = f"cannot write {tmp_path}/checkpoints/3: it needs .* MiB and the disk has 0.0 MiB"
    with pytest.raises(UserError, match=message):
      _fit(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    calls.clear()
    full_at = 3  # at the second save
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/checkpoints/6"):
      _fit(tmp_path)
  assert saved_steps(tmp_path) == [3]
  assert _bytes(_fit(tmp_path)) == _bytes(_fit(tmp_path / "whole"))


def test_metrics_are_fetched_one_step_late(tmp_path):
  order = []

  class Number:
    def __init__(self, step):
      self._step = step

    def __array__(self, dtype=None, copy=None):
      order.append(f"fetch {self._step}")
      return np.float32(self._step)

  def step(state, x):
    state, _ = _step(state, x)
    order.append(f"dispatch {int(state.step)}")
    return state, {"loss": Number(int(state.step))}

  _fit(tmp_path, step_fn=step, run=_run(tmp_path, every=100), num_steps=4)
  assert order == [
    "dispatch 1",
    "dispatch 2",
    "fetch 1",
    "dispatch 3",
    "fetch 2",
    "dispatch 4",
    "fetch 3",
    "fetch 4",
  ]


def test_a_state_on_a_cpu_is_waited_for_whatever_the_process_prefers(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with mock.patch.object(jax, "block_until_ready", side_effect=jax.block_until_ready) as wait:
    _fit(tmp_path, num_steps=3)
  assert sum(isinstance(call.args[0], TrainState) for call in wait.mock_calls) >= 3


def test_samples_add_metrics_and_are_shown_at_log_steps(tmp_path, capsys):
  def step(state, x):
    state, metrics = _step(state, x)
    return state, metrics, jnp.float32(x)

  def on_samples(samples, number):
    extra = {"length": float(samples), "ratio": float("nan")}
    return extra, [{"prompt": f"p{number}", "score": float(samples)}]

  _fit(tmp_path, step_fn=step, num_steps=5, on_samples=on_samples, progress=True, show=("loss",))
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in lines] == [
    "toy 4/5",
    "toy step 4",
    "toy 5/5",
    "toy step 5",
  ]
  assert "prompt: p4" in lines[1] and "loss" in lines[0] and "kl" not in lines[0]
  records = _records(tmp_path)
  assert all("length" in record and "ratio" not in record for record in records)


def test_traced_steps_change_nothing_and_are_summed_up(tmp_path):
  """From the second step after the resume on, since the first compiles."""
  whole = _fit(tmp_path / "whole")
  _fit(tmp_path / "traced", num_steps=3)
  run = _run(tmp_path / "traced", profile="2:7")
  kwargs = dict(flops=lambda metrics: 1e9 * metrics["loss"], run=run)
  assert _bytes(_fit(tmp_path / "traced", **kwargs)) == _bytes(whole)
  summary = json.loads((tmp_path / "traced" / "profile" / "summary.json").read_text())
  assert summary["steps"] == [5, 6]
  losses = [record["loss"] for record in _records(tmp_path / "whole")[4:6]]
  work = summary["model_flops_per_second"] * summary["seconds"]
  assert work == pytest.approx(1e9 * np.mean(losses))
  assert not (tmp_path / "whole" / "profile").exists()


def test_constants_stand_between_state_and_batch(tmp_path):
  step = jax.jit(lambda state, shift, x: _step(state, x + shift))
  moved = _fit(tmp_path / "a", step_fn=step, constants=(jnp.float32(1.0),))
  plain = _fit(tmp_path / "b", step_fn=lambda state, x: _step(state, x + np.float32(1.0)))
  assert _bytes(moved) == _bytes(plain)


def test_batches_are_placed(tmp_path):
  placed = []

  def place(batch):
    placed.append(batch)
    return jnp.asarray(batch)

  _fit(tmp_path, num_steps=3, place=place)
  assert len(placed) == 3
