"""Seconds a step of each process: whom the others wait for."""

import json

import numpy as np
import pytest

from instructjax.train import pace
from tests.parallel.clock import Clock
from tests.parallel.store import teams


def test_the_late_one_is_slow_and_those_who_wait_for_it_are_not():
  # Steps of 1 s. Process 1 draws its batch for .5 s, in which the devices of 0 and 2 wait for its devices.
  own, waited = np.array([0.1, 0.5, 0.1]), np.array([0.9, 0.5, 0.9])
  assert pace.seconds_alone(own, waited) == [0.6, 1.0, 0.6]


@pytest.mark.parametrize(
  "seconds, process",
  [
    ([0.6, 1.0, 0.6], 1),
    ([1.0, 1.2], None),
    ([1.0, 1.3], 1),
    ([0.001, 0.003], None),  # the time of a line on the terminal
    ([], None),
  ],
)
def test_slowest(seconds, process):
  assert pace.slowest(seconds) == process


def test_the_line():
  line = pace.slow_message("sft", [0.6, 1.0, 0.6], 1)
  assert line.startswith("sft: process 1 is the slowest: 1 s a step, the median is 0.6 s")


def test_own_work_and_waits_are_told_apart(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(pace, "time", clock)
  first, second = teams(2)
  speed = pace.Pace()
  for _ in range(2):
    clock.sleep(0.05)
    with speed.waiting():
      clock.sleep(0.1)
    speed.step()
  with speed.beside(), speed.waiting():
    clock.sleep(0.2)
  second.put("pace", json.dumps([1, 0.4, 0.02]))
  assert speed.gather(first) == pytest.approx([0.05 + 0.02, 0.4 + 0.02])
  assert json.loads(first.said("pace")[0]) == pytest.approx([1, 0.05, 0.1])


def test_only_process_0_needs_the_numbers_and_one_that_says_nothing_is_not_waited_for(monkeypatch):
  monkeypatch.setattr(pace, "_ANSWERS", 0.1)
  first, second = teams(2)
  assert pace.Pace().gather(first) == []
  assert pace.Pace().gather(second) == []
  assert set(first.said("pace")) == {0, 1}


def test_one_process_compares_itself_with_nobody():
  assert pace.Pace().gather(None) == []
