"""HellaSwag (Zellers et al. 2019): which of four endings continues a paragraph. App. D, Fig. 21."""

import dataclasses
import re
from collections.abc import Sequence

from instructjax.evaluation import choosing
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each

_INSTRUCTION = "Complete each independent paragraph using common-sense reasoning.\n\n"


@dataclasses.dataclass(frozen=True)
class Item:
  context: str
  endings: tuple[str, ...]
  gold: int


def clean(text: str) -> str:
  """The text without the marks of WikiHow, as lm-evaluation-harness writes it."""
  text = text.strip().replace(" [title]", ". ")
  return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def parse(row: Row) -> Item:
  """An item of the published file, of tfds' rows, or of one whose `ctx` holds the activity already."""
  if row.has("ctx_a"):
    start, end = row.text("ctx_a"), row.text("ctx_b", may_be_empty=True)
    context = clean(f"{row.text('activity_label')}: {start} {end.capitalize()}")
  elif row.has("activity_label"):
    context = clean(f"{row.text('activity_label')}: {row.text('context', 'ctx')}")
  else:
    context = row.text("ctx", "context")
  endings = tuple(map(clean, row.choices("endings")))
  return Item(context, endings, row.label(len(endings), "label"))


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  solved = "".join(f"{shot.context} {shot.endings[shot.gold]}\n\n" for shot in shots)
  prompt = _INSTRUCTION + solved + item.context
  return Choices(tuple((prompt, f" {ending}") for ending in item.endings))


def ask_harness(item: Item, shots: Sequence[Item]) -> Choices:
  return Choices(tuple((item.context, f" {ending}") for ending in item.endings))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [len(ending) for ending in item.endings])


TASK = Task(
  title="HellaSwag",
  files=("hellaswag*/val*.jsonl", "hellaswag_val*.jsonl", "hellaswag*/*validation*"),
  shot_files=("hellaswag*/train*.jsonl", "hellaswag_train*.jsonl", "hellaswag*/*train*"),
  tfds=("hellaswag:validation", "hellaswag:train"),
  read=each(parse),
  group=lambda item: item.context,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("accuracy",)),
    "few_shot": Prompt("few-shot", ask, ("accuracy",), shots=15),
    "harness": Prompt("as lm-eval", ask_harness, ("acc", "acc_norm")),
  },
  metrics=choosing.METRICS,
  score=score,
)
