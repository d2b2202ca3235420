"""Traces a few steps, adds up their time by phase, and makes the tables of times at the end of a run.

Called by loop (`StepProfile`) and pipeline (the tables). Knows nothing of models or losses: a phase is a
`jax.named_scope` in the compiled step.
"""

import collections
import json
import os
import pathlib
import re
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax

from instructjax.core import terminal
from instructjax.core.config import ProfileConfig
from instructjax.core.errors import writing
from instructjax.parallel.chips import PEAK_FLOPS
from instructjax.train.metrics import read_metrics

# The scopes that steps set: those of rl/step.py in the order they run, then those of the supervised stages.
PHASES = (
  "rollout",
  "score",
  "advantages",
  "update/policy",
  "update/ptx",
  "update/value",
  "gradient",
  "optimizer",
)
OTHER = "other"  # operations outside these scopes, or without a name
IDLE = "idle"  # time in which no operation of the step ran
UNKNOWN = "unknown"  # the whole step, if the trace names none of its operations

_MODULE = re.compile(r"^HloModule ([\w.\-]+)", re.MULTILINE)
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)
# These last as long as the operations inside them, which have events of their own.
_NESTING = re.compile(r" (while|conditional|call)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


def traced_steps(cfg: ProfileConfig, start: int, num_steps: int) -> range:
  """The steps to trace in a stage that goes on after step `start`.

  The first step of the process is never among them, because its time is that of compiling.
  """
  if not cfg.steps:
    return range(0)
  first, stop = map(int, cfg.steps.split(":"))
  return range(max(first, start + 2), min(stop, num_steps + 1))


class StepProfile:
  """Runs a stage's steps, and traces some of them into `directory`. Tracing does not change what a step computes.

  Each process writes its own trace, plugins/profile/process_N/HOST.xplane.pb, which TensorBoard and XProf open. The
  first process also writes summary.json: the seconds of each phase, tokens and FLOPs per second.

  Args:
    directory: the stage's folder for profiles.
    steps: numbers of the steps to trace.
    step_fn: (state, ...) -> (state, metrics, ...), jitted if there is a step to trace.
    flops: metrics -> FLOPs of a step by the model's definition; None leaves them out of the summary.
  Raises:
    UserError: the trace cannot be written.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    steps: range,
    step_fn: Callable,
    flops: Callable[[Mapping[str, float]], float] | None,
  ):
    self._directory, self._steps, self._flops = directory, steps, flops
    self._step_fn: Any = step_fn  # jitted where there is a step to trace, and so can be lowered
    self._trace = directory / "plugins" / "profile" / f"process_{jax.process_index()}"
    self._is_tracing = False
    self._seconds: list[float] = []
    self._metrics: list[Mapping[str, float]] = []

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: Any):
    if self._is_tracing:  # the stage was stopped in between
      self._stop()

  def __call__(self, step: int, *arguments: Any) -> Any:
    """Calls `step_fn` with the arguments and, if `step` is to be traced, traces and times it."""
    if step not in self._steps:
      return self._step_fn(*arguments)
    # Steps are dispatched ahead of the device. A traced step waits for its arguments, or it would be charged with the
    # steps before it, and for its results, so that its time ends with it.
    jax.block_until_ready(arguments)
    if step == self._steps[0]:
      self._start()
    start = time.perf_counter()
    with jax.profiler.StepTraceAnnotation("step", step_num=step):
      result = jax.block_until_ready(self._step_fn(*arguments))
    self._seconds.append(time.perf_counter() - start)
    self._metrics.append({name: float(x) for name, x in jax.device_get(dict(result[1])).items()})
    if step == self._steps[-1]:
      self._stop()
      # The text says which phase an operation belongs to. JAX has the program in its cache and compiles nothing again.
      text = self._step_fn.lower(result[0], *arguments[1:]).compile().as_text()
      if jax.process_index() == 0:
        self._summarise(text)
    return result

  def _start(self):
    with writing(self._directory):
      shutil.rmtree(self._trace, ignore_errors=True)  # of an earlier run
      self._directory.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.session_id = self._trace.name
    # Otherwise there is an event for every Python call, which drowns the others.
    options.python_tracer_level = 0
    jax.profiler.start_trace(self._directory, profiler_options=options)
    self._is_tracing = True

  def _stop(self):
    self._is_tracing = False
    with writing(self._directory):
      jax.profiler.stop_trace()

  def _summarise(self, text: str):
    (path,) = self._trace.glob("*.xplane.pb")
    number, seconds = len(self._steps), statistics.mean(self._seconds)
    # JAX 0.12 warns from C++ while it reads a trace. Where warnings are errors, that aborts the interpreter.
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)
      found = phase_seconds(jax.profiler.ProfileData.from_file(str(path)), text)
    phases = {name: found[name] / number for name in (*PHASES, OTHER) if name in found}
    kind = jax.devices()[0].device_kind
    summary = {
      "steps": [*self._steps],
      "device": f"{jax.device_count()} x {kind}",
      "seconds": seconds,
      "phases": with_rest(phases, seconds),
    }
    if all("tokens" in metrics for metrics in self._metrics):
      tokens = statistics.mean(metrics["tokens"] for metrics in self._metrics)
      summary["tokens_per_second"] = tokens / seconds
    if self._flops:
      rate = statistics.mean(map(self._flops, self._metrics)) / seconds
      summary["model_flops_per_second"] = rate
      if kind in PEAK_FLOPS:
        summary["mfu"] = rate / (jax.device_count() * PEAK_FLOPS[kind])
    path = self._directory / "summary.json"
    with writing(path):
      scratch = path.with_suffix(".tmp")
      scratch.write_text(json.dumps(summary, indent=1) + "\n")
      os.replace(scratch, path)


def phase_of(op_name: str) -> str:
  """The phase that JAX's name of an operation contains: `jit(step)/while/body/update/policy/mul` -> `update/policy`."""
  return next((phase for phase in PHASES if f"/{phase}/" in f"/{op_name}/"), OTHER)


def operation_phases(text: str) -> dict[str, str | None]:
  """Maps the operations of a compiled program to their phases.

  Loops, conditionals and calls get None: the operations inside them are counted instead.
  """
  phases = {}
  for name, definition in _OPERATION.findall(text):
    op_name = _OP_NAME.search(definition)
    is_nesting = _NESTING.search(definition.partition(", metadata=")[0])
    phases[name] = None if is_nesting else phase_of(op_name[1] if op_name else "")
  return phases


def phase_seconds(trace: jax.profiler.ProfileData, text: str) -> dict[str, float]:
  """The seconds of each phase in a trace, averaged over this process's devices.

  Args:
    trace: has an event for each operation, in the planes of the devices or, on a CPU, of the host's threads.
    text: text of the compiled program, or of several, which says which phase an operation belongs to.
  """
  if not _MODULE.match(text):
    raise ValueError(f"not the text of a compiled program: {text[:80]!r}")
  _, *parts = _MODULE.split(text)  # name, text, name, text ...
  phases = {name: operation_phases(body) for name, body in zip(parts[::2], parts[1::2])}
  only = parts[0] if len(phases) == 1 else ""  # where the trace does not name an event's program
  planes = [*trace.planes]
  # With an accelerator, the host's events with the same names only launch the operations.
  planes = [plane for plane in planes if plane.name.startswith("/device:")] or planes
  spans = collections.defaultdict(list)
  for plane in planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        # On a TPU, an event's name is the whole text of the operation.
        name = stats.get("hlo_op") or event.name.partition(" = ")[0].lstrip("%")
        is_operation = "hlo_op" in stats or line.name == "XLA Ops"
        module = stats.get("hlo_module", only)
        if not is_operation or module not in phases:
          continue
        if phase := phases[module].get(name, OTHER):
          device = (plane.name, stats.get("device_ordinal"))
          spans[device].append((event.start_ns, event.start_ns + event.duration_ns, phase))
  totals = collections.Counter()
  for device in spans.values():
    totals.update(shared_time(device))
  return {name: 1e-9 * total / len(spans) for name, total in totals.items()}


def with_rest(phases: Mapping[str, float], seconds: float) -> dict[str, float]:
  """Adds to the phases the part of the step's seconds that none of them accounts for."""
  return {**phases, IDLE if phases else UNKNOWN: max(0.0, seconds - sum(phases.values()))}


def shared_time(spans: Iterable[tuple[float, float, str]]) -> dict[str, float]:
  """Adds up the time of each name's spans (start, end, name); time that several names share is split evenly.

  A device may run operations of several phases at once. Split like this, the phases add up to the time in which any of
  them ran.
  """
  edges = [edge for start, end, name in spans for edge in ((start, 1, name), (end, -1, name))]
  running, last = collections.Counter(), 0.0
  totals: dict[str, float] = collections.defaultdict(float)
  for now, change, name in sorted(edges):
    for other in running:
      totals[other] += (now - last) / len(running)
    running[name] += change
    if not running[name]:
      del running[name]
    last = now
  return dict(totals)


def stage_table(stages: Sequence[tuple[str, float, pathlib.Path]]) -> terminal.Table:
  """The table of what a run took: each stage's seconds and, if it has steps, those of its median step.

  Args:
    stages: (name, seconds, directory) of the stages that ran.
  """
  rows = []
  for name, seconds, directory in stages:
    records = [record for record in read_metrics(directory) if record["step"] > 0]
    # Medians: the first step compiles, and others stand beside a save or an evaluation.
    paces = [record["seconds"] for record in records]
    rates = [r["tokens"] / r["seconds"] for r in records if r.get("tokens") and r["seconds"]]
    rows.append(
      (
        name,
        f"{seconds:.1f}",
        str(len(records)) if records else "",
        f"{statistics.median(paces):.4g}" if paces else "",
        f"{statistics.median(rates):,.0f}" if rates else "",
      )
    )
  return terminal.Table(("stage", "seconds", "steps", "seconds a step", "tokens/s"), rows)


def show_profile(stage: str, directory: pathlib.Path) -> bool:
  """Prints a stage's traced steps: seconds by phase, tokens and FLOPs per second. False if none was traced."""
  path = directory / "summary.json"
  if not path.is_file():
    return False
  summary = json.loads(path.read_text())
  first, last, seconds = summary["steps"][0], summary["steps"][-1], summary["seconds"]
  terminal.say(
    f"{stage}: mean of steps {first} to {last} on {summary['device']}; trace in {directory}"
  )
  rows = [
    (name, f"{part:.4g}", f"{part / seconds:.1%}") for name, part in summary["phases"].items()
  ]
  footer = ("step", f"{seconds:.4g}", "100%")
  terminal.show(terminal.Table(("phase", "seconds", "share"), rows, footer=footer))
  terminal.say(_rates(summary))
  return True


def _rates(summary: Mapping[str, Any]) -> str:
  parts = []
  if "tokens_per_second" in summary:
    parts.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
  if "model_flops_per_second" in summary:
    parts.append(f"{summary['model_flops_per_second'] / 1e9:,.1f} model GFLOP/s")
  if "mfu" in summary:
    parts.append(f"{summary['mfu']:.1%} of the devices' bfloat16 peak (MFU)")
  return ", ".join(parts)
