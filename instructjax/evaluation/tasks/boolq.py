"""BoolQ of SuperGLUE: yes or no to a question about a passage. No task of the paper; as lm-evaluation-harness."""

import dataclasses
from collections.abc import Sequence

from instructjax.evaluation import choosing
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  passage: str
  question: str
  gold: int  # 1 for yes


def parse(row: Row) -> Item:
  """An item of the published file, or of one with passage and question in `query`."""
  if row.has("query"):
    passage, _, question = row.text("query").rpartition("\nQuestion:")
    passage = passage.strip().removeprefix("Passage:")
  else:
    passage, question = row.text("passage"), row.text("question")
  question = question.strip().removesuffix("?")
  return Item(passage.strip(), question, row.label(2, "label", "answer", "gold"))


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  prompt = f"{item.passage}\nQuestion: {item.question}?\nAnswer:"
  return Choices(((prompt, " no"), (prompt, " yes")))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [2, 3])


TASK = Task(
  title="BoolQ",
  files=("boolq*.jsonl", "boolq/val*", "boolq/dev*"),
  tfds=("super_glue/boolq:validation", ""),
  read=each(parse),
  group=lambda item: item.passage,
  prompts={"harness": Prompt("as lm-eval", ask, ("acc",))},
  metrics=choosing.METRICS,
  score=score,
)
