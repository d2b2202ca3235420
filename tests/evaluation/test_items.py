"""Which items are asked, and which are worked examples: never the same, and the same on every machine."""

import dataclasses
import json

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import items, rows
from instructjax.evaluation.tasks import hellaswag

TASK = hellaswag.TASK


def write(path, count, word):
  lines = [
    {"ctx": f"{word} {i}", "endings": ["a", f"{word} right {i}"], "label": 1} for i in range(count)
  ]
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def load(folder, *, needs_shots=True):
  data = rows.Data((str(folder),), {}, False)
  return items.load("hellaswag", TASK, data, needs_shots=needs_shots)


def test_a_limit_draws_by_seed_in_the_order_of_the_file(tmp_path):
  write(tmp_path / "hellaswag" / "val.jsonl", 40, "row")
  loaded = load(tmp_path)
  asked = items.ask(TASK, "zero_shot", loaded, limit=5, seed=0)
  assert len(asked.numbers) == 5 and list(asked.numbers) == sorted(asked.numbers)
  assert asked == items.ask(TASK, "zero_shot", loaded, limit=5, seed=0)
  assert asked.numbers != items.ask(TASK, "zero_shot", loaded, limit=5, seed=1).numbers
  # A larger limit only adds items, so that a short trial is a part of the whole.
  assert set(asked.numbers) < set(items.ask(TASK, "zero_shot", loaded, limit=9, seed=0).numbers)
  assert items.ask(TASK, "zero_shot", loaded, limit=None, seed=0).numbers == tuple(range(40))
  assert asked.shots_from == ""


def test_a_limit_draws_from_all_strata_alike(tmp_path):
  write(tmp_path / "hellaswag" / "val.jsonl", 40, "row")
  # 30 items of stratum 0, eight of 1 and two of 2.
  of = lambda item: (int(item.context[4:]) >= 30) + (int(item.context[4:]) >= 38)
  task = dataclasses.replace(TASK, stratum=of)
  asked = items.ask(task, "zero_shot", load(tmp_path), limit=9, seed=0)
  counts = [[of(item) for item in asked.items].count(part) for part in (0, 1, 2)]
  assert counts in ([4, 3, 2], [3, 4, 2])  # the ninth is of either
  more = items.ask(task, "zero_shot", load(tmp_path), limit=20, seed=0)
  assert set(asked.numbers) < set(more.numbers)
  assert [[of(item) for item in more.items].count(part) for part in (0, 1, 2)] == [10, 8, 2]


def test_worked_examples_are_of_the_training_split(tmp_path):
  write(tmp_path / "hellaswag" / "val.jsonl", 3, "row")
  write(tmp_path / "hellaswag" / "train.jsonl", 30, "worked")
  asked = items.ask(TASK, "few_shot", load(tmp_path), limit=None, seed=0)
  prompt = asked.asks[0].pairs[0][0]
  assert len(asked.items) == 3 and prompt.count("right") == 15
  assert prompt.endswith("\n\nrow 0") and "row" not in prompt.removesuffix("row 0")
  assert asked.shots_from == "15 worked examples, the training split"
  # All items share them, so that they are computed once.
  assert len({ask.pairs[0][0].removesuffix(f"row {i}") for i, ask in enumerate(asked.asks)}) == 1


def test_with_one_file_worked_examples_are_taken_out_of_it(tmp_path):
  write(tmp_path / "hellaswag" / "val.jsonl", 40, "row")
  loaded = load(tmp_path)
  asked = items.ask(TASK, "few_shot", loaded, limit=None, seed=0)
  assert len(asked.items) == 25 and "taken out of the file that is asked" in asked.shots_from
  prompt = asked.asks[0].pairs[0][0]
  for item in asked.items:
    assert item.endings[item.gold] not in prompt.split("\n")[2:-2]
  with pytest.raises(UserError, match="no row is left|holds 14 worked examples, and 15"):
    write(tmp_path / "hellaswag" / "val.jsonl", 14, "row")
    items.ask(TASK, "few_shot", load(tmp_path), limit=None, seed=0)


def test_no_data_and_no_rows(tmp_path):
  assert load(tmp_path) is None
  write(tmp_path / "hellaswag" / "val.jsonl", 0, "row")
  with pytest.raises(UserError, match=r"val\.jsonl holds no rows of hellaswag"):
    load(tmp_path)
