"""Notices that a process is stuck though alive, and ends the run instead of letting it wait for ever.

The main thread says where it stands, with `at` and `touch`. A thread beside it watches: if nothing was said for too
long, it prints the stacks of all threads, tells the other processes through the coordination service, and ends this
one. It also ends a process that was told to stop but does not get to a safe point, prints who is waited for, and ends
this process when another one has met a user's mistake. So it works while the main thread is inside C code.

Called by main (`start`), the training loop and distributed.py. Never imports JAX; the store of the coordination service
is an argument.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Protocol

from instructjax.parallel.lobby import Waiting, numbers

_TICK = 1.0  # seconds between two looks
_PAUSE = 5.0  # a look that comes so much later than planned: the machine slept, or this process was stopped
_ANSWERS = 3.0  # seconds that the others have to say where they stand
# Seconds between two signs of headway that a process with work of its own gives the others.
_SHARE = 10.0
_TIMED = 50  # steps whose median is the usual time of a step
_FEWEST = 3  # times of steps from which on there is a usual time


@dataclasses.dataclass(frozen=True)
class Limits:
  """When a process counts as stuck; the fields of `GuardConfig`, where they are described."""

  stuck_factor: float
  stuck_seconds: float
  phase_seconds: float
  grace_seconds: float


class Store(Protocol):
  """The part of the coordination service's client that is used here."""

  def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
  def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclasses.dataclass(frozen=True)
class Team:
  """The processes of a run, for one of them."""

  store: Store
  process: int
  num_processes: int

  def put(self, folder: str, value: str):
    """Says something under this process's number. What cannot be said is left unsaid: the others are gone."""
    with contextlib.suppress(Exception):
      self.store.key_value_set(f"{folder}/{self.process}", value, allow_overwrite=True)

  def said(self, folder: str) -> dict[int, str]:
    """What the processes have said in a folder, by number; {} if the service does not answer."""
    try:
      return {
        int(key.rpartition("/")[2]): text for key, text in self.store.key_value_dir_get(folder)
      }
    except Exception:
      return {}


