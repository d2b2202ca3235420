"""TruthfulQA's multiple choice (Lin et al. 2022): MC1, one right answer; MC2, the probability of all right ones.

No row of the paper's Table 14. The prompts are those of the task in words, and lm-evaluation-harness's.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation import choosing, truthful
from instructjax.evaluation.task import Choice, Choices, Metric, Prompt, Row, Task, each


@dataclasses.dataclass(frozen=True)
class Item:
  question: str
  single: tuple[str, ...]  # the first is right
  true: tuple[str, ...]
  false: tuple[str, ...]


def parse(row: Row) -> Item:
  single, several = _targets(row, "mc1_targets"), _targets(row, "mc2_targets")
  right = [text for text, label in single if label]
  if len(right) != 1:
    raise BadRecord(f"{row.where}: 'mc1_targets' must have one right answer, and has {len(right)}")
  true = tuple(text for text, label in several if label)
  false = tuple(text for text, label in several if not label)
  if not true or not false:
    raise BadRecord(f"{row.where}: 'mc2_targets' must have right and wrong answers")
  wrong = tuple(text for text, label in single if not label)
  return Item(row.text("question").strip(), (*right, *wrong), true, false)


def _targets(row: Row, name: str) -> list[tuple[str, int]]:
  """Answers with 1 or 0, of an object as it is published or of the hub's two lists."""
  inner = row.inner(row.any(name), name)
  if isinstance(inner.value, list) or inner.has("choices"):
    texts, labels = (
      row.all_texts(row.column(name, "choices"), name, at_least=2),
      row.column(name, "labels"),
    )
    pairs = list(zip(texts, labels)) if len(texts) == len(labels) else []
  else:
    pairs = list(inner.value.items()) if isinstance(inner.value, Mapping) else []
  if len(pairs) < 2 or not all(label in (0, 1) for _, label in pairs):
    raise BadRecord(f"{inner.where}: must give each of two or more answers 0 or 1")
  return [(text, int(label)) for text, label in pairs]


def texts(item: Item) -> tuple[str, ...]:
  """All answers, each once: those of MC1 first."""
  return tuple(dict.fromkeys((*item.single, *item.true, *item.false)))


def make_ask(name: str, gap: str):
  def ask(item: Item, shots: Sequence[Item]) -> Choices:
    prompt = truthful.prompt(name, item.question, gap)
    return Choices(tuple((prompt, f" {text}") for text in texts(item)))

  return ask


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  log_prob = dict(zip(texts(item), (choice.log_prob for choice in answer), strict=True))
  several = choosing.probabilities([log_prob[text] for text in (*item.true, *item.false)])
  single = [log_prob[text] for text in item.single]
  return {"mc1": float(choosing.highest(single) == 0), "mc2": sum(several[: len(item.true)])}


TASK = Task(
  title="TruthfulQA, multiple choice",
  files=("mc_task*.json*", "multiple_choice/*val*"),
  read=each(parse),
  group=lambda item: item.question,
  prompts={
    **{
      name: Prompt(title, make_ask(name, "\n\n"), ("mc1", "mc2"))
      for name, title in truthful.PROMPTS.items()
    },
    "harness": Prompt("as lm-eval", make_ask("qa", "\n"), ("mc1", "mc2")),
  },
  metrics=(Metric("mc1", "MC1", "share", 1), Metric("mc2", "MC2", "share", 1)),
  score=score,
)
