"""Repetition, copying and sameness of answers, by hand."""

import pytest

from instructjax.report import wording


@pytest.mark.parametrize(
  ("answer", "repeats"),
  [
    ("The voice of the voice.", True),  # "the voice" twice
    ("my voice and my heart.", False),  # a word twice, no pair
    ("no no no", True),  # the pair "no no" overlaps itself
    ("no no", False),
    ("", False),
    ("o rei, o rei", True),
  ],
)
def test_a_pair_of_words_that_stands_twice(answer, repeats):
  assert wording.repeats_pair(answer) is repeats


@pytest.mark.parametrize(
  ("answer", "share"),
  [
    ("Speak well of the king!", 1.0),
    ("i speak well of him.", 3 / 5),  # speak well of
    ("praise of the king", 3 / 4),
    ("the king is well.", 0.0),  # only two in a row
    ("well of the city, of the king", 6 / 7),  # well of the; of the king
    ("", 0.0),
  ],
)
def test_the_share_of_words_in_runs_of_the_prompt(answer, share):
  assert wording.copied("speak well of the king.\n", answer) == pytest.approx(share)


def test_answers_are_distinct_by_their_words():
  assert wording.distinct(["A king.", "a king", "a city.", ""]) == 3 / 4
  assert wording.distinct([]) == 0.0
