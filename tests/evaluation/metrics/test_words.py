"""SQuAD's F1: the examples that are published with its script's ports, and cases worked by hand."""

import pytest

from instructjax.evaluation.metrics import words


@pytest.mark.parametrize(
  ("answer", "gold", "exact", "f1"),
  [
    # allennlp's tests of the official scripts.
    ("abcd", "  ABCD ", 1, 1),
    ("T.J Howard", "tj howard", 1, 1),
    ("7802", "78.02", 1, 1),
    ("td", "the td", 1, 1),
    ("the a NOT an ARTICLE the an a", "NOT ARTICLE", 1, 1),
    ("This was a triumph", "tHIS Was A TRIUMPH", 1, 1),
    ("", "news", 0, 0),
    ("news", "", 0, 0),
    ("", "", 1, 1),
    ("This was a triumph", "a triumph", 0, 0.5),
    # By hand: 2 of 4 words said, 2 of 3 right: 2 * .5 * .667 / 1.167.
    ("oil in North Sea", "the North Sea oil-field", 0, 2 * 0.5 * (2 / 3) / (0.5 + 2 / 3)),
    # A word counts as often as in both: 1 of 3, 1 of 1.
    ("no no no", "no", 0, 0.5),
    ("red", "blue", 0, 0),
  ],
)
def test_examples(answer, gold, exact, f1):
  assert words.exact(answer, gold) == exact
  assert words.f1(answer, gold) == pytest.approx(f1)


def test_the_best_gold_counts_and_none_means_silence():
  assert words.best(words.f1, "triumph", ["defeat", "a triumph"]) == 1
  assert words.best(words.f1, "", []) == 1
  assert words.best(words.f1, "something", []) == 0
  # The script drops answers of which nothing is left, such as "the".
  assert words.best(words.f1, "", ["the"]) == 1
