"""WMT15 from French into English, scored with BLEU over all sentences. App. D, Fig. 25."""

import dataclasses
from collections.abc import Sequence

from instructjax.evaluation.metrics import bleu
from instructjax.evaluation.reading import joined
from instructjax.evaluation.task import Metric, Prompt, Question, Row, Task, each

_INSTRUCTION = "Translate the following sentences from French into English."


@dataclasses.dataclass(frozen=True)
class Item:
  french: str
  english: str


def parse(row: Row) -> Item:
  pair = row.inner(row.any("translation"), "translation") if row.has("translation") else row
  return Item(pair.text("fr", "french").strip(), pair.text("en", "english").strip())


def ask(item: Item, shots: Sequence[Item]) -> Question:
  worked = [f"French: {shot.french}\nEnglish: {shot.english}" for shot in shots]
  return Question(joined(_INSTRUCTION, worked, f"French: {item.french}\nEnglish:"), 128)


def score(item: Item, answer: str) -> dict[str, list[float]]:
  return {"bleu": bleu.counts(answer.strip(), [item.english])}


TASK = Task(
  title="WMT15 Fr-En",
  files=("wmt15*/*test*", "wmt15*fr*en*.jsonl", "wmt15*/*fr*"),
  shot_files=("wmt15*/*val*", "wmt15*/*train*"),
  tfds=("wmt15_translate/fr-en:test", "wmt15_translate/fr-en:validation"),
  read=each(parse),
  group=lambda item: item.french,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("bleu",)),
    "few_shot": Prompt("few-shot", ask, ("bleu",), shots=15),
  },
  metrics=(Metric("bleu", "BLEU", "percent", 1, corpus=bleu.corpus),),
  score=score,
  require=bleu.require,
)
