"""DROP's F1: the examples of its script's own tests (allennlp, drop_eval_test), and cases worked by hand."""

import pytest

from instructjax.evaluation.metrics import drop


@pytest.mark.parametrize(
  ("answer", "gold", "exact", "f1"),
  [
    (["78"], ["78.0"], 1, 1),
    (["td"], ["the td"], 1, 1),
    (["the a NOT an ARTICLE the an a"], ["NOT ARTICLE"], 1, 1),
    (["John Elton"], ["Elton John"], 0, 1),
    (["50 yard"], ["yard 50"], 0, 1),
    (["order word right"], ["right word order"], 0, 1),
    (["Per.i.o.d...."], [".P....e.r,,i;;;o...d,,"], 1, 1),
    (["Spa     c  e   s     "], ["    Spa c     e s"], 1, 1),
    (["78-yard"], ["78 yard"], 1, 1),
    (["78"], ["78-yard"], 0, 0.67),
    (["78-yard"], ["78"], 0, 0.67),
    (["This was a triumph"], ["tHIS Was A TRIUMPH"], 1, 1),
    (["Green", "bay", "packers"], ["Green", "bay", "packers"], 1, 1),
    ([""], ["army"], 0, 0),
    (["packers"], ["Green bay packers"], 0, 0.5),
    (["packers"], ["Green bay"], 0, 0),
    (["yard"], ["36 yard td"], 0, 0),  # a number that is not said
    (["23 yards"], ["43 yards"], 0, 0),
    (["56 yards"], ["56 yd"], 0, 0.5),
    (["26"], ["26 yard td"], 0, 0.5),
    (
      ["78-yard", "56", "28", "40", "44", "touchdown"],
      ["78-yard", "56 yard", "1 yard touchdown"],
      0,
      0.28,
    ),
    # That is of the later script, which divides by the larger number of spans.
    (["23", "23 yard"], ["23-yard", "56 yards"], 0, 0.5),
    (["John Karman", "Joe Hardy"], ["Joe Karman", "John Hardy"], 0, 0.5),
    (["ottoman", "Kantakouzenous"], ["ottoman", "army of Kantakouzenous"], 0, 0.75),
    (["athlete", "unprofessional"], ["unprofessional", "athlete"], 1, 1),
    (["algebra", "arithmetic"], ["arithmetic", "algebra", "geometry"], 0, 0.67),
    (
      ["Thomas Jefferson", "Thomas Davidson Arquette"],
      ["David Thomas", "Thomas Jefferson"],
      0,
      0.7,
    ),
    (["Thomas David Arquette"], ["David Thomas", "Thomas Jefferson"], 0, 0.4),
    (
      ["Thomas David Arquette"],
      ["David Thomas was eating an apple and fell to the ground"],
      0,
      0.33,
    ),
  ],
)
def test_examples(answer, gold, exact, f1):
  assert drop.scores(answer, gold) == (exact, f1)


def test_numbers_are_written_one_way():
  for text in ("12.0", "12.0  ", "12.000", "12", "  1.2e1  "):
    assert drop.normalized(text) == "12.0"
  assert drop.normalized("12.0 persons") == "12.0 persons"
  assert drop.normalized("S.K. Singh") == "sk singh"


def test_the_answer_that_fits_best_counts():
  golds = [["David Thomas"], ["Thomas Jefferson"], ["David Thomas"], ["Thomas David"]]
  assert drop.best(["Thomas David Arquette"], golds) == {"exact": 0, "f1": 80}


def test_spans_are_paired_so_that_most_is_right_however_many_there_are():
  # The other pairing, "a b" with "a" and "a c" with "a b", would give (2/3 + .5) / 2.
  assert drop.scores(["a b", "x c"], ["x", "a b"]) == (0, 0.83)
  many = [f"word{i}" for i in range(40)]
  assert drop.scores(many, [*many[1:], "other"]) == (0, 0.97)
