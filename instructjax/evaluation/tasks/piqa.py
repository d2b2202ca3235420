"""PIQA (Bisk et al. 2020): which of two ways reaches a goal. No task of the paper; asked as lm-evaluation-harness."""

import dataclasses
from collections.abc import Sequence

from instructjax.evaluation import choosing
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  goal: str
  ways: tuple[str, ...]
  gold: int


def parse(row: Row) -> Item:
  """An item of the published file, or of one with `query`, `choices` and `gold`."""
  if row.has("query"):
    goal = row.text("query").strip().removeprefix("Question:").strip()
    ways = row.choices("choices")
  else:
    goal, ways = row.text("goal"), (row.text("sol1"), row.text("sol2"))
  return Item(goal, ways, row.label(len(ways), "label", "gold"))


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  prompt = f"Question: {item.goal}\nAnswer:"
  return Choices(tuple((prompt, f" {way}") for way in item.ways))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [len(way) for way in item.ways])


TASK = Task(
  title="PIQA",
  files=("piqa*.jsonl", "piqa/*val*", "piqa/dev*.jsonl"),
  read=each(parse),
  group=lambda item: item.goal,
  prompts={"harness": Prompt("as lm-eval", ask, ("acc", "acc_norm"))},
  metrics=choosing.METRICS,
  score=score,
)
