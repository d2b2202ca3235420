"""THE outer loop: every stage is `fit` with its own step function and batches.

Called by the stages. Restores, draws batches, runs the step, watches the metrics, evaluates, saves.
Knows nothing of models or losses. Resume is bit-exact because all that a step changes is in the
state or in the position in the data, and both are in the checkpoint.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils

from instructjax.core.config import CheckpointConfig, LogConfig, ProfileConfig
from instructjax.core.errors import Preempted, StageStopped, UserError
from instructjax.parallel import distributed
from instructjax.train.checkpoint import Checkpoints, read_meta
from instructjax.train.metrics import Display, MetricsWriter
from instructjax.train.profiling import StepProfile, traced_steps


@dataclasses.dataclass(frozen=True)
class StageRun:
  """One stage of one run.

  Attributes:
    name: shown in the terminal.
    directory: holds checkpoints/, metrics.jsonl and, when finished, done.json; profile/ where steps are traced.
    checkpoint, log: cadence.
    profile: which steps are traced.
    fingerprint: part -> hash, or config block as JSON, of all that a resumed run must match: config, tokenizer,
      reference, reward model.
    changeable: what it need not match, 'rounding' and 'same numbers' -> setting -> value: those that move numbers
      by rounding only, and those that do not touch them. Saved with the state, to say what has changed.
    started: `time.monotonic()` when this process began the stage.
    advice: what to change when the stage is stopped for its numbers.
  """

  name: str
  directory: pathlib.Path
  checkpoint: CheckpointConfig
  log: LogConfig
  profile: ProfileConfig
  fingerprint: Mapping[str, str]
  changeable: Mapping[str, Mapping[str, Any]]
  started: float
  advice: str = "lower its learning rate or lengthen its warmup, in another --workdir"


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
  evaluate_steps: Collection[int] = (),
  keep_steps: Collection[int] = (),
  limits: Mapping[str, float] | None = None,
  best_metric: str | None = None,
  on_samples: Callable[[Any, int], tuple[Mapping[str, float], Sequence[Mapping]]] | None = None,
  flops: Callable[[Mapping[str, float]], float] | None = None,
  show: Sequence[str] = (),
  progress: bool = True,
) -> Any:
  """Runs `step_fn` until `num_steps` are done, from the newest checkpoint if there is one.

  Args:
    run: names, places, cadence.
    state: freshly made pytree with typed keys. It is consumed: donated by step_fn or, on resume,
      released and replaced.
    step_fn: (state, *constants, batch) -> (state, metrics) or (state, metrics, samples); metrics are
      scalars, the gradient norm among them: only it tells in the same step that an update was not
      finite; `tokens` are what the step trained on or sampled, for the tables. Jitted where a step is traced.
    batches: next(batches), batches.get_state() (JSON-serialisable), batches.set_state(state).
    num_steps: in all, those of earlier runs included.
    constants: what step_fn reads at every step and none changes.
    place: puts a host batch on the devices.
    evaluate: (state, step) -> scalars, logged as validation/NAME; must not donate.
    evaluate_steps: steps done before each evaluation; 0 is before training.
    keep_steps: saved and never deleted (epoch ends). Also saved: multiples of
      run.checkpoint.every_steps, the last step.
    limits: metric -> highest value with which the run may go on.
    best_metric: of the evaluated steps, which then are saved too, the one with the lowest value of it
      (`validation/loss`) is not deleted.
    on_samples: (samples, step) -> (further metrics, which are logged but never stop the run, so
      that one which is not finite is left out; rows for the table shown at log steps). Called at
      every step on every process.
    flops: metrics -> FLOPs of a step by the models' definition, for the table of traced steps.
    show: metrics shown in the terminal; empty for the first few.
    progress: False for silence.
  Returns:
    The final state.
  Raises:
    StageStopped: a metric is not finite or above its limit; that state was not saved.
    UserError: the checkpoints belong to another run.
    UserError: they cannot be read or written.
    Preempted: the run was told to stop, and the state is saved.
  """
  save_steps = {*keep_steps, num_steps, *range(0, num_steps, run.checkpoint.every_steps)}
  if best_metric:
    save_steps |= {*evaluate_steps}
  checkpoints = Checkpoints(
    run.directory, keep=run.checkpoint.keep, keep_steps=keep_steps, best_metric=best_metric
  )
  with checkpoints:
    start = checkpoints.latest_step() or 0
    if start > num_steps:
      raise UserError(
        f"cannot resume {run.directory}: it holds step {start}, beyond num_steps={num_steps}"
      )
    if start:
      state, position = checkpoints.restore(start, state, run.fingerprint)
      batches.set_state(position)
      line = changes(run, read_meta(run.directory, start)["changeable"])
      if line and progress and jax.process_index() == 0:
        rich.console.Console(soft_wrap=True).print(line, markup=False, highlight=False)
    if start == num_steps:
      return state

    def judge(step: int, metrics: Mapping) -> dict[str, float]:
      """Fetches the numbers of a step; a bad one ends the stage before the step is kept."""
      metrics = _to_floats(metrics)
      reason = _reason_to_stop(metrics, limits or {})
      if reason:
        raise StageStopped(_stop_message(run, step, reason, checkpoints))
      return metrics

    def validation(step: int) -> dict[str, float]:
      if evaluate is None or step not in evaluate_steps:
        return {}
      return judge(
        step, {f"validation/{name}": value for name, value in evaluate(state, step).items()}
      )

    on_cpu = jax.default_backend() == "cpu"
    profile = StepProfile(
      run.directory / "profile", traced_steps(run.profile, start, num_steps), step_fn, flops
    )
    with _Log(run, num_steps, start, on_samples, show, progress) as log, profile:
      if start == 0 and 0 in evaluate_steps:
        log.write(0, validation(0), [])
      late = None  # (step, metrics, samples) not looked at yet
      for step in range(start + 1, num_steps + 1):
        if on_cpu:  # a step dispatched ahead holds its temporaries beside those of the one before
          jax.block_until_ready(state)
        state, metrics, *samples = profile(step, state, *constants, place(next(batches)))
        if late:  # only now: the device has work while the host waits for the numbers before
          log.write(late[0], judge(*late[:2]), late[2])
        late = (step, metrics, samples)
        is_stopping = distributed.is_told_to_stop()
        if not is_stopping and step not in save_steps and step not in evaluate_steps:
          continue
        record = judge(step, metrics) | validation(step)
        log.write(step, record, samples)
        late = None
        if is_stopping or step in save_steps:
          checkpoints.save(
            step, state, batches.get_state(), record, run.fingerprint, run.changeable
          )
        if is_stopping:
          checkpoints.wait()
          raise Preempted(
            f"{run.name}: told to stop (SIGTERM), saved at step {step}; the same command goes on from there"
          )
  multihost_utils.sync_global_devices(f"{run.name} trained")  # all may read what one has written
  return state


def changes(run: StageRun, saved: Mapping[str, Mapping[str, Any]]) -> str:
  """One line on the settings that move a resumed run's numbers by rounding and are not those it was saved under.

  Args:
    run: the stage as it goes on.
    saved: `changeable` of the run that wrote the checkpoint.
  Returns:
    '' where none has changed.
  """
  before, now = saved["rounding"], run.changeable["rounding"]
  changed = [name for name in now if now[name] != before[name]]
  if not changed:
    return ""
  parts = ", ".join(f"{name}={now[name]} (was {before[name]})" for name in changed)
  by = "by rounding of bfloat16" if "execution.dtype" in changed else "by rounding only"
  return f"{run.name} goes on with {parts}: numbers move {by}"


class _Log:
  """Numbers and samples of each step to the files and the terminal; one process writes."""

  def __init__(
    self, run: StageRun, num_steps: int, start: int, on_samples, show: Sequence[str], progress: bool
  ):
    self._run, self._num_steps, self._on_samples = run, num_steps, on_samples
    self._writer = self._display = None
    if jax.process_index() == 0:
      self._writer = MetricsWriter(run.directory, start_step=start, tensorboard=run.log.tensorboard)
      console = rich.console.Console() if progress else None
      self._display = Display(
        run.name, num_steps=num_steps, start_step=start, show=show, console=console
      )
    self._last_time = time.monotonic()

  def __enter__(self) -> Self:
    if self._display:
      self._display.start()
    return self

  def __exit__(self, *exception: Any):
    if self._display:
      self._display.stop()
    if self._writer:
      self._writer.close()

  def write(self, step: int, metrics: Mapping[str, float], samples: Sequence):
    due = step % self._run.log.every_steps == 0 or step == self._num_steps
    extra, rows = self._on_samples(samples[0], step) if samples and self._on_samples else ({}, ())
    if not self._writer or not self._display:
      return
    now = time.monotonic()
    metrics = {**metrics, **{name: value for name, value in extra.items() if math.isfinite(value)}}
    self._writer.write(step, {**metrics, "seconds": round(now - self._last_time, 4)}, board=due)
    self._last_time = now
    self._display.step(step, metrics, log=due)
    self._display.samples(step, rows if due else ())


def _to_floats(metrics: Mapping) -> dict[str, float]:
  # str: the shortest decimal that is the same float32: the files say 0.1, not 0.10000000149011612.
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
  checkpoints.wait()
  saved = checkpoints.latest_step()
  kept = f"The last good checkpoint, step {saved}, is kept" if saved else "Nothing was saved yet"
  return f"{run.name} stopped at step {step}: {reason}. {kept} in {run.directory}. What to change: {run.advice}."
