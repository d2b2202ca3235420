"""Gives the numbers of a run to the trackers that its config names, beside metrics.jsonl, which is always written.

Made by the pipeline, called by the loop and by stages that measure something once. A tracker never stops a run, and
never holds it up: each works in a thread of its own, and one that fails is told of in a line and is off from then on.

A resumed run does some steps again, those after its last checkpoint. metrics.jsonl drops their old lines. What a server
was sent cannot be taken back, so the steps that were sent are not sent again: by the project's rules they come to the
same numbers. Where they do not (other devices, other settings of execution), a line says so.
"""

import dataclasses
import importlib
import importlib.util
import math
import pathlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax

from instructjax.core import terminal
from instructjax.core.config import Config
from instructjax.core.errors import Preempted, UserError, Waiting, reason
from instructjax.train.metrics import read_metrics
from instructjax.train.trackers import (
  Ledger,
  Run,
  Status,
  TableRows,
  Tracker,
  read_ledger,
)

_MOST = 10_000  # calls that may wait for a slow tracker
_PATIENCE = {"finished": 90.0, "failed": 15.0, "stopped": 15.0}  # seconds to send what is left

Create = Callable[[Run, Ledger | None], Tracker]


@dataclasses.dataclass(frozen=True)
class Begun:
  """The beginning of a stage, in this process.

  Attributes:
    stage, directory: its name and folder.
    start: step of the checkpoint that it goes on from; 0 for none.
    past: what earlier processes wrote to metrics.jsonl, as far as trackers get it, later steps than `start` included.
    is_new: whether the folder has no metrics.jsonl: no process has begun the stage, or the folder was deleted.
  """

  stage: str
  directory: pathlib.Path
  start: int
  past: Sequence[Mapping[str, float]]
  is_new: bool


class Sender:
  """Gives one tracker every step once, over all processes of a run.

  Args:
    create: makes the tracker.
    run: the run.
    ledger: where its ledger is kept; None for a tracker that can take steps twice.
    tell: prints a line.
  """

  def __init__(
    self, create: Create, run: Run, ledger: pathlib.Path | None, tell: Callable[[str], None]
  ):
    self._create, self._run, self._path, self._tell = create, run, ledger, tell
    self._ledger: Ledger | None = None
    self._open(read_ledger(ledger) if ledger else None)

  def _open(self, before: Ledger | None):
    self._tracker = tracker = self._create(self._run, before)
    if tracker.where:
      self._tell(tracker.where)
    if not self._path:
      return
    goes_on = before is not None and (before.id, before.place) == (tracker.id, tracker.place)
    self._ledger = before if before and goes_on else Ledger(self._path, tracker.id, tracker.place)
    self._send_again(self._ledger.cut(tracker.received))

  def _send_again(self, lost: Sequence[tuple[str, int]]):
    """Sends what did not arrive, as far as metrics.jsonl has it. Steps that are done again come by themselves."""
    for stage in dict.fromkeys(stage for stage, _ in lost if stage):
      steps = {step for name, step in lost if name == stage}
      for record in read_metrics(self._run.workdir / stage):
        if record["step"] in steps:
          self._log_record(stage, record)

  def _log_record(self, stage: str, record: Mapping[str, float]):
    metrics = {name: value for name, value in record.items() if name != "step"}
    self.log(stage, int(record["step"]), metrics, ())

  def begin(self, begun: Begun):
    """Begins a stage, with the steps that the tracker has missed, as those before it was switched on."""
    if self._ledger and begun.is_new and self._ledger.has_any(begun.stage):
      self._tell(f"{begun.stage} is trained anew, which begins a new run")
      self._tracker.close("stopped")
      self._open(None)
    self._tracker.begin(begun.stage, begun.directory, begun.start)
    for record in begun.past if self._ledger else ():
      if record["step"] <= begun.start:
        self._log_record(begun.stage, record)

  def log(self, stage: str, step: int, metrics: Mapping[str, float], rows: TableRows):
    """Sends a step, unless it was sent."""
    if self._ledger and self._ledger.has(stage, step):
      return
    if self._ledger:
      # First: a process that is killed between the two leaves a step out, rather than sending it twice.
      self._ledger.add(stage, step)
    self._tracker.log(stage, step, metrics, rows)

  def report(self, numbers: Mapping[str, float], tables: Mapping[str, TableRows]):
    """Sends what was measured once."""
    if self._ledger:
      self._ledger.add("", 0)
    self._tracker.report(numbers, tables)

  def close(self, status: Status):
    """Sends what is left."""
    self._tracker.close(status)


