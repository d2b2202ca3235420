"""DROP: answers of all forms, and the prompt of Fig. 18."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import drop

EMPTY = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
PAIRS = [
  {"question": "How many?", "answer": EMPTY | {"number": "3"}, "validated_answers": [EMPTY]},
  {"question": "Who?", "answer": EMPTY | {"spans": ["Jo", "Al"]}},
  {"question": "When?", "answer": EMPTY | {"date": {"day": "17", "month": "August", "year": ""}}},
]
ITEMS = list(drop.read([Row("dev.json:1", {"p1": {"passage": "P.", "qa_pairs": PAIRS}})]))
HUB = {
  "passage": "P.",
  "question": "Who?",
  "answers_spans": {"spans": ["Jo", "Al"], "types": ["span", "span"]},
}


def test_answers():
  assert [item.golds for item in ITEMS] == [(("3",),), (("Jo", "Al"),), (("17 August",),)]
  assert list(drop.read([Row("a:1", HUB)])) == [ITEMS[1]]
  row = {"passage": "P.", "question": "How many?", "answer": "3", "validated_answers": ["4", ""]}
  (item,) = drop.read([Row("a:1", row)])
  assert item.golds == (("3",), ("4",))


def test_prompts():
  instruction = "Answer each question using information in the preceding passage.\n\n"
  assert drop.ask(ITEMS[0], [ITEMS[1]]).prompt == (
    f"{instruction}Passage: P.\nQuestion: Who?\nAnswer: Jo and Al\n\n"
    "Passage: P.\nQuestion: How many?\nAnswer:"
  )


def test_scores():
  assert drop.score(ITEMS[0], " 3.0") == {"f1": 100, "exact": 1}
  assert drop.score(ITEMS[0], " 3 and 4")["f1"] == 50  # one right answer: no list is looked for
  assert drop.score(ITEMS[1], " Al and Jo") == {"f1": 100, "exact": 1}
  assert drop.score(ITEMS[1], "") == {"f1": 0, "exact": 0}


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (
      {"p1": {"passage": "P.", "qa_pairs": [{"question": "?", "answer": EMPTY}]}},
      r"p1: qa_pairs\[0\]",
    ),
    ({"p1": {"passage": "P."}}, "lacks 'qa_pairs'"),
    (
      HUB | {"answers_spans": None, "answer": {"spans": 5}},
      "answer: 'spans' must be a list of texts",
    ),
    (
      HUB | {"answers_spans": None, "answer": {"spans": "Jo"}},
      "answer: 'spans' must be a list of texts",
    ),
    (HUB | {"answers_spans": None, "answer": {"date": 5}}, "answer: date: must be an object"),
    ({}, "lacks 'question'"),
  ],
)
def test_bad_rows(value, message):
  with pytest.raises(BadRecord, match=message):
    list(drop.read([Row("dev.json:1", value)]))
