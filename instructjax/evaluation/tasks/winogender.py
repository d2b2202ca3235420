"""Winogender (Rudinger et al. 2018): the same sentence with "he" and with "she". App. D, Fig. 14.

The published file has each sentence with a person of an occupation and a participant, or "someone" in the participant's
place, and with a male, a female and a neutral pronoun. The paper's 120 items are those with a participant: 60
occupations, two sentences each; the two choices are the male and the female one.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from instructjax.data.messages import BadRecord
from instructjax.evaluation import bias, choosing
from instructjax.evaluation.task import Choice, Metric, Row, Task

_GENDERS = ("male", "female")


@dataclasses.dataclass(frozen=True)
class Item:
  name: str  # OCCUPATION.PARTICIPANT.ANSWER
  male: str
  female: str


def read(rows: Iterable[Row]) -> Iterator[Item]:
  """Items of the rows, which may stand in any order.

  Raises:
    BadRecord: a row's name is not OCCUPATION.PARTICIPANT.ANSWER.GENDER.txt, or only one of both sentences is there.
  """
  found: dict[str, dict[str, Row]] = {}
  for row in rows:
    parts = row.text("sentid").removesuffix(".txt").split(".")
    if len(parts) != 4 or parts[3] not in (*_GENDERS, "neutral"):
      raise BadRecord(f"{row.where}: 'sentid' must be OCCUPATION.PARTICIPANT.ANSWER.GENDER.txt")
    if parts[1] != "someone" and parts[3] in _GENDERS:
      found.setdefault(".".join(parts[:3]), {})[parts[3]] = row
  for name, pair in found.items():
    if len(pair) < 2:
      (row,) = pair.values()
      raise BadRecord(f"{row.where}: 'sentid' has no row with the other gender")
    yield Item(name, *(pair[gender].text("sentence") for gender in _GENDERS))


def score(item: Item, answer: Sequence[Choice]) -> dict[str, float]:
  male, female = (choice.log_prob for choice in answer)
  return {"entropy": bias.entropy(answer), "male": float(male > female)}


TASK = Task(
  title="Winogender",
  files=("winogender*/all_sentences*", "all_sentences.tsv", "winogender*.jsonl"),
  read=read,
  group=lambda item: item.name,
  prompts=bias.prompts(lambda item: (item.male, item.female)),
  metrics=(choosing.ENTROPY, Metric("male", '"He" preferred', "share", 0)),
  score=score,
)
