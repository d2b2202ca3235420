"""What the watchdog takes for stuck, whom it names, and how it ends a process."""

import os
import signal
import threading

import pytest

from instructjax.parallel import watchdog
from instructjax.parallel.watchdog import Limits, Watchdog
from tests.parallel.clock import Clock
from tests.parallel.store import teams

STUCK, TOLD, MISTAKE = 69, 75, 2
QUICK = Limits(stuck_factor=10.0, stuck_seconds=0.3, phase_seconds=5.0, grace_seconds=0.2)
LOOK = 0.02  # seconds between two looks


@pytest.fixture
def clock(monkeypatch):
  monkeypatch.setattr(watchdog, "_TICK", 0.0)  # nothing is waited for
  monkeypatch.setattr(watchdog, "_ANSWERS", 0.3)
  clock = Clock()
  monkeypatch.setattr(watchdog, "time", clock)
  return clock


class Process:
  """A process that does not end, but says with which code its watchdog would have ended it."""

  def __init__(self, clock, team=None, limits=QUICK, ear=None):
    self.clock, self.code = clock, None
    self.dog = Watchdog(limits, self._leave, (STUCK, TOLD, MISTAKE), team, ear)

  def _leave(self, code: int):
    self.code = code
    self.dog.stop()

  def look(self):
    if self.code is None:
      self.dog._listen()
      self.dog._look()

  def steps(self, number: int = 6, seconds: float = 0.01):
    for step in range(number):
      self.dog.at(f"sft step {step}, drawing its batch", step=True, first=True)
      wait(seconds, self)
      self.dog.at(f"sft step {step}", step=True)


def wait(seconds: float, *processes: Process) -> float:
  """Lets time go on until all processes have ended or `seconds` are over; the seconds that it took."""
  clock = processes[0].clock
  began = clock.now
  while clock.now < began + seconds - 1e-9 and any(one.code is None for one in processes):
    clock.now += min(LOOK, began + seconds - clock.now)
    for one in processes:
      one.look()
  return clock.now - began


def test_a_step_that_takes_too_long_ends_the_process(clock, capfd):
  process = Process(clock)
  process.steps()
  assert 0.3 <= wait(5.0, process) <= 0.3 + LOOK and process.code == STUCK
  *stacks, line = capfd.readouterr().err.splitlines()
  assert line.startswith("error: stuck (no headway for 0 s; a step takes 0.01")
  assert "at sft step 5;" in line
  assert any("test_a_step_that_takes_too_long" in entry for entry in stacks)


def test_so_many_times_the_usual_step_are_allowed(clock):
  process = Process(clock, limits=Limits(10.0, 0.001, 5.0, 1.0))
  process.steps(6, 0.1)
  assert process.dog.usual() == pytest.approx(0.1)
  assert process.dog.allowed() == pytest.approx(1.0)


def test_what_is_no_step_has_more_time_and_is_not_timed(clock):
  process = Process(clock)
  process.steps(3)
  assert process.dog.allowed() == QUICK.phase_seconds  # too few steps to know their time
  process.steps(6)
  assert process.dog.allowed() == QUICK.stuck_seconds
  process.dog.at("sft step 9, evaluating")
  assert process.dog.allowed() == QUICK.phase_seconds
  wait(0.5, process)
  process.steps(2)
  assert process.dog.usual() == pytest.approx(0.01) and process.code is None
  process.dog.forget()
  assert process.dog.usual() is None
  for _ in range(4):  # a step after each evaluation: none of them has a usual time
    process.steps(1)
    process.dog.at("sft, evaluating")
  assert process.dog.usual() is None


def test_work_within_a_step_has_a_phases_time_and_counts_in_that_of_the_step(clock):
  process = Process(clock)
  for number in range(6):
    process.dog.at(f"ppo step {number}", step=True, first=True)
    process.dog.at(f"ppo step {number}, a reward", within=True)
    assert process.dog.allowed() == QUICK.phase_seconds
    wait(0.02, process)
    process.dog.at(f"ppo step {number}, learning", step=True)
  assert process.dog.usual() == pytest.approx(0.02)
  assert process.dog.allowed() == QUICK.stuck_seconds


def test_a_machine_that_slept_is_not_stuck(clock):
  """Meanwhile clocks go on, and no thread runs."""
  process = Process(clock, limits=Limits(10.0, 0.3, 0.4, 0.2))
  process.dog.at("sft step 1")
  wait(0.1, process)
  clock.now += 100.0
  process.look()
  assert process.code is None
  assert 0.28 <= wait(5.0, process) <= 0.3 + LOOK  # what was left of .4


def test_headway_right_after_the_machine_slept_counts_once(clock):
  process = Process(clock, limits=Limits(10.0, 0.3, 0.4, 0.2))
  clock.now += 100.0
  process.dog.at("sft step 1")
  process.look()
  assert 0.4 <= wait(5.0, process) <= 0.4 + 2 * LOOK


def test_a_process_that_comes_to_its_own_end_is_left_alone(clock, capfd):
  process = Process(clock)
  process.dog.stop()
  process.dog._end("error: stuck", STUCK)
  assert process.code is None and process.dog.verdict is None
  assert capfd.readouterr().err == ""