class Worker:
  """A tracker's thread, which begins with the first call. What the tracker raises turns it off.

  Args:
    name: the tracker's.
    make: makes the sender, in the thread.
    is_final: whether what it was sent cannot be replaced.
    tell: prints a line.
  """

  def __init__(
    self,
    name: str,
    make: Callable[[Callable[[str], None]], Sender],
    *,
    is_final: bool,
    tell: Callable[[str], None] = terminal.say,
  ):
    self.name, self.is_final, self._make = name, is_final, make
    self._tell = lambda line: tell(f"{name}: {line}")
    self._calls: queue.Queue = queue.Queue(_MOST)
    # A daemon: a tracker that hangs does not keep the process from ending.
    self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
    self._off = threading.Event()

  def put(self, call: str, *args: Any):
    """Queues a call of the sender."""
    if self._off.is_set():
      return
    if not self._thread.ident:
      self._thread.start()
    try:
      self._calls.put_nowait((call, args))
    except queue.Full:
      self._turn_off(f"it is too slow, and {_MOST} calls wait")

  def close(self, status: Status, seconds: float):
    """Sends what is left, for so long at most."""
    if not self._thread.ident or self._off.is_set():
      return
    self.put("close", status)
    self._thread.join(seconds)
    if self._thread.is_alive():
      self._turn_off(f"it has not taken everything within {seconds:.0f} s")

  def _work(self):
    sender = None
    try:
      sender = self._make(self._tell)
      call = ""
      while call != "close" and not self._off.is_set():
        call, args = self._calls.get()
        getattr(sender, call)(*args)
    except Exception as error:
      self._turn_off(reason(error))
      if sender:
        self._give_up(sender)

  def _give_up(self, sender: Sender):
    """Closes what can still be closed."""
    try:
      sender.close("failed")
    except Exception:  # it has failed before, and was told of
      return

  def _turn_off(self, why: str):
    if not self._off.is_set():
      self._off.set()
      self._tell(f"off from here on, the run goes on without it: {why}")


