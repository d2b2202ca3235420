"""What the watchdog takes for stuck, whom it names, and how it ends a process."""

import os
import signal
import threading
import time

import pytest

from instructjax.parallel import watchdog
from instructjax.parallel.watchdog import Limits, Watchdog
from tests.parallel.store import teams

STUCK, TOLD, MISTAKE = 69, 75, 2
QUICK = Limits(stuck_factor=10.0, stuck_seconds=0.3, phase_seconds=5.0, grace_seconds=0.2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(watchdog, "_TICK", 0.02)
  monkeypatch.setattr(watchdog, "_ANSWERS", 0.3)


class Process:
  """A watchdog whose process does not end, but says with which code it would have."""

  def __init__(self, team=None, limits=QUICK, ear=None):
    self.code, self.ended = None, threading.Event()
    self.dog = Watchdog(limits, self._leave, (STUCK, TOLD, MISTAKE), team, ear)
    self.dog.start()

  def _leave(self, code: int):
    self.code = code
    self.ended.set()
    self.dog.stop()

  def steps(self, number: int = 6, seconds: float = 0.01):
    for step in range(number):
      self.dog.at(f"sft step {step}, drawing its batch", step=True, first=True)
      time.sleep(seconds)
      self.dog.at(f"sft step {step}", step=True)


def test_a_step_that_takes_too_long_ends_the_process(capfd):
  process = Process()
  process.steps()
  began = time.monotonic()
  assert process.ended.wait(5) and process.code == STUCK
  assert 0.25 < time.monotonic() - began < 2.0
  *stacks, line = capfd.readouterr().err.splitlines()
  assert line.startswith("error: stuck (no headway for 0 s; a step takes 0.01")
  assert "at sft step 5;" in line
  assert any("test_a_step_that_takes_too_long" in entry for entry in stacks)


def test_so_many_times_the_usual_step_are_allowed():
  process = Process(limits=Limits(10.0, 0.001, 5.0, 1.0))
  process.steps(6, 0.1)
  assert process.dog.usual() == pytest.approx(0.1, rel=0.3)
  assert process.dog.allowed() == pytest.approx(1.0, rel=0.3)
  process.dog.stop()


def test_what_is_no_step_has_more_time_and_is_not_timed():
  process = Process()
  process.steps(3)
  assert process.dog.allowed() == QUICK.phase_seconds  # too few steps to know their time
  process.steps(6)
  assert process.dog.allowed() == QUICK.stuck_seconds
  process.dog.at("sft step 9, evaluating")
  assert process.dog.allowed() == QUICK.phase_seconds
  time.sleep(0.5)
  process.steps(2)
  assert process.dog.usual() < 0.1 and process.code is None
  process.dog.forget()
  assert process.dog.usual() is None
  for _ in range(4):  # a step after each evaluation: none of them has a usual time
    process.steps(1)
    process.dog.at("sft, evaluating")
  assert process.dog.usual() is None
  process.dog.stop()


def test_work_within_a_step_has_a_phases_time_and_counts_in_that_of_the_step():
  process = Process()
  for number in range(6):
    process.dog.at(f"ppo step {number}", step=True, first=True)
    process.dog.at(f"ppo step {number}, a reward", within=True)
    assert process.dog.allowed() == QUICK.phase_seconds
    time.sleep(0.02)
    process.dog.at(f"ppo step {number}, learning", step=True)
  assert 0.02 <= process.dog.usual() < 0.1
  assert process.dog.allowed() == QUICK.stuck_seconds
  process.dog.stop()


def test_a_machine_that_slept_is_not_stuck(monkeypatch):
  """Meanwhile clocks go on, and no thread runs."""
  monkeypatch.setattr(watchdog, "_PAUSE", 0.1)
  process = Process(limits=Limits(10.0, 0.3, 0.4, 0.2))
  process.dog.at("sft step 1")
  real = time.monotonic
  monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + 100.0)
  assert not process.ended.wait(0.2) and process.code is None
  process.dog.stop()


def test_a_process_that_comes_to_its_own_end_is_left_alone(capfd):
  process = Process()
  process.dog.stop()
  process.dog._end("error: stuck", STUCK)
  assert process.code is None and process.dog.verdict is None
  assert capfd.readouterr().err == ""


