"""COPA of SuperGLUE: the cause or effect of a sentence. No task of the paper; asked as lm-evaluation-harness."""

import dataclasses
from collections.abc import Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation import choosing
from instructjax.evaluation.task import Choice, Choices, Prompt, Row, Task, each

_WORDS = {"cause": "because", "effect": "therefore"}


@dataclasses.dataclass(frozen=True)
class Item:
  start: str
  choices: tuple[str, ...]
  gold: int


def parse(row: Row) -> Item:
  """An item of the published file, or of one with `query`, `choices` and `gold`."""
  if row.has("query"):
    choices = row.choices("choices")
    return Item(row.text("query").strip(), choices, row.label(len(choices), "gold"))
  question = row.text("question")
  if question not in _WORDS:
    raise BadRecord(f"{row.where}: 'question' must be {' or '.join(_WORDS)}")
  start = f"{row.text('premise').strip()[:-1]} {_WORDS[question]}"
  choices = [row.text("choice1"), row.text("choice2")]
  return Item(start, tuple(text[0].lower() + text[1:] for text in choices), row.label(2, "label"))


def ask(item: Item, shots: Sequence[Item]) -> Choices:
  # Two spaces: the harness's task gives its choices one, and the harness sets another before them.
  return Choices(tuple((item.start, f"  {choice}") for choice in item.choices))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  return choosing.scores(item.gold, answer, [len(choice) for choice in item.choices])


TASK = Task(
  title="COPA",
  files=("copa*.jsonl", "copa/val*", "copa/dev*"),
  tfds=("super_glue/copa:validation", ""),
  read=each(parse),
  group=lambda item: item.start,
  prompts={"harness": Prompt("as lm-eval", ask, ("acc",))},
  metrics=choosing.METRICS,
  score=score,
)
