"""SST-2 of GLUE: whether a film is liked. App. D, Fig. 23."""

import dataclasses
from collections.abc import Sequence

from instructjax.evaluation import choosing
from instructjax.evaluation.reading import joined
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each

_INSTRUCTION = "For each snippet of text, label the sentiment of the text as positive or negative."
_ANSWERS = (" negative", " positive")


@dataclasses.dataclass(frozen=True)
class Item:
  sentence: str
  gold: int  # 1 if it is positive


def parse(row: Row) -> Item:
  return Item(row.text("sentence", "text").strip(), row.label(2, "label"))


def text(item: Item) -> str:
  return f"Text: {item.sentence}\nLabel:"


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  prompt = joined(_INSTRUCTION, [text(shot) + _ANSWERS[shot.gold] for shot in shots], text(item))
  return Choices(tuple((prompt, answer) for answer in _ANSWERS))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [8, 8])


TASK = Task(
  title="SST",
  files=("sst*/dev*", "sst*/val*"),
  shot_files=("sst*/train*",),
  tfds=("glue/sst2:validation", "glue/sst2:train"),
  read=each(parse),
  group=lambda item: item.sentence,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("accuracy",)),
    "few_shot": Prompt("few-shot", ask, ("accuracy",), shots=15),
  },
  metrics=choosing.METRICS,
  score=score,
)
