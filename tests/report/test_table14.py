"""The paper's numbers: some cells read again, and that every row is of a task that there is."""

import pytest

from instructjax.evaluation import tasks
from instructjax.report import table14


@pytest.mark.parametrize(
  ("name", "cells"),
  [
    ("winogender/basic/entropy", ((0.750, 0.721, 0.735), (0.760, 0.719, 0.737))),
    ("truthful_qa/qa/true_info", ((0.193, 0.186, 0.251), (0.285, 0.464, 0.689))),
    ("squad_v2/few_shot/f1", ((58.86, 62.33, 69.75), (58.33, 63.78, 69.93))),
    ("tldr/zero_shot/rouge_l", ((0.182, 0.197, 0.196), (0.214, 0.231, 0.220))),
  ],
)
def test_cells(name, cells):
  found = table14.cells(*name.split("/"))
  assert (found.gpt, found.ppo_ptx) == cells


def test_what_is_not_in_the_table():
  assert table14.cells("hellaswag", "harness", "acc") is None


def test_what_is_hard_to_read_is_said():
  assert table14._UNCERTAIN.keys() <= table14.TABLE.keys()
  assert table14.notes("wsc", "few_shot", "accuracy") == ["the paper's PPO 1.3B reads .625 or .630"]
  assert table14.notes("wsc", "zero_shot", "accuracy") == []


def test_every_row_is_shown_by_a_task():
  found = tasks.found()
  for name in table14.TABLE:
    task, prompt, metric = name.split("/")
    assert metric in found[task].prompts[prompt].metrics, name
