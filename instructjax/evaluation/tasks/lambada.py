"""LAMBADA (Paperno et al. 2016): the last word of a passage. No task of the paper; asked as lm-evaluation-harness."""

import dataclasses
import math
from collections.abc import Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation.choosing import ACC
from instructjax.evaluation.task import Choice, Choices, Metric, Prompt, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  context: str
  word: str


def parse(row: Row) -> Item:
  """An item of OpenAI's file (`text`), or of one with `context` and `continuation`."""
  if row.has("text"):
    context, _, word = row.text("text").rpartition(" ")
  else:
    context, word = row.text("context"), row.text("continuation").strip()
  if not context or not word:
    raise BadRecord(f"{row.where}: 'text' must have two words or more")
  return Item(context, word)


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  return Choices(((item.context, f" {item.word}"),))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float | list[float]]:
  (choice,) = answer
  return {"acc": float(choice.is_greedy), "perplexity": [choice.log_prob, 1.0]}


def _perplexity(sums: Sequence[float]) -> float:
  return math.exp(min(-sums[0] / sums[1], 700.0))  # what a float can hold


TASK = Task(
  title="LAMBADA",
  files=("lambada_openai*.jsonl", "lambada_test*.jsonl", "lambada*/*test*"),
  read=each(parse),
  group=lambda item: item.context,
  prompts={"harness": Prompt("as lm-eval", ask, ("acc", "perplexity"))},
  metrics=(
    ACC,
    Metric("perplexity", "Perplexity", "score", -1, _perplexity),
  ),
  score=score,
)
