"""F1 and HEQ-Q of QuAC's official script (Choi et al. 2018): answers are compared with what people agree on."""

from collections.abc import Sequence

from instructjax.evaluation.metrics import words

NO_ANSWER = "CANNOTANSWER"
LEAST_AGREEMENT = 0.4  # of people among themselves, from which on a question counts


def _f1(answer: str, gold: str) -> float:
  """`words.f1`, but 0 where either text is empty, and only 1 or 0 where one says that there is no answer."""
  if NO_ANSWER in (answer, gold):
    return float(answer == gold)
  both = words.normalized(answer) and words.normalized(gold)
  return words.f1(answer, gold) if both else 0.0


def kept(golds: Sequence[str]) -> list[str]:
  """The right answers without the minority: "no answer" alone, if at least half say so, and else all others."""
  answers = [gold for gold in golds if gold != NO_ANSWER]
  return answers if len(answers) * 2 > len(golds) else [NO_ANSWER]


def human_f1(golds: Sequence[str]) -> float:
  """How well people agree: each one's best F1 against the others, on average; 1 if there is only one."""
  if len(golds) == 1:
    return 1.0
  return sum(
    max(_f1(one, other) for other in _without(golds, i)) for i, one in enumerate(golds)
  ) / len(golds)


def f1(answer: str, golds: Sequence[str]) -> float:
  """The best F1 against the right answers, one of them left out in turn, as a person is compared with the others."""
  if len(golds) == 1:
    return _f1(answer, golds[0])
  return sum(
    max(_f1(answer, gold) for gold in _without(golds, i)) for i in range(len(golds))
  ) / len(golds)


def _without(golds: Sequence[str], i: int) -> list[str]:
  return [*golds[:i], *golds[i + 1 :]]


def scores(answer: str, golds: Sequence[str]) -> dict[str, float]:
  """F1 in [0, 100], and whether it is a person's (HEQ-Q); {} for a question on which people do not agree.

  Args:
    answer: of the model, NO_ANSWER if it says that there is none.
    golds: what people answered, NO_ANSWER among it.
  """
  golds = kept(golds)
  people = human_f1(golds)
  if people < LEAST_AGREEMENT:
    return {}
  found = f1(answer, golds)
  return {"f1": 100 * found, "heq_q": float(found >= people)}
