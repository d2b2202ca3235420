"""Tests of instructjax.stages.untrained: the answers that need no training."""

import types

import numpy as np

from instructjax.data.records import Demonstration, Prompt
from instructjax.data.token_store import Encoded
from instructjax.stages import untrained
from tests import micro


def _context(records, sequences, **changes):
  """A run whose tokens are code points, with 0 as the end."""
  return types.SimpleNamespace(
    config=micro.config("ppo", {"demonstrations": "jsonl:x", "prompts": "jsonl:x"} | changes),
    tokenizer=types.SimpleNamespace(stop_ids=(0,), decode=lambda ids: "".join(map(chr, ids))),
    data=types.SimpleNamespace(
      records=lambda kind, split: records[kind, split],
      tokens=lambda kind, split: types.SimpleNamespace(sequences=lambda: sequences),
    ),
  )


def test_a_users_own_data_have_no_best_line():
  own = [Demonstration("a\n", "one"), Demonstration("a\n", "two"), Demonstration("b\n", "three")]
  ctx = _context({("demonstrations", "test"): own}, [Encoded([9, 104, 105, 0], 1)])
  found = untrained.answers_without_training(ctx, ["a\n", "a\n", "a\n", "b\n"])
  assert found == {
    "echo": ["a", "a", "a", "b"],
    "random_line": ["hi"] * 4,
    "demonstrations": ["one", "two", "one", "three"],
  }
  assert "demonstrations" not in untrained.answers_without_training(ctx, ["a\n", "c\n"])
  bare = _context({}, [], demonstrations="")
  assert untrained.answers_without_training(bare, ["a\n"]) == {"echo": ["a"]}


def test_the_best_line_is_chosen_on_training_prompts(monkeypatch):
  lines = [f"line {i}" for i in range(100)]
  prompts = [f"prompt {i}" for i in range(40)]
  asked = set()

  def gold_score(prompts, answers):
    asked.update(prompts)
    number = np.array([int(answer.split()[1]) for answer in answers])
    # Line 99 is best on the prompts that all lines are tried on, and worst on the others.
    few = np.array([int(prompt.split()[1]) % 5 == 0 for prompt in prompts])
    return np.where(number == 99, np.where(few, 1000, -1000), number)

  assert untrained.best_line(gold_score, lines, prompts) == "line 98"
  assert asked == set(prompts)
  records = {
    ("demonstrations", "train"): [Demonstration("x\n", line) for line in lines],
    ("prompts", "train"): [Prompt(prompt) for prompt in prompts],
    ("demonstrations", "test"): [],
  }
  ctx = _context(records, [Encoded([104, 0], 0)])
  echo = lambda prompt: prompt[2:6]
  task = types.SimpleNamespace(score_without_base=gold_score, echo=echo)
  monkeypatch.setattr(untrained.sources, "simulation", lambda spec: task)
  found = untrained.answers_without_training(ctx, ["a test prompt\n"] * 2)
  assert found["best_line"] == ["line 98"] * 2
  assert (
    found["echo"] == ["test"] * 2
  )  # as the task says, where it has a frame around what was asked
  assert "a test prompt\n" not in asked