class Watchdog:
  """Where the main thread stands, and the thread that watches it.

  Attributes:
    verdict: the exit code with which the watchdog is ending this process; None while it lets it run.

  Args:
    limits: when it counts as stuck.
    leave: ends the process with an exit code; it does not return.
    codes: exit codes of a process that is stuck, was told to stop, and met a mistake.
    team: the other processes; None for a run of one.
    ear: file descriptor from which a byte can be read once this process is told to stop; None if there is none.
  """

  def __init__(
    self,
    limits: Limits,
    leave: Callable[[int], None],
    codes: tuple[int, int, int],
    team: Team | None,
    ear: int | None,
  ):
    self._limits, self._leave, self._team, self._ear = limits, leave, team, ear
    self._stuck_code, self._told_code, self._mistake_code = codes
    self._lock = threading.Lock()
    self._where, self._is_step, self._is_save = "the start", False, False
    self._marks, self._since = 0, time.monotonic()
    self._looked_at = self._since
    self._step_began: float | None = None
    self._times: collections.deque[float] = collections.deque(maxlen=_TIMED)
    self._meeting: tuple[str, str, Waiting] | None = None
    self._told_at: float | None = None
    self._own_work, self._shared_at = 0, 0.0
    self._work_of_others: dict[int, str] | None = None
    self._is_over = threading.Event()
    self.verdict: int | None = None
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def start(self):
    """Begins to watch."""
    self._thread.start()

  def stop(self):
    """Stops watching, for instance because the process ends."""
    self._is_over.set()

  def at(
    self,
    where: str,
    *,
    step: bool = False,
    first: bool = False,
    save: bool = False,
    within: bool = False,
  ):
    """Says where the main thread stands from now on. Each call counts as headway.

    Args:
      where: in words, as `sft step 7`.
      step: it is an ordinary step of training, so that the usual time of a step is a measure for it.
      first: the beginning of such a step.
      save: a checkpoint is being saved, for which even a process that was told to stop has time.
      within: work of the user's own inside of such a step, which counts in its time, and may take as long as a phase.
    """
    with self._lock:
      now = time.monotonic()
      if first and self._step_began is not None:
        self._times.append(now - self._step_began)
      # A time with an evaluation or a checkpoint in it is no usual one.
      if first or not (step or within):
        self._step_began = now if first else None
      self._where, self._is_step, self._is_save = where, step, save
      self._marks, self._since = self._marks + 1, now

  def forget(self):
    """Forgets the times of steps: another stage begins."""
    with self._lock:
      self._times.clear()
      self._step_began = None

  def touch(self):
    """Counts as headway, at the same place."""
    with self._lock:
      self._marks, self._since = self._marks + 1, time.monotonic()

  def progress(self):
    """Counts as headway of this process and of all who wait for it: it is at work of its own, as tokenizing is.

    Such work has no safe point. So it does not keep a process that was told to stop.
    """
    with self._lock:
      if self._told_at is None:
        self._own_work += 1
        self._since = (
          time.monotonic()
        )  # no mark: the others have none for it, and `_blame` compares them

  @contextlib.contextmanager
  def meeting(self, folder: str, name: str, *, save: bool = False) -> Generator[None, None, None]:
    """Says that the main thread waits for the others, who each say so in `folder` of the store; `save` as in `at`."""
    self.at(f"waiting for the others: {name}", save=save)
    self._meeting = (folder, name, Waiting(time.monotonic()))
    try:
      yield
    finally:
      self._meeting = None
      self.at(name)

  def usual(self) -> float | None:
    """The median time of a step in seconds; None if too few were timed."""
    return statistics.median(self._times) if len(self._times) >= _FEWEST else None

  def allowed(self) -> float:
    """Seconds that the main thread may stay where it stands."""
    usual = self.usual()
    if self._is_step and usual is not None:
      return max(self._limits.stuck_seconds, self._limits.stuck_factor * usual)
    return self._limits.phase_seconds

  def _grace(self) -> float:
    """Seconds that it may stay there once it was told to stop."""
    if self._is_save:
      return self._limits.phase_seconds
    # A step that is under way may end as usual, so that its state is saved.
    return max(self._limits.grace_seconds, 3 * (self.usual() or 0.0))

  def _watch(self):
    while not self._is_over.is_set():
      self._listen()
      self._look()

  def _look(self):
    """Ends the process if it is time for it."""
    now = time.monotonic()
    with self._lock:
      if now - self._looked_at > _TICK + _PAUSE:
        self._since = min(now, self._since + now - self._looked_at)
      self._looked_at = now
      silent = now - self._since
    if self._is_over.is_set():
      return
    if self._team:
      self._report_meeting(self._team, now)
      self._follow(self._team)
      silent = self._heed_work(self._team, now, silent)
    if self._told_at is not None and now - max(self._told_at, self._since) > self._grace():
      _dump()
      self._end(
        f"told to stop (SIGTERM), but stuck at {self._where} for {silent:.0f} s: ends without saving; the same"
        " command goes on from the last checkpoint",
        self._told_code,
      )
    elif self._limits.stuck_factor and silent > self.allowed():
      self._give_up(f"no headway for {silent:.0f} s")

  def _listen(self):
    """Waits for a tick, and meanwhile for the word to stop."""
    if self._ear is None:
      self._is_over.wait(_TICK)
      return
    if select.select([self._ear], [], [], _TICK)[0]:
      said = os.read(self._ear, 64)
      if not said:  # the other side is gone
        self._ear = None
      if signal.SIGTERM in said and self._told_at is None:
        self._told_at = time.monotonic()

  def _report_meeting(self, team: Team, now: float):
    meeting = self._meeting
    if meeting is None or not meeting[2].is_due(now):
      return
    folder, name, waiting = meeting
    there = team.said(folder)
    missing = set(range(team.num_processes)) - there.keys()
    # One of those who wait speaks for all.
    if missing and there and min(there) == team.process:
      print(
        f"waiting for {numbers(missing)} of {team.num_processes}: {name} ({now - waiting.started:.0f} s)",
        file=sys.stderr,
        flush=True,
      )

  def _follow(self, team: Team):
    """Ends this process too when another one has met a mistake or is stuck."""
    mistakes = team.said("mistake")
    if mistakes and team.process not in mistakes:
      number = min(mistakes)
      team.put("read", "")
      self._end(f"error: process {number}: {mistakes[number]}", self._mistake_code)
    elif team.said("stuck"):
      self._give_up("another process makes no headway")

  def _heed_work(self, team: Team, now: float, silent: float) -> float:
    """Tells the others of work of one's own, and waits on for those who tell of theirs.

    Returns:
      Seconds without headway: `silent`, or 0 if another process has had some.
    """
    if self._own_work and now - self._shared_at > _SHARE:
      self._shared_at = now
      team.put("work", str(self._own_work))
    # Within a step all are at the same work. And what was said long ago is no news.
    if self._is_step or silent < self.allowed() / 2:
      self._work_of_others = None
      return silent
    before = self._work_of_others
    self._work_of_others = {n: said for n, said in team.said("work").items() if n != team.process}
    if before is None or before == self._work_of_others:
      return silent
    with self._lock:
      self._since = max(self._since, now)
    return 0.0

  def _give_up(self, why: str):
    """Prints where this process stands, and ends it; with others, tells them and names those that they wait for."""
    _dump()
    usual = self.usual()
    pace = f"; a step takes {usual:.3g} s" if usual is not None else ""
    blame = f"at {self._where}"
    if self._team:
      self._team.put("stuck", json.dumps([self._marks, self._where]))
      blame = _blame(self._team)
    self._end(
      f"error: stuck ({why}{pace}): {blame}; the stacks above say more. The same command goes on from the last"
      " checkpoint",
      self._stuck_code,
    )

  def _end(self, line: str, code: int):
    if self._is_over.is_set():  # the main thread has come to an end of its own meanwhile
      return
    self.verdict = code
    print(line, file=sys.stderr, flush=True)
    # The others learn from the store why they end, and from a broken connection only that they have to. Process 0 holds
    # the store.
    if self._team:
      time.sleep(_ANSWERS if self._team.process == 0 else _ANSWERS / 2)
    self._leave(code)


def _dump():
  """Prints the Python stacks of all threads."""
  sys.stderr.flush()
  with contextlib.suppress(Exception):  # stderr may be no file
    faulthandler.dump_traceback(sys.stderr, all_threads=True)


def _blame(team: Team) -> str:
  """Which process is stuck where: the one that has come least far, or one that says nothing."""
  deadline = time.monotonic() + _ANSWERS
  while len(said := team.said("stuck")) < team.num_processes and time.monotonic() < deadline:
    time.sleep(0.2)
  places = {number: json.loads(text) for number, text in said.items()}
  silent = set(range(team.num_processes)) - places.keys()
  if silent:
    return f"{numbers(silent)} of {team.num_processes} does not answer"
  least = min(marks for marks, _ in places.values())
  behind = {number: where for number, (marks, where) in places.items() if marks == least}
  where = behind[min(behind)]
  if len(behind) == len(places):
    return f"all processes at {where}"
  return f"{numbers(behind.keys())} at {where}, where the others wait for it"
