"""WSC: the prompt of Fig. 24, and the rule by which words become true or false."""

import pytest

from instructjax.evaluation.task import Row
from instructjax.evaluation.tasks import wsc

TEXT = "Jane gave Joan candy because she was hungry."
SPANS = {"span1_text": "Joan", "span2_text": "she"}
ITEM = wsc.parse(Row("a:1", {"text": TEXT, "target": SPANS, "label": True}))


def test_rows_and_prompts():
  assert wsc.parse(Row("a:1", {"text": TEXT, "label": 1} | SPANS)) == ITEM
  instruction = (
    "Final Exam with Answer Key\n"
    "Instructions: Please carefully read the following passages. For each passage, you must identify which noun the"
    " pronoun marked in bold refers to.\n\n"
  )
  text = (
    f"Passage: {TEXT}\n"
    'Question: In the passage above, what does the pronoun "she" refer to?\n'
    "Answer:"
  )
  assert wsc.ask(ITEM, []).prompt == instruction + text
  assert wsc.ask(ITEM, [ITEM]).prompt == f"{instruction}{text} Joan\n\n{text}"


@pytest.mark.parametrize(
  ("answer", "says_so"),
  [
    (" Joan", True),
    (" joan.", True),
    (" It is Joan who was hungry", True),
    (" Jo", False),  # a part of a word names nothing
    (" Joanne", False),
    (" the", False),
    (" Jane", False),
    ("", False),
  ],
)
def test_a_name_counts(answer, says_so):
  wrong = wsc.Item(TEXT, "Joan", "she", False)
  assert wsc.score(ITEM, answer)["accuracy"] == says_so
  assert wsc.score(wrong, answer)["accuracy"] == (not says_so)


@pytest.mark.parametrize(
  ("noun", "answer", "says_so"),
  [
    ("the city councilmen", "The councilmen.", True),  # some of its words
    ("the trophy", "It is the trophy", True),
    ("The man's son", "the son", True),
    ("the trophy", "He", False),
    ("the man", "he", False),
    ("Mark", "a", False),
    ("the customer", "the", False),
    ("the city councilmen", "it", False),
    ("Sam", "the same person", False),
  ],
)
def test_words_are_compared_and_not_letters(noun, answer, says_so):
  item = wsc.Item(TEXT, noun, "it", True)
  assert wsc.score(item, answer)["accuracy"] == says_so
