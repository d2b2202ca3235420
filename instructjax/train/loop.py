"""The outer loop of training, which all training stages share: each calls `fit` with its own step and batches.

It restores the newest checkpoint, draws batches, runs the step, checks the metrics, evaluates and saves. Called by the
stages; knows nothing of models or losses.

A resumed run ends with the same numbers, bit for bit. Everything that a step changes is either in the state or in the
position in the data, and a checkpoint holds both.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from instructjax.core import terminal
from instructjax.core.errors import Preempted, StageStopped, UserError
from instructjax.parallel import distributed, sharding
from instructjax.train import pace
from instructjax.train.checkpoint import Checkpoints
from instructjax.train.profiling import StepProfile, traced_steps
from instructjax.train.saved_state import read_meta
from instructjax.train.spent import Spent
from instructjax.train.stage_runs import StageRun, changes
from instructjax.train.step_log import StepLog


@dataclasses.dataclass(frozen=True)
class Steps:
  """Steps at regular intervals, and some others. A set of them would take memory for every step of a long run.

  Attributes:
    every: its multiples are in it, without 0.
    also: further steps.
  """

  every: int
  also: tuple[int, ...] = ()

  def __contains__(self, step: object) -> bool:
    return isinstance(step, int) and (step in self.also or (step > 0 and step % self.every == 0))


def fit(
  run: StageRun,
  state: Any,
  step_fn: Callable,
  batches: Any,
  *,
  num_steps: int,
  constants: tuple = (),
  place: Callable[[Any], Any] = lambda batch: batch,
  evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
  evaluate_steps: Container[int] = (),
  keep_steps: Collection[int] = (),
  limits: Mapping[str, float] | None = None,
  best_metric: str | None = None,
  on_samples: Callable[[Any, int], tuple[Mapping[str, float], Sequence[Mapping]]] | None = None,
  flops: Callable[[Mapping[str, float]], float] | None = None,
  show: Sequence[str] = (),
  progress: bool = True,
) -> Any:
  """Runs `step_fn` until `num_steps` are done, starting from the newest checkpoint if there is one.

  Args:
    run: name, folder, and how often to save and log.
    state: freshly made pytree with typed keys. It is consumed: step_fn donates it or, on resume, it is released and
      replaced by the restored state.
    step_fn: (state, *constants, batch) -> (state, metrics) or (state, metrics, samples). The metrics are scalars. They
      should include the gradient norm, which alone shows within the same step that an update was not finite, and
      `tokens`, the number of tokens trained on or sampled, for the tables of speed. It must be jitted if a step is to
      be traced.
    batches: has next(batches), batches.get_state() (JSON-serialisable) and batches.set_state(state).
    num_steps: steps in all, those of earlier runs included.
    constants: further arguments of step_fn, which no step changes.
    place: puts a host batch on the devices.
    evaluate: (state, step) -> scalars, which are logged as validation/NAME; must not donate the state.
    evaluate_steps: evaluate after so many steps; 0 is before training.
    keep_steps: steps whose checkpoints are never deleted (epoch ends). Multiples of run.checkpoint.every_steps and the
      last step are saved too.
    limits: metric -> highest value with which the run may go on.
    best_metric: a metric of the evaluation, as `validation/loss`. If given, every evaluated step is saved, and the
      checkpoint with the lowest value is never deleted.
    on_samples: (samples, step) -> (further metrics, rows of the table that is shown at log steps). These metrics are
      only logged: one that is not finite is left out and does not stop the run. Called at every step on every process.
    flops: metrics -> FLOPs of a step by the models' definition, for the table of traced steps.
    show: metrics to show in the terminal; empty for the first few.
    progress: False prints nothing.
  Returns:
    The final state.
  Raises:
    StageStopped: a metric is not finite or is above its limit; that state was not saved.
    UserError: the checkpoints belong to a run with other settings or with more steps, or files cannot be read or
      written.
    Preempted: the run was told to stop; its state is saved.
  """
  distributed.forget()
  distributed.at(f"the start of {run.name}")

  def is_saved(step: int) -> bool:
    is_due = step % run.checkpoint.every_steps == 0 or step == num_steps or step in keep_steps
    return is_due or (best_metric is not None and step in evaluate_steps)

  checkpoints = Checkpoints(
    run.directory, keep=run.checkpoint.keep, keep_steps=keep_steps, best_metric=best_metric
  )
  with checkpoints, Spent() as spent:
    start, state = _resumed(run, checkpoints, state, batches, num_steps, spent, progress)
    if start == num_steps:  # trained to the end, but stopped before the stage wrote its done.json
      return state
    # Before the first step, which may be hours before the first save.
    checkpoints.require_space(next(filter(is_saved, range(start + 1, num_steps + 1))), state)

    on_cpu = sharding.platform_of_arrays(state) == "cpu"
    profile = StepProfile(
      run.directory / "profile", traced_steps(run.profile, start, num_steps), step_fn, flops
    )
    speed = pace.Pace()
    log = StepLog(run, num_steps, start, on_samples, show, progress, speed, spent)
    judge = _Judge(run, checkpoints, limits or {}, evaluate, evaluate_steps, speed)
    with log, profile:
      if start == 0 and 0 in evaluate_steps:
        with spent.on("evaluate"):
          first = judge.validation(0, state)
        log.write(0, first, [])
      late = None  # (step, metrics, samples) of the step before, not yet read from the device
      for step in range(start + 1, num_steps + 1):
        # On a CPU, a step that is dispatched early would hold its temporaries beside those of the step before.
        if on_cpu:
          with speed.waiting():
            jax.block_until_ready(state)
        distributed.at(f"{run.name} step {step}, drawing its batch", step=True, first=True)
        with spent.on("input"):
          batch = place(next(batches))
        distributed.at(f"{run.name} step {step}", step=True)
        state, metrics, *samples = profile(step, state, *constants, batch)
        speed.step()
        # The numbers are read one step late. Reading waits for the device, which now has the next step to work on.
        if late:
          log.write(late[0], judge.step(*late[:2]), late[2], checkpoints.written())
        late = (step, metrics, samples)
        # Asked at every step by every process: they agree on the step after which all of them stop.
        is_stopping = distributed.is_told_to_stop()
        if not is_stopping and not is_saved(step) and step not in evaluate_steps:
          continue
        # A step that is saved is judged first, without delay: a state that is not finite must not reach the disk.
        record = judge.step(step, metrics)
        with speed.beside(), spent.on("evaluate"):
          record |= judge.validation(step, state)
        log.write(step, record, samples, checkpoints.written())
        late = None
        if is_stopping or is_saved(step):
          distributed.at(f"{run.name} step {step}, saving", save=True)
          with speed.beside(), spent.on("save"):
            checkpoints.save(
              step, state, batches.get_state(), record, run.fingerprint, run.changeable
            )
        if is_stopping:
          checkpoints.wait()  # the process ends now, and a half-written checkpoint would be lost
          raise Preempted(
            f"{run.name}: told to stop (SIGTERM), saved at step {step}; the same command goes on from there"
          )
  # Only now may every process read what the first one has written, the metrics for example.
  distributed.meet(f"{run.name} trained")
  return state


def _resumed(
  run: StageRun,
  checkpoints: Checkpoints,
  state: Any,
  batches: Any,
  num_steps: int,
  spent: Spent,
  progress: bool,
) -> tuple[int, Any]:
  """(step, state) of the newest checkpoint, to whose place `batches` are moved; (0, `state`) if there is none.

  Args, raises: see `fit`.
  """
  start = checkpoints.latest_step() or 0
  if start > num_steps:
    raise UserError(
      f"cannot resume {run.directory}: it holds step {start}, beyond num_steps={num_steps}"
    )
  if not start:
    return 0, state
  # The state first: `restore` refuses other settings by name, before the data refuse their own position.
  with spent.on("restore"):
    state, position = checkpoints.restore(start, state, run.fingerprint, run.files)
    batches.set_state(position)
  for line in changes(run, read_meta(run.directory, start)["changeable"]):
    if progress and jax.process_index() == 0:
      terminal.say(line)
  return start, state


@dataclasses.dataclass(frozen=True)
class _Judge:
  """Fetches numbers from the device. A bad one ends the stage before that step is saved.

  Attributes: see `fit`; `speed` does not count the time that is waited for.
  """

  run: StageRun
  checkpoints: Checkpoints
  limits: Mapping[str, float]
  evaluate: Callable[[Any, int], Mapping[str, float]] | None
  evaluate_steps: Container[int]
  speed: pace.Pace

  def step(self, step: int, metrics: Mapping) -> dict[str, float]:
    """The metrics of a step.

    Raises:
      StageStopped: one is not finite or above its limit.
    """
    with self.speed.waiting():
      return self._require_good(step, metrics)

  def validation(self, step: int, state: Any) -> dict[str, float]:
    """What `evaluate` says of the state, if it is asked after this step; raises as `step` does."""
    if self.evaluate is None or step not in self.evaluate_steps:
      return {}
    distributed.at(f"{self.run.name} step {step}, evaluating")
    found = {f"validation/{name}": value for name, value in self.evaluate(state, step).items()}
    return self._require_good(step, found)

  def _require_good(self, step: int, metrics: Mapping) -> dict[str, float]:
    metrics = _to_floats(metrics)
    if reason := _reason_to_stop(metrics, self.limits):
      raise StageStopped(_stop_message(self.run, step, reason, self.checkpoints))
    return metrics


def _to_floats(metrics: Mapping) -> dict[str, float]:
  # By way of str, which gives the shortest decimal of a float32: the files say 0.1, not 0.10000000149011612.
  return {
    name: float(str(np.asarray(value)[()])) for name, value in jax.device_get(dict(metrics)).items()
  }


def _reason_to_stop(metrics: Mapping[str, float], limits: Mapping[str, float]) -> str | None:
  for name, value in metrics.items():
    if not math.isfinite(value):
      return f"{name} is {value}"
    if value > limits.get(name, math.inf):
      return f"{name} is {value:.4g}, above its limit {limits[name]:.4g}"
  return None


def _stop_message(run: StageRun, step: int, reason: str, checkpoints: Checkpoints) -> str:
  checkpoints.wait()  # the message names the newest checkpoint, which may still be on its way to the disk
  saved = checkpoints.latest_step()
  kept = f"The last good checkpoint, step {saved}, is kept" if saved else "Nothing was saved yet"
  return f"{run.name} stopped at step {step}: {reason}. {kept} in {run.directory}. What to change: {run.advice}."
