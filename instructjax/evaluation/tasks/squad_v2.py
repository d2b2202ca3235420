"""SQuAD 2.0 (Rajpurkar et al. 2018): questions about a paragraph, half of them without an answer. App. D, Fig. 20.

Earlier questions of the paragraph stand before a question with their answers. F1 is the official script's; the answer
that the prompt asks for where there is none counts as the empty answer that the script expects.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from instructjax.evaluation.metrics import words
from instructjax.evaluation.reading import Turns, conversation, joined
from instructjax.evaluation.task import Metric, Prompt, Question, Row, Task

_INSTRUCTION = (
  "Answer each question using information in the preceding background paragraph.\nIf there is not enough information"
  ' provided, answer with "Not in background."'
)
_NONE = "Not in background."


@dataclasses.dataclass(frozen=True)
class Item:
  title: str
  background: str
  turns: Turns
  question: str
  golds: tuple[str, ...]  # none if there is no answer
  is_last: bool  # of its paragraph


def read(rows: Iterable[Row]) -> Iterator[Item]:
  """Items of the published file, or of rows with one question each, which may stand in any order, as tfds' do."""
  paragraphs: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    if row.has("data"):
      for title, background, questions in _published(row):
        yield from _items(title, background, questions)
    else:
      key = (row.text("title", may_be_empty=True), row.text("context"))
      paragraphs.setdefault(key, []).append(row)
  for (title, background), questions in paragraphs.items():
    yield from _items(title, background, questions)


def _published(file: Row) -> Iterator[tuple[str, str, list[Row]]]:
  for article in file.inners("data"):
    for paragraph in article.inners("paragraphs"):
      yield article.text("title"), paragraph.text("context"), paragraph.inners("qas")


def _items(title: str, background: str, questions: Sequence[Row]) -> Iterator[Item]:
  turns: Turns = ()
  for number, row in enumerate(questions, start=1):
    question = row.text("question").strip()
    golds = _golds(row)
    yield Item(title, background, turns, question, golds, number == len(questions))
    turns = (*turns, (question, golds[0] if golds else _NONE))


def _golds(row: Row) -> tuple[str, ...]:
  return tuple(row.all_texts(row.column("answers", "text"), "answers", at_least=0))


def text(item: Item) -> str:
  head = f"Title: {item.title}\n\nBackground: {item.background}"
  return conversation(head, item.turns, item.question)


def ask(item: Item, shots: Sequence[Item]) -> Question:
  worked = [f"{text(shot)} {shot.golds[0] if shot.golds else _NONE}" for shot in shots]
  return Question(joined(_INSTRUCTION, worked, text(item)), 48)


def score(item: Item, answer: str) -> dict[str, float]:
  said = "" if words.normalized(answer) == words.normalized(_NONE) else answer
  f1 = words.best(words.f1, said, item.golds)
  return {"f1": 100 * f1, "exact": words.best(words.exact, said, item.golds)}


TASK = Task(
  title="SQuADv2",
  files=("squad*/dev*v2*", "squad*/val*", "dev-v2.0.json", "squad_v2*val*"),
  shot_files=("squad*/train*v2*", "squad*/train*", "train-v2.0.json", "squad_v2*train*"),
  tfds=("squad/v2.0:validation", "squad/v2.0:train"),
  read=read,
  group=lambda item: item.background,
  is_shot=lambda item: item.is_last,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("f1",)),
    "few_shot": Prompt("few-shot", ask, ("f1",), shots=4),
  },
  metrics=(Metric("f1", "F1", "percent", 1), Metric("exact", "Exact match", "share", 1)),
  score=score,
)