def test_it_can_be_switched_off():
  process = Process(limits=Limits(0.0, 0.01, 0.01, 1.0))
  assert not process.ended.wait(0.3)
  process.dog.stop()


def test_the_one_that_has_come_least_far_is_named_by_all(capfd):
  first, second = (Process(team) for team in teams(2))
  first.steps(6)
  second.steps(5)
  second.dog.at("sft step 5, drawing its batch", step=True, first=True)  # never dispatched
  assert first.ended.wait(5) and second.ended.wait(5)
  assert (first.code, second.code) == (STUCK, STUCK)
  lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: stuck")]
  assert len(lines) == 2
  for line in lines:
    assert "process 1 at sft step 5, drawing its batch, where the others wait for it" in line


def test_one_that_cannot_answer_is_named(capfd):
  team, _ = teams(2)
  process = Process(team)
  process.steps()
  assert process.ended.wait(5)
  assert "process 1 of 2 does not answer" in capfd.readouterr().err


def test_another_ones_mistake_ends_this_process_with_its_words(capfd):
  first, second = teams(2)
  process = Process(first)
  second.put("mistake", "no such file")
  assert process.ended.wait(5) and process.code == MISTAKE
  assert capfd.readouterr().err == "error: process 1: no such file\n"
  assert first.said("read") == {0: ""}


def test_sigterm_to_a_stuck_process_ends_it(capfd):
  ear, mouth = os.pipe()
  process = Process(ear=ear)
  process.dog.at("sft step 1")
  os.write(mouth, bytes([signal.SIGTERM]))
  assert process.ended.wait(5) and process.code == TOLD
  last = capfd.readouterr().err.splitlines()[-1]
  assert last.startswith("told to stop (SIGTERM), but stuck at sft step 1 for")


def test_a_save_that_is_under_way_may_end():
  ear, mouth = os.pipe()
  process = Process(ear=ear)
  os.write(mouth, bytes([signal.SIGTERM]))
  process.dog.at("sft step 1, saving", save=True)
  assert not process.ended.wait(0.5)
  process.dog.stop()


def test_work_of_its_own_counts_for_those_who_wait_for_it_too(monkeypatch):
  monkeypatch.setattr(watchdog, "_SHARE", 0.05)
  limits = Limits(stuck_factor=10.0, stuck_seconds=0.3, phase_seconds=0.4, grace_seconds=0.2)
  first, second = (Process(team, limits) for team in teams(2))
  for _ in range(25):
    first.dog.progress()
    time.sleep(0.05)
  assert (first.code, second.code) == (None, None)
  assert first.ended.wait(5) and second.ended.wait(5)  # once the work makes no headway either
  assert (first.code, second.code) == (STUCK, STUCK)


def test_work_of_its_own_does_not_keep_a_process_that_was_told_to_stop():
  ear, mouth = os.pipe()
  process = Process(ear=ear)
  os.write(mouth, bytes([signal.SIGTERM]))
  began = time.monotonic()
  while process.code is None and time.monotonic() - began < 5:
    process.dog.progress()
    time.sleep(0.02)
  assert process.code == TOLD
  process.dog.stop()


def test_headway_after_sigterm_is_waited_for():
  ear, mouth = os.pipe()
  process = Process(ear=ear)
  os.write(mouth, bytes([signal.SIGTERM]))
  for _ in range(10):
    time.sleep(0.05)
    process.dog.touch()
  assert process.code is None
  process.dog.stop()


def test_who_is_waited_for_is_named(monkeypatch, capfd):
  monkeypatch.setattr("instructjax.parallel.lobby.FIRST_REPORT", 0.1)
  first, second, third = teams(3)
  processes = [Process(first), Process(third)]
  first.put("met/1", "rm trained")
  third.put("met/1", "rm trained")
  with processes[0].dog.meeting("met/1", "rm trained"), processes[1].dog.meeting("met/1", ""):
    time.sleep(0.4)
  second.put("met/1", "rm trained")
  for process in processes:
    process.dog.stop()
  assert capfd.readouterr().err == "waiting for process 1 of 3: rm trained (0 s)\n"
