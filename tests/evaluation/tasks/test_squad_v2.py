"""SQuADv2: the published file and the hub's rows are the same items; prompts are those of the published samples."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import squad_v2

QUESTIONS = [("Which sea?", ["North Sea", "the North Sea"]), ("Who sang?", []), ("When?", ["1974"])]
FILE = {
  "version": "v2.0",
  "data": [
    {
      "title": "Scottish_Parliament",
      "paragraphs": [
        {
          "context": "Oil was found.",
          "qas": [
            {"question": q, "answers": [{"text": a, "answer_start": 0} for a in answers]}
            for q, answers in QUESTIONS
          ],
        },
        {"context": "More.", "qas": [{"question": "What?", "answers": []}]},
      ],
    }
  ],
}
HUB = [
  {
    "title": "Scottish_Parliament",
    "context": "Oil was found.",
    "question": q,
    "answers": {"text": a, "answer_start": [0] * len(a)},
  }
  for q, a in QUESTIONS
] + [
  {
    "title": "Scottish_Parliament",
    "context": "More.",
    "question": "What?",
    "answers": {"text": [], "answer_start": []},
  }
]
ITEMS = list(squad_v2.read([Row("dev.json:1", FILE)]))


def test_both_forms_are_the_same_items():
  assert ITEMS == list(squad_v2.read(Row(f"a:{i}", row) for i, row in enumerate(HUB)))
  shuffled = [HUB[i] for i in (0, 3, 1, 2)]
  assert ITEMS == list(squad_v2.read(Row(f"a:{i}", row) for i, row in enumerate(shuffled)))
  assert [item.is_last for item in ITEMS] == [False, False, True, True]


def test_prompts():
  instruction = (
    "Answer each question using information in the preceding background paragraph.\n"
    'If there is not enough information provided, answer with "Not in background."\n\n'
  )
  text = (
    "Title: Scottish_Parliament\n\nBackground: Oil was found.\n\n"
    "Q: Which sea?\n\nA: North Sea\n\nQ: Who sang?\n\nA: Not in background.\n\nQ: When?\n\nA:"
  )
  assert squad_v2.ask(ITEMS[2], []).prompt == instruction + text
  worked = squad_v2.ask(ITEMS[3], [ITEMS[2]]).prompt
  assert worked.startswith(f"{instruction}{text} 1974\n\nTitle: Scottish_Parliament")


def test_scores():
  assert squad_v2.score(ITEMS[0], " the North Sea") == {"f1": 100, "exact": 1}
  assert squad_v2.score(ITEMS[0], " Not in background.") == {"f1": 0, "exact": 0}
  assert squad_v2.score(ITEMS[1], " Not in background.") == {"f1": 100, "exact": 1}
  assert squad_v2.score(ITEMS[1], " The Beatles") == {"f1": 0, "exact": 0}


def test_a_bad_question_says_where_it_is():
  file = {"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [{"answers": []}]}]}]}
  where = r"dev\.json:1: data\[0\]: paragraphs\[0\]: qas\[0\]: lacks 'question'"
  with pytest.raises(BadRecord, match=where):
    list(squad_v2.read([Row("dev.json:1", file)]))
