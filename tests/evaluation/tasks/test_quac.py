"""QuAC: the published file and the hub's rows are the same items; the prompt of Fig. 19."""

import pytest

from instructjax.data.messages import BadRecord
from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import quac

TURNS = [("Who?", ["Anna", "Anna V"], "Anna"), ("Why?", ["CANNOTANSWER"], "CANNOTANSWER")]
CONTEXT = "Anna sang. CANNOTANSWER"
FILE = {
  "data": [
    {
      "title": "Anna Vissi",
      "paragraphs": [
        {
          "context": CONTEXT,
          "qas": [
            {
              "question": question,
              "answers": [{"text": gold} for gold in golds],
              "orig_answer": {"text": first},
            }
            for question, golds, first in TURNS
          ],
        }
      ],
    }
  ]
}
HUB = {
  "wikipedia_page_title": "Anna Vissi",
  "context": CONTEXT,
  "questions": [turn[0] for turn in TURNS],
  "answers": {"texts": [turn[1] for turn in TURNS]},
  "orig_answers": {"texts": [turn[2] for turn in TURNS]},
}
ITEMS = list(quac.read([Row("val.json:1", FILE)]))


def test_both_forms_are_the_same_items():
  assert ITEMS == list(quac.read([Row("a:1", HUB)])) and len(ITEMS) == 2
  with pytest.raises(BadRecord, match="must be as many as 'questions'"):
    list(quac.read([Row("a:1", HUB | {"questions": ["Who?"]})]))


def test_a_question_without_an_answer_is_refused():
  paragraph = FILE["data"][0]["paragraphs"][0]
  questions = [one | {"answers": []} for one in paragraph["qas"]]
  article = {"title": "Anna Vissi", "paragraphs": [paragraph | {"qas": questions}]}
  with pytest.raises(BadRecord, match="'answers' must hold at least 1 texts"):
    list(quac.read([Row("val.json:1", {"data": [article]})]))


def test_prompts():
  instruction = (
    "Answer each question using information in the preceding background paragraph. If there is not enough information"
    ' provided, answer with "I don\'t know."\n\n'
  )
  text = "TITLE: Anna Vissi\n\nPARAGRAPH: Anna sang.\n\nQ: Who?\n\nA: Anna\n\nQ: Why?\n\nA:"
  assert quac.ask(ITEMS[1], []).prompt == instruction + text
  worked = quac.ask(ITEMS[0], [ITEMS[1]]).prompt
  assert worked.startswith(f"{instruction}{text} I don't know.\n\nTITLE: Anna Vissi")


def test_scores():
  assert quac.score(ITEMS[1], " I don't know.") == {"f1": 100, "heq_q": 1}
  assert quac.score(ITEMS[0], " I don't know.")["f1"] == 0
  assert quac.score(ITEMS[0], " Anna") == {"f1": pytest.approx(100 * (1 + 2 / 3) / 2), "heq_q": 1}
