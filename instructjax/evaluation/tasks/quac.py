"""QuAC (Choi et al. 2018): a conversation about a section of Wikipedia. App. D, Fig. 19. F1 is that of its script."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation.metrics import quac, words
from instructjax.evaluation.reading import Turns, conversation, joined
from instructjax.evaluation.task import Metric, Prompt, Question, Row, Task

_INSTRUCTION = (
  "Answer each question using information in the preceding background paragraph. If there is not enough information"
  ' provided, answer with "I don\'t know."'
)
_NONE = "I don't know."


@dataclasses.dataclass(frozen=True)
class Item:
  title: str
  paragraph: str
  turns: Turns
  question: str
  golds: tuple[str, ...]
  is_last: bool  # of its conversation


def read(rows: Iterable[Row]) -> Iterator[Item]:
  """Items of the published file, or of rows with one conversation each, as the hub has them."""
  for row in rows:
    if not row.has("data"):
      yield from _columns(row)
      continue
    for article in row.inners("data"):
      for section in article.inners("paragraphs"):
        asked = [
          (
            one.text("question"),
            one.all_texts([answer.text("text") for answer in one.inners("answers")], "answers"),
            one.inner(one.any("orig_answer"), "orig_answer").text("text"),
          )
          for one in section.inners("qas")
        ]
        yield from _items(article.text("title"), section.text("context"), asked)


def _columns(row: Row) -> Iterator[Item]:
  all_golds, firsts = row.column("answers", "texts"), row.column("orig_answers", "texts")
  questions, firsts = row.texts("questions"), row.all_texts(firsts, "orig_answers")
  if not len(all_golds) == len(questions) == len(firsts):
    raise BadRecord(f"{row.where}: 'answers' and 'orig_answers' must be as many as 'questions'")
  asked = [
    (question, row.all_texts(golds, f"answers[{i}]"), firsts[i])
    for i, (question, golds) in enumerate(zip(questions, all_golds, strict=True))
  ]
  yield from _items(row.text("wikipedia_page_title"), row.text("context"), asked)


def _items(
  title: str, context: str, asked: Sequence[tuple[str, Sequence[str], str]]
) -> Iterator[Item]:
  paragraph = context.removesuffix(quac.NO_ANSWER).strip()
  turns: Turns = ()
  for number, (question, golds, first) in enumerate(asked, start=1):
    question = question.strip()
    yield Item(title, paragraph, turns, question, tuple(golds), number == len(asked))
    turns = (*turns, (question, _NONE if first == quac.NO_ANSWER else first))


def text(item: Item) -> str:
  return conversation(
    f"TITLE: {item.title}\n\nPARAGRAPH: {item.paragraph}", item.turns, item.question
  )


def ask(item: Item, shots: Sequence[Item]) -> Question:
  worked = [
    f"{text(shot)} {_NONE if shot.golds[0] == quac.NO_ANSWER else shot.golds[0]}" for shot in shots
  ]
  return Question(joined(_INSTRUCTION, worked, text(item)), 64)


def score(item: Item, answer: str) -> dict[str, float]:
  says_none = words.normalized(answer) == words.normalized(_NONE)
  return quac.scores(quac.NO_ANSWER if says_none else answer, item.golds)


TASK = Task(
  title="QuAC",
  files=("quac*/val*", "val_v0.2.json", "quac*val*"),
  shot_files=("quac*/train*", "train_v0.2.json", "quac*train*"),
  read=read,
  group=lambda item: item.paragraph,
  is_shot=lambda item: item.is_last,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("f1",)),
    "few_shot": Prompt("few-shot", ask, ("f1",), shots=2),
  },
  metrics=(Metric("f1", "F1", "percent", 1), Metric("heq_q", "HEQ-Q", "share", 1)),
  score=score,
)
