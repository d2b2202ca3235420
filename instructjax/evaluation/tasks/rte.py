"""RTE of SuperGLUE: whether a passage entails a sentence. App. D, Fig. 22."""

import dataclasses
from collections.abc import Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation import choosing
from instructjax.evaluation.reading import joined
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each

_LABELS = ("entailment", "not_entailment")
_ANSWERS = (" Yes", " No")


@dataclasses.dataclass(frozen=True)
class Item:
  premise: str
  hypothesis: str
  gold: int  # 0 if it is entailed


def parse(row: Row) -> Item:
  label = row.any("label")
  if isinstance(label, str) and not label.isdecimal():
    if label not in _LABELS:
      raise BadRecord(f"{row.where}: 'label' must be {' or '.join(_LABELS)}")
    gold = _LABELS.index(label)
  else:
    gold = row.label(2, "label")
  return Item(row.text("premise", "sentence1"), row.text("hypothesis", "sentence2"), gold)


def text(item: Item) -> str:
  claim = item.hypothesis.strip().removesuffix(".")
  question = f"From this passage can one reasonably conclude that {claim}?"
  return f"Passage: {item.premise.strip()}\nQuestion: {question}\nAnswer:"


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  prompt = joined("", [text(shot) + _ANSWERS[shot.gold] for shot in shots], text(item))
  return Choices(tuple((prompt, answer) for answer in _ANSWERS))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [3, 2])


TASK = Task(
  title="RTE",
  files=("rte*/val*", "rte*/dev*", "rte_val*"),
  shot_files=("rte*/train*", "rte_train*"),
  tfds=("super_glue/rte:validation", "super_glue/rte:train"),
  read=each(parse),
  group=lambda item: item.premise,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("accuracy",)),
    "few_shot": Prompt("few-shot", ask, ("accuracy",), shots=15),
  },
  metrics=choosing.METRICS,
  score=score,
)
