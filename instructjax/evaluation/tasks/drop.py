"""DROP (Dua et al. 2019): counting and comparing in a passage. App. D, Fig. 18. F1 is the official script's."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from instructjax.data.messages import BadRecord, kind_of
from instructjax.evaluation.metrics import drop
from instructjax.evaluation.reading import joined
from instructjax.evaluation.task import Metric, Prompt, Question, Row, Task

_INSTRUCTION = "Answer each question using information in the preceding passage."
Spans = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Item:
  passage: str
  question: str
  golds: tuple[Spans, ...]  # right answers, the first of them the annotator's


def read(rows: Iterable[Row]) -> Iterator[Item]:
  """Items of the published file, or of rows with one question each."""
  for row in rows:
    if row.has("question"):
      yield Item(row.text("passage"), row.text("question"), _golds(row))
      continue
    value = row.value if isinstance(row.value, Mapping) else {}
    if not value:
      row.any("question")
    for name, of_passage in value.items():
      passage = row.inner(of_passage, name)
      for one in passage.inners("qa_pairs"):
        yield Item(passage.text("passage"), one.text("question"), _golds(one))


def _golds(row: Row) -> tuple[Spans, ...]:
  if row.has("answers_spans"):  # the hub's columns
    return (tuple(row.all_texts(row.column("answers_spans", "spans"), "answers_spans")),)
  others = row.inners("validated_answers") if row.has("validated_answers") else []
  found = [_spans(one) for one in [row.inner(row.any("answer"), "answer"), *others]]
  golds = tuple(spans for spans in found if spans)
  if not golds:
    raise BadRecord(f"{row.where}: 'answer' must hold a number, spans or a date")
  return golds


def _spans(answer: Row) -> Spans:
  """The spans of an answer as it is published; () for one that says nothing.

  Raises:
    BadRecord: it is neither text nor an object, its spans are no list of texts, or its date is no object.
  """
  if isinstance(answer.value, str):
    return (answer.value,) if answer.value.strip() else ()
  if answer.has("number") and answer.any("number") != "":
    return (str(answer.any("number")),)
  if answer.has("spans") and (spans := answer.texts("spans", at_least=0)):
    return tuple(spans)
  if not answer.has("date"):
    return ()
  date = answer.inner(answer.any("date"), "date")
  if not isinstance(date.value, Mapping):
    raise BadRecord(f"{date.where}: must be an object, got {kind_of(date.value)}")
  parts = [date.value.get(key) for key in ("day", "month", "year")]
  text = " ".join(str(part) for part in parts if part)
  return (text,) if text else ()


def text(item: Item) -> str:
  return f"Passage: {item.passage}\nQuestion: {item.question}\nAnswer:"


def ask(item: Item, shots: Sequence[Item]) -> Question:
  worked = [f"{text(shot)} {' and '.join(shot.golds[0])}" for shot in shots]
  return Question(joined(_INSTRUCTION, worked, text(item)), 32)


def score(item: Item, answer: str) -> dict[str, float]:
  """The better of the answer as one span and as several, which worked examples join with "and".

  Departs from paper: it does not say how a list is read from text. Taking the better reading knows the right answer.
  """
  several = [part for part in re.split(r", and |, | and ", answer.strip()) if part] or [""]
  as_one, as_several = drop.best([answer.strip()], item.golds), drop.best(several, item.golds)
  is_list = any(len(gold) > 1 for gold in item.golds)
  return max(as_one, as_several, key=lambda found: found["f1"]) if is_list else as_one


TASK = Task(
  title="DROP",
  files=("drop*/*dev*", "drop_dataset_dev.json", "drop*/*val*"),
  shot_files=("drop*/*train*", "drop_dataset_train.json"),
  tfds=("drop:dev", "drop:train"),
  read=read,
  group=lambda item: item.passage,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("f1",)),
    "few_shot": Prompt("few-shot", ask, ("f1",), shots=4),
  },
  metrics=(Metric("f1", "F1", "percent", 1), Metric("exact", "Exact match", "share", 1)),
  score=score,
)
