"""WSC of SuperGLUE: what a pronoun refers to, answered in words. App. D, Fig. 24."""

import dataclasses
import re
from collections.abc import Sequence

from instructjax.evaluation.choosing import ACCURACY
from instructjax.evaluation.reading import joined
from instructjax.evaluation.task import Prompt, Question, Row, Task, each

_INSTRUCTION = (
  "Final Exam with Answer Key\nInstructions: Please carefully read the following passages. For each passage, you must"
  " identify which noun the pronoun marked in bold refers to."
)


_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_DETERMINERS = {"a", "an", "the", "this", "that", "these", "those"}


@dataclasses.dataclass(frozen=True)
class Item:
  passage: str
  noun: str
  pronoun: str
  is_referent: bool  # whether the pronoun refers to the noun


def parse(row: Row) -> Item:
  """An item of the published file, whose `target` holds both spans, or of one with the spans in the row."""
  spans = row.inner(row.any("target"), "target") if row.has("target") else row
  noun, pronoun = spans.text("span1_text"), spans.text("span2_text")
  return Item(row.text("text"), noun, pronoun, bool(row.label(2, "label")))


def text(item: Item) -> str:
  question = f'In the passage above, what does the pronoun "{item.pronoun}" refer to?'
  return f"Passage: {item.passage}\nQuestion: {question}\nAnswer:"


def ask(item: Item, shots: Sequence[Item]) -> Question:
  worked = [f"{text(shot)} {shot.noun}" for shot in shots]
  return Question(joined(_INSTRUCTION, worked, text(item)), 16)


def _words(text: str) -> set[str]:
  """The words of a text in small letters, without determiners; of one that has no others, those."""
  words = set(_WORD.findall(text.lower()))
  return words - _DETERMINERS or words


def score(item: Item, answer: str) -> dict[str, float]:
  """Right if the answer names the noun, or a part of it, exactly where the pronoun refers to it.

  That is, if all words of the one are among those of the other; an answer of determiners only names nothing.
  """
  said, noun = _words(answer), _words(item.noun)
  says_so = bool(said - _DETERMINERS) and (noun <= said or said <= noun)
  return {"accuracy": float(says_so == item.is_referent)}


TASK = Task(
  title="WSC",
  files=("wsc/val*", "wsc/dev*", "wsc_val*"),
  shot_files=("wsc/train*", "wsc_train*"),
  tfds=("super_glue/wsc:validation", "super_glue/wsc:train"),
  read=each(parse),
  group=lambda item: item.passage,
  is_shot=lambda item: item.is_referent,
  prompts={
    "zero_shot": Prompt("0-shot", ask, ("accuracy",)),
    "few_shot": Prompt("few-shot", ask, ("accuracy",), shots=15),
  },
  metrics=(ACCURACY,),
  score=score,
)
