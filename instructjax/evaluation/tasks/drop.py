"""DROP (Dua et al. 2019): counting and comparing in a passage. App. D, Fig. 18. F1 is the official script's."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from instructjax.data.messages import BadRecord
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
  first = row.any("answer")
  others = row.any("validated_answers") if row.has("validated_answers") else []
  found = [_spans(one) for one in [first, *(others if isinstance(others, list) else [])]]
  golds = tuple(spans for spans in found if spans)
  if not golds:
    raise BadRecord(f"{row.where}: 'answer' must hold a number, spans or a date")
  return golds


def _spans(answer) -> Spans:
  """The spans of an answer as it is published; () for one that says nothing."""
  if isinstance(answer, str):
    return (answer,) if answer.strip() else ()
  if not isinstance(answer, Mapping):
    return ()
  if answer.get("number") not in (None, ""):
    return (str(answer["number"]),)
  if answer.get("spans"):
    return tuple(map(str, answer["spans"]))
  date = answer.get("date") or {}
  text = " ".join(str(date[key]) for key in ("day", "month", "year") if date.get(key))
  return (text,) if text else ()


def text(item: Item) -> str:
  return f"Passage: {item.passage}\nQuestion: {item.question}\nAnswer:"


def ask(item: Item, shots: Sequence[Item]) -> Question:
  worked = [f"{text(shot)} {' and '.join(shot.golds[0])}" for shot in shots]
  return Question(joined(_INSTRUCTION, worked, text(item)), 32)


def score(item: Item, answer: str) -> dict[str, float]:
  """The better of the answer as one span and as several, which worked examples join with "and"."""
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
