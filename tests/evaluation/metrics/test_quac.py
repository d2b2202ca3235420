"""QuAC's F1, worked by hand from the rules of its script."""

import pytest

from instructjax.evaluation.metrics import quac

NONE = quac.NO_ANSWER


@pytest.mark.parametrize(
  ("golds", "kept"),
  [
    (["a", "b", NONE], ["a", "b"]),
    (["a", NONE], [NONE]),  # a tie is for "no answer"
    ([NONE, NONE, "a"], [NONE]),
    (["a"], ["a"]),
  ],
)
def test_the_majority_decides_whether_there_is_an_answer(golds, kept):
  assert quac.kept(golds) == kept


def test_people_are_compared_with_the_others():
  # "red car" and "car": 2 * .5 * 1 / 1.5 = 2/3. Each one's best match: 1, 1, 2/3.
  golds = ["red car", "red car", "car"]
  assert quac.human_f1(golds) == pytest.approx((1 + 1 + 2 / 3) / 3)
  # The model says "car": without the first {red car, car} 1, without the second 1, without "car" 2/3.
  assert quac.f1("car", golds) == pytest.approx((1 + 1 + 2 / 3) / 3)
  assert quac.human_f1(["one"]) == 1


def test_scores():
  assert quac.scores("red car", ["red car"]) == {"f1": 100, "heq_q": 1}
  assert quac.scores(NONE, ["red car", NONE]) == {"f1": 100, "heq_q": 1}
  assert quac.scores("red car", [NONE]) == {"f1": 0, "heq_q": 0}
  assert quac.scores(NONE, ["red car"]) == {"f1": 0, "heq_q": 0}
  assert quac.scores("", ["red car"]) == {"f1": 0, "heq_q": 0}
  # 2/3 is less than what people reach together, 1.
  assert quac.scores("car", ["red car", "red car"]) == {"f1": pytest.approx(200 / 3), "heq_q": 0}


def test_a_question_on_which_people_do_not_agree_is_left_out():
  assert quac.scores("red", ["red", "blue"]) == {}
