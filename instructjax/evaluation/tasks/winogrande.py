"""Winogrande (Sakaguchi et al. 2020): which name a gap stands for. No task of the paper; as lm-evaluation-harness.

What is scored is the text after the gap, with each of both names before it.
"""

import dataclasses
from collections.abc import Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation import choosing
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  starts: tuple[str, ...]
  end: str
  gold: int


def parse(row: Row) -> Item:
  """An item of the published file, or of one with `context_options`, `continuation` and `gold`."""
  if row.has("context_options"):
    starts = row.choices("context_options")
    return Item(starts, row.text("continuation").strip(), row.label(len(starts), "gold"))
  before, gap, after = row.text("sentence").partition("_")
  if not gap or not after.strip():
    raise BadRecord(f"{row.where}: 'sentence' must have a _ and text after it")
  # Published answers are "1" and "2", and tfds' labels 0 and 1.
  gold = row.label(2, "label") if row.has("label") else row.label(3, "answer") - 1
  if gold < 0:
    raise BadRecord(f"{row.where}: 'answer' must be 1 or 2")
  starts = tuple(before + row.text(name) for name in ("option1", "option2"))
  return Item(starts, after.strip(), gold)


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  return Choices(tuple((start, f" {item.end}") for start in item.starts))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [len(item.end)] * len(answer))


TASK = Task(
  title="Winogrande",
  files=("winogrande*.jsonl", "winogrande*/dev*", "winogrande*/val*"),
  tfds=("winogrande:validation", ""),
  read=each(parse),
  group=lambda item: item.starts[0],
  prompts={"harness": Prompt("as lm-eval", ask, ("acc",))},
  metrics=choosing.METRICS,
  score=score,
)
