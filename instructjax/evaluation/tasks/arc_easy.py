"""ARC-Easy (Clark et al. 2018): questions of school science. No task of the paper; as lm-evaluation-harness."""

import dataclasses
from collections.abc import Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation import choosing
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  question: str
  choices: tuple[str, ...]
  gold: int


def parse(row: Row) -> Item:
  """An item of the published file, of the hub's columns, or of one with `query`, `choices` and `gold`."""
  if row.has("query"):
    question = row.text("query").strip().removeprefix("Question:").strip()
    choices = row.choices("choices")
    return Item(question, choices, row.label(len(choices), "gold"))
  of_question = row.any("question")
  if isinstance(of_question, dict):
    inner = row.inner(of_question, "question")
    question = inner.text("stem")
    found = [(one.text("text"), one.text("label")) for one in inner.inners("choices")]
  else:
    question = row.text("question")
    texts, marks = (
      row.all_texts(row.column("choices", key), "choices") for key in ("text", "label")
    )
    if len(texts) != len(marks):
      raise BadRecord(f"{row.where}: 'choices' must have as many labels as texts")
    found = list(zip(texts, marks, strict=True))
  labels, key = [label for _, label in found], row.text("answerKey")
  if key not in labels:
    raise BadRecord(f"{row.where}: 'answerKey' must be one of {', '.join(labels)}")
  return Item(question, tuple(text for text, _ in found), labels.index(key))


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  prompt = f"Question: {item.question}\nAnswer:"
  return Choices(tuple((prompt, f" {choice}") for choice in item.choices))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [len(choice) for choice in item.choices])


TASK = Task(
  title="ARC-Easy",
  files=("arc-easy/*test*", "arc-easy*test*", "arc_easy*.jsonl"),
  read=each(parse),
  group=lambda item: item.question,
  prompts={"harness": Prompt("as lm-eval", ask, ("acc", "acc_norm"))},
  metrics=choosing.METRICS,
  score=score,
)
