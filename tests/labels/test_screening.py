"""The paper's criteria: what a candidate passes, fails, and what is left open."""

import pytest

from instructjax.labels import forms, screening
from instructjax.labels.judgements import Judgement


def judgement(item, name, role, flags=None, ranks=(1, 2), number=0):
  """Two answers, of which `flags` are violent; without flags a demonstration."""
  payload = {"text": "x"}
  if flags is not None:
    fields = dict.fromkeys((name for name, _ in forms.FIELDS), False)
    payload = {
      "answers": {
        str(2 * item + i): fields | {"violent": flag, "rank": rank, "overall": 4, "note": ""}
        for i, (flag, rank) in enumerate(zip(flags, ranks, strict=True))
      }
    }
  kind = "demonstration" if flags is None else "ranking"
  return Judgement(number, item, kind, True, "labeler", "train", name, role, payload, 1.0, 0.0)


def researchers(items):
  """Two of three call the first answer of each item violent, and all rank it first."""
  return [
    judgement(item, f"r{i}", "researcher", (i < 2, False)) for item in items for i in range(3)
  ]


@pytest.mark.parametrize(
  ("flags", "ranks", "sensitive", "ranking"),
  [
    ((True, False), (1, 2), 1.0, 1.0),
    ((False, False), (2, 1), 0.5, 0.0),
    ((True, True), (1, 1), 0.5, None),  # ties decide nothing
  ],
)
def test_flags_against_the_majority_and_ranks_against_each(flags, ranks, sensitive, ranking):
  found = researchers(range(6)) + [judgement(i, "ann", "labeler", flags, ranks) for i in range(6)]
  (ann,) = screening.candidates(found, {}, {"ann": {"Age": 2, "Gender": 1}})
  assert (ann.sensitive.mean, ann.ranking.mean, ann.subjects) == (sensitive, ranking, ("Age",))
  assert ann.passes is (False if sensitive < 0.75 else None)


@pytest.mark.parametrize(
  ("grades", "is_above", "passes"),
  [
    ((7,) * 6, True, True),
    ((2,) * 6, False, False),
    ((7, 7, 7, 7, 7, 1), True, None),
    ((7,), True, None),
  ],
)
def test_the_cutoffs_are_soft_and_few_items_settle_nothing(grades, is_above, passes):
  """36 / 6 = 6 is at the cutoff, and its interval is on both sides."""
  own = [judgement(i, "ann", "labeler", (True, False)) for i in range(6)]
  own += [judgement(9 + i, "ann", "labeler", number=i + 1) for i in range(len(grades))]
  graded = {i + 1: [grade] for i, grade in enumerate(grades)}
  (ann,) = screening.candidates(researchers(range(6)) + own, graded, {})
  assert (ann.is_above, ann.passes) == (is_above, passes)


def test_who_did_not_work_on_the_screening_is_no_candidate():
  assert screening.candidates(researchers([1]), {}, {}) == []
