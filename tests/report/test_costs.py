import dataclasses
import math

import pytest

from instructjax.core import provenance
from instructjax.report import costs
from tests import finished_run

CPU = provenance.Hardware("cpu", 1, 1, "EPYC", 2)
LOG = [
  {"step": 0, "validation/loss": 4.0, "seconds": 2.0},
  {"step": 1, "seconds": 5.0, "tokens": 100.0},
  {"step": 2, "seconds": 0.5, "tokens": 100.0},
  {"step": 3, "seconds": 0.2, "tokens": 60.0},
  {"step": 4, "seconds": 0.3, "tokens": 40.0},
]


def made(seconds: float, hardware=finished_run.MADE.hardware):
  return dataclasses.replace(finished_run.MADE, seconds=seconds, hardware=hardware)


def test_a_stage_in_one_go():
  cost = costs.of_stage(LOG, made(10.0))
  assert cost == costs.StageCost(10.0, 40.0, 4, 300.0, 5.0, 0.3, {}, 0.8)


def test_a_resumed_stage_counts_what_earlier_starts_took():
  assert costs.of_stage(LOG, made(1.5)).seconds == pytest.approx(8.0)


def test_a_stage_without_steps_has_its_time_only():
  cost = costs.of_stage([], made(3.0, CPU))
  assert (cost.seconds, cost.device_seconds, cost.steps, cost.tokens) == (3.0, 3.0, 0, 0)
  assert math.isnan(cost.first_step) and math.isnan(cost.step)
  (row,) = costs.table({"collect": cost})
  assert row == {"name": "collect", "share": 100.0, "cells": ("3 s", *[""] * 7)}


def test_table_has_shares_of_the_whole_and_tokens_a_second():
  rows = costs.table(
    costs.by_stage({"rm": LOG}, {"rm": made(30.0, CPU), "evaluate": made(10.0, CPU)})
  )
  assert [(row["name"], row["share"]) for row in rows] == [("rm", 75.0), ("evaluate", 25.0)]
  assert rows[0]["cells"] == ("30 s", "4", "5", "0.3", "300", "10", "27%", "")


def test_what_went_beside_the_steps():
  log = [
    {
      "step": 0,
      "seconds": 3.0,
      "seconds/compile": 1.0,
      "seconds/evaluate": 2.0,
      "seconds/restore": 4.0,
    },
    {"step": 1, "seconds": 6.0, "seconds/compile": 5.0},
    {"step": 2, "seconds": 1.0, "seconds/input": 0.1, "seconds/save": 0.2, "seconds/redone": 5.0},
  ]
  cost = costs.of_stage(
    log, made(15.0, CPU)
  )  # the last start: 4 s of restoring, 10 of the log and 1 of neither
  kinds = {
    "compile": 6.0,
    "input": 0.1,
    "save": 0.2,
    "evaluate": 2.0,
    "restore": 4.0,
    "redone": 5.0,
  }
  assert cost.beside == pytest.approx(kinds)
  # Of the log's 10 s, 8.3 were none of a step's. 15 s and 5 s done again are the whole.
  assert cost.goodput == pytest.approx(1.7 / 20)
  (row,) = costs.table({"ppo": cost})
  assert row["cells"][-2:] == ("8%", "compile 6 s, save 0 s, evaluate 2 s, restore 4 s, redone 5 s")


@pytest.mark.parametrize(
  ("seconds", "words"), [(48.2, "48 s"), (654.0, "10.9 min"), (11520.0, "3.20 h")]
)
def test_duration(seconds, words):
  assert costs.duration(seconds) == words


def test_the_whole_run_in_words():
  run = {"sft": made(600.0, CPU), "rm": made(60.0, CPU)}
  assert costs.in_words(costs.by_stage({}, run), run) == "In all 11.0 min on 2 cores of EPYC"
  run = {"sft": made(3600.0), "ppo": made(7200.0)}
  words = costs.in_words(costs.by_stage({}, run), run)
  assert words == "In all 3.00 h on 4 devices, TPU v5 lite: 12 device-hours"
