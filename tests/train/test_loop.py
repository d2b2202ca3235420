"""The outer loop: exact resume after a kill, cadence, evaluation, what stops it, its refusals."""

import contextlib
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
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instructjax.core.errors import Preempted, StageStopped, UserError
from instructjax.core.structs import TrainState
from instructjax.parallel import distributed
from instructjax.train.damaged import saved_steps
from instructjax.train.saved_state import read_meta
from tests.train import toy


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
  code = f"from tests.train import toy; toy.killed_run({str(tmp_path / 'killed')!r})"
  path = str(pathlib.Path(__file__).parents[2])
  child = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
  assert child.returncode == -signal.SIGKILL
  assert saved_steps(tmp_path / "killed") and saved_steps(tmp_path / "killed")[-1] <= 6

  draws = toy.Rows()
  resumed = toy.train(tmp_path / "killed", batches=draws)
  whole = toy.train(tmp_path / "whole")
  assert toy.bytes_of(resumed) == toy.bytes_of(whole)
  assert draws.get_state() == {"drawn": 10}
  assert toy.records(tmp_path / "killed") == toy.records(tmp_path / "whole")
  assert [record["step"] for record in toy.records(tmp_path / "whole")] == list(range(1, 11))


class Stopped(Exception):
  """Stands for whatever ends a run."""


class StoppedRows(toy.Rows):
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
  return toy.bytes_of(toy.train(folder, num_steps=STEPS)), (folder / "metrics.jsonl").read_bytes()


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
  run = toy.stage_run(folder, every=every, keep=keep)
  for stop in stops:  # a stop before the step that the run goes on from does not happen
    with contextlib.suppress(Stopped):
      toy.train(folder, num_steps=STEPS, batches=StoppedRows(stop), run=run)
  state = toy.train(folder, num_steps=STEPS, run=run)
  seconds = re.compile(rb', "(seconds|checkpoint/)[^"]*": [^,}]+')
  metrics = (folder / "metrics.jsonl").read_bytes()
  assert toy.bytes_of(state) == uninterrupted[0]
  assert seconds.sub(b"", metrics) == seconds.sub(b"", uninterrupted[1])


class ToldToStop(toy.Rows):
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
      toy.train(tmp_path / "told", batches=ToldToStop())
  finally:
    signal.signal(signal.SIGTERM, before)
  assert saved_steps(tmp_path / "told") == [3, 5]
  assert [record["step"] for record in toy.records(tmp_path / "told")] == [1, 2, 3, 4, 5]
  distributed._told_to_stop.clear()
  assert toy.bytes_of(toy.train(tmp_path / "told")) == toy.bytes_of(toy.train(tmp_path / "whole"))
  assert toy.records(tmp_path / "told") == toy.records(tmp_path / "whole")


def test_a_finished_stage_does_nothing_again(tmp_path, capsys):
  first = toy.train(tmp_path)

  def never(state, batch):
    raise AssertionError("a step was run")

  again = toy.train(tmp_path, step_fn=never, progress=True)
  assert toy.bytes_of(again) == toy.bytes_of(first)
  assert capsys.readouterr().out == ""


def test_cadence_of_saving(tmp_path):
  toy.train(tmp_path, keep_steps=(2, 5))
  assert saved_steps(tmp_path) == [2, 5, 9, 10]
  assert read_meta(tmp_path, 5)["fingerprint"] == toy.FINGERPRINT
  record = toy.records(tmp_path)[4]
  assert {"step": 5, **read_meta(tmp_path, 5)["metrics"]} == record


def test_evaluation_is_logged_and_its_best_is_kept(tmp_path):
  seen = []

  def evaluate(state, step):
    assert int(state.step) == step
    seen.append(step)
    return {"loss": jnp.float32(abs(step - 4))}

  toy.train(
    tmp_path, evaluate=evaluate, evaluate_steps=(0, 3, 4, 6, 9), best_metric="validation/loss"
  )
  assert seen == [0, 3, 4, 6, 9]
  assert saved_steps(tmp_path) == [4, 9, 10]  # 4, saved only because it was evaluated, is the best
  found = {r["step"]: r["validation/loss"] for r in toy.records(tmp_path) if "validation/loss" in r}
  assert found == {0: 4.0, 3: 1.0, 4: 0.0, 6: 2.0, 9: 5.0}
  assert toy.records(tmp_path)[0] == {"step": 0, "validation/loss": 4.0}


