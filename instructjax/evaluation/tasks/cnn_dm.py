"""CNN/Daily Mail: summaries of news, scored with ROUGE-L. App. D, Fig. 26."""

import dataclasses
from collections.abc import Sequence

from instructjax.evaluation.metrics import rouge
from instructjax.evaluation.task import Metric, Prompt, Question, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  text: str
  summary: str


def parse(row: Row) -> Item:
  return Item(row.text("article").strip(), row.text("highlights").strip())


def ask(item: Item, shots: Sequence[Item]) -> Question:
  return Question(f"{item.text}\n\nTL;DR:", 128)


def score(item: Item, answer: str) -> dict[str, float]:
  return {"rouge_l": rouge.rouge_l(answer, [item.summary])}


TASK = Task(
  title="CNN/DM",
  files=("cnn*/*test*", "cnn_d*test*"),
  tfds=("cnn_dailymail:test", ""),
  read=each(parse),
  group=lambda item: item.text,
  prompts={"zero_shot": Prompt("0-shot", ask, ("rouge_l",))},
  metrics=(Metric("rouge_l", "ROUGE-L", "share", 1),),
  score=score,
  require=rouge.require,
)