class Tracking:
  """All trackers of a run; a context that closes them.

  Args:
    workers: one each; none where nothing is tracked, as on all processes but the first.
    tell: prints a line.
  """

  def __init__(self, workers: Sequence[Worker], tell: Callable[[str], None] = terminal.say):
    self._workers, self._tell = tuple(workers), tell
    self._is_due: Callable[[int], bool] = lambda step: False
    self._past: dict[int, Mapping[str, float]] = {}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any):
    status: Status = "finished"
    if error is not None:
      status = "stopped" if isinstance(error, Preempted | Waiting | KeyboardInterrupt) else "failed"
    for worker in self._workers:
      worker.close(status, _PATIENCE[status])

  def begin(self, stage: str, directory: pathlib.Path, start: int, is_due: Callable[[int], bool]):
    """A stage begins. To be called before its metrics.jsonl is opened, whose later lines are dropped then.

    Args:
      stage, directory: its name and folder.
      start: step of the checkpoint that it goes on from; 0 for none.
      is_due: whether a step is a point of the curves. Evaluated steps always are.
    """
    if not self._workers:
      return
    self._is_due = is_due
    past = [record for record in read_metrics(directory) if self._is_point(record)]
    self._past = {int(record["step"]): record for record in past if record["step"] > start}
    is_new = not (directory / "metrics.jsonl").exists()
    for worker in self._workers:
      worker.put("begin", Begun(stage, directory, start, past, is_new))

  def log(self, stage: str, step: int, metrics: Mapping[str, float], rows: TableRows):
    """The metrics of a step, and the samples that are shown with it."""
    if not self._workers or not self._is_point({**metrics, "step": step}):
      return
    keep = ", ".join(worker.name for worker in self._workers if worker.is_final)
    if keep and _differ(self._past.pop(step, {}), metrics):
      self._past = {}  # once is enough
      self._tell(
        f"{stage}: from step {step} on, steps that are done again come to other numbers than before the run was"
        f" resumed; {keep} keep the old ones of these steps, metrics.jsonl has the new"
      )
    for worker in self._workers:
      worker.put("log", stage, step, metrics, rows)

  def report(self, stage: str, measured: Any, tables: Mapping[str, TableRows] | None = None):
    """What a stage measured once: a nested record of numbers, and tables by name."""
    numbers = {f"{stage}/{name}": value for name, value in flat_numbers(measured).items()}
    named = {f"{stage}/{name}": rows for name, rows in (tables or {}).items() if rows}
    for worker in self._workers if numbers or named else ():
      worker.put("report", numbers, named)

  def _is_point(self, record: Mapping[str, float]) -> bool:
    return self._is_due(int(record["step"])) or any(n.startswith("validation/") for n in record)


def _differ(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
  """Whether two records of a step have other numbers; what a clock says does not count."""
  return any(
    now.get(name) != value
    for name, value in before.items()
    if name != "step" and not name.startswith("seconds")
  )


def flat_numbers(measured: Any, where: str = "") -> dict[str, float]:
  """The finite numbers of a nested record by path, as validation/accuracy; items of a sequence count from 1.

  Sequences of numbers, as the bins of a calibration, are left out.
  """
  if dataclasses.is_dataclass(measured):
    measured = vars(measured)
  elif isinstance(measured, list | tuple):
    measured = {str(i): item for i, item in enumerate(measured, start=1) if not _is_number(item)}
  if isinstance(measured, Mapping):
    parts = [flat_numbers(value, f"{where}/{name}") for name, value in measured.items()]
    return {name: value for part in parts for name, value in part.items()}
  if _is_number(measured) and math.isfinite(measured):
    return {where.removeprefix("/"): float(measured)}
  return {}


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float)


def require(config: Config):
  """Checks that the trackers of a config are installed.

  Raises:
    UserError: the extra of one is not.
  """
  for name in config.log.trackers:
    # The other extras are named like the package that they install.
    found = importlib.util.find_spec(name) if name != "tensorboard" else None
    # Without an origin it is some folder of that name, as the one that W&B writes to.
    if name != "tensorboard" and (found is None or found.origin is None):
      raise UserError(
        f"config.log.trackers={config.log.trackers} needs the {name} extra: pip install 'instructjax[{name}]',"
        f" or leave {name} out"
      )


def open_run(config: Config, workdir: pathlib.Path) -> Tracking:
  """The trackers of a run, on the first process. Each opens its run when there is something to tell it.

  Raises:
    UserError: the extra of a tracker is not installed.
  """
  if jax.process_index() != 0:
    return Tracking(())
  require(config)
  run = Run(
    name=config.log.run_name or workdir.absolute().name,
    project=config.log.project,
    workdir=workdir,
    config=dataclasses.asdict(config),
    offline=config.log.offline,
  )
  return Tracking([_worker(name, run) for name in config.log.trackers])


def _worker(name: str, run: Run) -> Worker:
  is_final = name != "tensorboard"
  ledger = run.workdir / "trackers" / f"{name}.jsonl" if is_final else None

  def make(tell: Callable[[str], None]) -> Sender:
    # Imported here, in the tracker's thread: it takes seconds.
    create = importlib.import_module(f"instructjax.train.trackers.{name}").create
    return Sender(create, run, ledger, tell)

  return Worker(name, make, is_final=is_final)