@pytest.mark.parametrize("metric", ["loss", "grad_norm"])
def test_not_finite_stops_before_it_is_saved(tmp_path, metric):
  def step(state, x):
    number = int(state.step) + 1
    state, metrics = toy.step(state, x)
    if number == 6:  # a step at which it would be saved
      metrics[metric] = jnp.float32(jnp.nan)
    return state, metrics

  with pytest.raises(StageStopped) as stopped:
    toy.train(tmp_path, step_fn=step)
  message = str(stopped.value)
  assert f"toy stopped at step 6: {metric} is nan" in message
  assert "step 3, is kept" in message
  assert "lower its learning rate" in message
  assert saved_steps(tmp_path) == [3]
  assert toy.records(tmp_path)[-1]["step"] == 5


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
    state, metrics = toy.step(state, x)
    bad = {name: jnp.float32(value)} if number == 4 else {}
    return state, metrics | {"kl": jnp.float32(6.0)} | bad  # at its limit, not above

  with pytest.raises(StageStopped, match=f"toy stopped at step 4: {told}.*step 3, is kept"):
    toy.train(tmp_path, step_fn=step, limits={"kl": 6.0})
  assert saved_steps(tmp_path) == [3]
  assert [record["step"] for record in toy.records(tmp_path)] == [1, 2, 3]


def test_a_limit_stops_with_its_advice(tmp_path):
  run = toy.stage_run(tmp_path, fingerprint={})
  with pytest.raises(StageStopped, match="kl is 50, above its limit 45.*step 3, is kept"):
    toy.train(tmp_path, run=run, limits={"kl": 45.0})
  assert saved_steps(tmp_path) == [3]
  with pytest.raises(StageStopped, match="Nothing was saved yet"):
    toy.train(tmp_path / "other", limits={"kl": 5.0})


def test_a_validation_that_is_not_finite_stops(tmp_path):
  with pytest.raises(StageStopped, match="validation/loss is inf"):
    toy.train(tmp_path, evaluate=lambda state, step: {"loss": np.inf}, evaluate_steps=(3,))
  assert saved_steps(tmp_path) == []


def test_another_run_is_refused(tmp_path):
  toy.train(tmp_path, num_steps=3)
  run = toy.stage_run(tmp_path, fingerprint=toy.FINGERPRINT | {"reference": "x" * 64})
  with pytest.raises(
    ValueError, match=r"another reference \(rrrrrrrr, this run has xxxxxxxx\).*--workdir"
  ):
    toy.train(tmp_path, run=run)
  with pytest.raises(ValueError, match="holds step 3, beyond num_steps=2"):
    toy.train(tmp_path, num_steps=2)


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
      toy.train(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    calls.clear()
    full_at = 3  # at the second save
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/checkpoints/6"):
      toy.train(tmp_path)
  assert saved_steps(tmp_path) == [3]
  assert toy.bytes_of(toy.train(tmp_path)) == toy.bytes_of(toy.train(tmp_path / "whole"))


def test_metrics_are_fetched_one_step_late(tmp_path):
  order = []

  class Number:
    def __init__(self, step):
      self._step = step

    def __array__(self, dtype=None, copy=None):
      order.append(f"fetch {self._step}")
      return np.float32(self._step)

  def step(state, x):
    state, _ = toy.step(state, x)
    order.append(f"dispatch {int(state.step)}")
    return state, {"loss": Number(int(state.step))}

  toy.train(tmp_path, step_fn=step, run=toy.stage_run(tmp_path, every=100), num_steps=4)
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
    toy.train(tmp_path, num_steps=3)
  assert sum(isinstance(call.args[0], TrainState) for call in wait.mock_calls) >= 3


def test_traced_steps_change_nothing_and_are_summed_up(tmp_path):
  """From the second step after the resume on, since the first compiles."""
  whole = toy.train(tmp_path / "whole")
  toy.train(tmp_path / "traced", num_steps=3)
  run = toy.stage_run(tmp_path / "traced", profile="2:7")
  kwargs = dict(flops=lambda metrics: 1e9 * metrics["loss"], run=run)
  assert toy.bytes_of(toy.train(tmp_path / "traced", **kwargs)) == toy.bytes_of(whole)
  summary = json.loads((tmp_path / "traced" / "profile" / "summary.json").read_text())
  assert summary["steps"] == [5, 6]
  losses = [record["loss"] for record in toy.records(tmp_path / "whole")[4:6]]
  work = summary["model_flops_per_second"] * summary["seconds"]
  assert work == pytest.approx(1e9 * np.mean(losses))
  assert not (tmp_path / "whole" / "profile").exists()


def test_constants_stand_between_state_and_batch(tmp_path):
  step = jax.jit(lambda state, shift, x: toy.step(state, x + shift))
  moved = toy.train(tmp_path / "a", step_fn=step, constants=(jnp.float32(1.0),))
  plain = toy.train(tmp_path / "b", step_fn=lambda state, x: toy.step(state, x + np.float32(1.0)))
  assert toy.bytes_of(moved) == toy.bytes_of(plain)


def test_batches_are_placed(tmp_path):
  placed = []

  def place(batch):
    placed.append(batch)
    return jnp.asarray(batch)

  toy.train(tmp_path, num_steps=3, place=place)
  assert len(placed) == 3