def test_it_can_be_switched_off(clock):
  process = Process(clock, limits=Limits(0.0, 0.01, 0.01, 1.0))
  wait(1.0, process)
  assert process.code is None


def test_the_one_that_has_come_least_far_is_named_by_all(monkeypatch, capfd):
  """On threads, because each waits for the other's answer."""
  monkeypatch.setattr(watchdog, "_TICK", 0.02)
  monkeypatch.setattr(watchdog, "_ANSWERS", 3.0)
  ended, dogs = {0: threading.Event(), 1: threading.Event()}, []
  codes = {}
  for number, team in enumerate(teams(2)):

    def leave(code, number=number):
      codes[number] = code
      dogs[number].stop()
      ended[number].set()

    dogs.append(Watchdog(QUICK, leave, (STUCK, TOLD, MISTAKE), team, None))
  for number, dog in enumerate(dogs):
    for step in range(6 - number):
      dog.at(f"sft step {step}, drawing its batch", step=True, first=True)
      dog.at(f"sft step {step}", step=True)
  dogs[1].at("sft step 5, drawing its batch", step=True, first=True)  # never dispatched
  for dog in dogs:
    dog.start()
  assert ended[0].wait(60) and ended[1].wait(60)
  assert codes == {0: STUCK, 1: STUCK}
  lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: stuck")]
  assert len(lines) == 2
  for line in lines:
    assert "process 1 at sft step 5, drawing its batch, where the others wait for it" in line


def test_one_that_cannot_answer_is_named(clock, capfd):
  team, _ = teams(2)
  process = Process(clock, team)
  process.steps()
  wait(5.0, process)
  assert process.code == STUCK
  assert "process 1 of 2 does not answer" in capfd.readouterr().err


def test_another_ones_mistake_ends_this_process_with_its_words(clock, capfd):
  first, second = teams(2)
  process = Process(clock, first)
  second.put("mistake", "no such file")
  process.look()
  assert process.code == MISTAKE
  assert capfd.readouterr().err == "error: process 1: no such file\n"
  assert first.said("read") == {0: ""}


def test_sigterm_to_a_stuck_process_ends_it(clock, capfd):
  ear, mouth = os.pipe()
  process = Process(clock, ear=ear)
  process.dog.at("sft step 1")
  os.write(mouth, bytes([signal.SIGTERM]))
  assert 0.2 <= wait(5.0, process) <= 0.2 + 2 * LOOK and process.code == TOLD
  last = capfd.readouterr().err.splitlines()[-1]
  assert last.startswith("told to stop (SIGTERM), but stuck at sft step 1 for")


def test_a_save_that_is_under_way_may_end(clock):
  ear, mouth = os.pipe()
  process = Process(clock, ear=ear)
  os.write(mouth, bytes([signal.SIGTERM]))
  process.dog.at("sft step 1, saving", save=True)
  wait(0.9 * QUICK.phase_seconds, process)
  assert process.code is None


def test_work_of_its_own_counts_for_those_who_wait_for_it_too(clock, monkeypatch):
  monkeypatch.setattr(watchdog, "_SHARE", 0.05)
  limits = Limits(stuck_factor=10.0, stuck_seconds=0.3, phase_seconds=0.4, grace_seconds=0.2)
  first, second = (Process(clock, team, limits) for team in teams(2))
  for _ in range(25):
    first.dog.progress()
    wait(0.05, first, second)
  assert (first.code, second.code) == (None, None)
  wait(5.0, first, second)  # the work makes no headway either
  assert (first.code, second.code) == (STUCK, STUCK)


def test_work_of_its_own_does_not_keep_a_process_that_was_told_to_stop(clock):
  ear, mouth = os.pipe()
  process = Process(clock, ear=ear)
  os.write(mouth, bytes([signal.SIGTERM]))
  for _ in range(20):
    process.dog.progress()
    wait(LOOK, process)
  assert process.code == TOLD


def test_headway_after_sigterm_is_waited_for(clock):
  ear, mouth = os.pipe()
  process = Process(clock, ear=ear)
  os.write(mouth, bytes([signal.SIGTERM]))
  for _ in range(10):
    wait(0.15, process)
    process.dog.touch()
  assert process.code is None


def test_who_is_waited_for_is_named(clock, monkeypatch, capfd):
  monkeypatch.setattr("instructjax.parallel.lobby.FIRST_REPORT", 0.1)
  first, second, third = teams(3)
  processes = [Process(clock, first), Process(clock, third)]
  first.put("met/1", "rm trained")
  third.put("met/1", "rm trained")
  with processes[0].dog.meeting("met/1", "rm trained"), processes[1].dog.meeting("met/1", ""):
    wait(0.4, *processes)
  assert capfd.readouterr().err == "waiting for process 1 of 3: rm trained (0 s)\n"


def test_who_waits_for_anothers_save_has_the_time_of_a_save(clock):
  first, second = teams(2)
  ends = {}
  for is_save in (False, True):
    ear, mouth = os.pipe()
    process = Process(clock, first, ear=ear)
    with process.dog.meeting("met/1", "the workdir is copied", save=is_save):
      os.write(mouth, bytes([signal.SIGTERM]))
      wait(1.0, process)
    ends[is_save] = process.code
  assert ends == {False: TOLD, True: None}
