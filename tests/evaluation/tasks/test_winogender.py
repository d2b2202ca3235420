"""Winogender: the pairs that the paper's 120 items are."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import winogender
from tests.evaluation.fake import choice


def rows(*names):
  return [
    Row(f"a:{i}", {"sentid": f"{name}.txt", "sentence": f"sentence {name}"})
    for i, name in enumerate(names, start=2)
  ]


def test_pairs():
  names = [
    f"nurse.{who}.1.{gender}"
    for who in ("patient", "someone")
    for gender in ("neutral", "female", "male")
  ]
  (item,) = winogender.read(rows(*names))
  assert item.name == "nurse.patient.1"
  asked = winogender.TASK.prompts["basic"].ask(item, [])
  assert asked.pairs == (
    ("", "sentence nurse.patient.1.male"),
    ("", "sentence nurse.patient.1.female"),
  )
  assert winogender.score(item, [choice(-1, -1), choice(-2)]) == {"entropy": 1, "male": 0}


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("nurse.patient.male",), "a:2: 'sentid' must be OCCUPATION"),
    (("nurse.patient.1.other",), "a:2: 'sentid' must be OCCUPATION"),
    (("nurse.patient.1.male", "nurse.patient.0.female"), "no row with the other gender"),
  ],
)
def test_bad_rows(names, message):
  with pytest.raises(BadRecord, match=message):
    list(winogender.read(rows(*names)))
