"""The command `evaluate`: each mistake is one line, before any model is read. What it does is in tests/evaluation."""

import pytest

from instructjax.core.errors import UserError
from tests import own_flags
from tests.commands import test_generate

PROMPTS = {"hellaswag": ("zero_shot", "few_shot"), "piqa": ("harness",)}


@pytest.fixture(scope="module")
def evaluate():
  with own_flags.command("instructjax.evaluate") as module:
    yield module


@pytest.mark.parametrize(
  ("values", "tasks"),
  [
    (["all"], PROMPTS),
    (["piqa", "hellaswag/few_shot"], {"piqa": ("harness",), "hellaswag": ("few_shot",)}),
    (["hellaswag/few_shot", "hellaswag"], {"hellaswag": ("few_shot", "zero_shot")}),
  ],
)
def test_tasks(evaluate, values, tasks):
  assert evaluate.parse_tasks(values, PROMPTS) == tasks


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("x", "--tasks=x must be one of all, hellaswag, piqa"),
    ("piqa/few_shot", "--tasks=piqa/few_shot must be piqa/harness"),
    ("all/few_shot", "--tasks=all/few_shot must be all"),
  ],
)
def test_tasks_that_are_none(evaluate, value, message):
  with pytest.raises(UserError, match=message):
    evaluate.parse_tasks([value], PROMPTS)


def test_scorers(evaluate):
  names = ("toxicity", "truth")
  assert evaluate.parse_scorers(["truth=python:a:b=c"], names) == {"truth": "python:a:b=c"}
  for value in ("humour=x", "truth=", "truth"):
    with pytest.raises(UserError, match=f"--scorers={value} must be NAME=SPEC, .* toxicity, truth"):
      evaluate.parse_scorers([value], names)
  with pytest.raises(UserError, match="each name once"):
    evaluate.parse_scorers(["truth=a", "truth=b"], names)


def test_who_is_asked_as_a_chat(evaluate):
  names = ("sft", "ppo")
  assert evaluate.parse_chat([], names) == frozenset()
  assert evaluate.parse_chat(["ppo"], names) == {"ppo"}
  assert evaluate.parse_chat(["all"], names) == {"sft", "ppo"}
  with pytest.raises(UserError, match="--chat=rm must be all, or some of sft, ppo"):
    evaluate.parse_chat(["sft", "rm"], names)


def test_a_mistake_is_one_line(tmp_path):
  done = test_generate.command("--models=a=x", of="evaluate")
  assert (done.returncode, done.stdout) == (2, "")
  assert (
    done.stderr == "error: --data must name a folder with the tasks' files, TASK=FILE or tfds:\n"
  )
