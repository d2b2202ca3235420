"""What is measured of reward models, by hand and beside the package rewardbench."""

import json
import math
import pathlib

import numpy as np
import pytest

from instructjax.evaluation import reward_models
from instructjax.evaluation.reward_models import Entry, Item

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / "golden" / "rewardbench2.json").read_text(encoding="utf-8")
)
SETTINGS = {"bootstrap": 200, "seed": 0}


def test_pairs_of_a_ranking_by_hand():
  item = Item("p", ["a b c", "a", "a b"], [1, 2, 2], [0.5, 0.1, 0.9])
  found = reward_models.pairs_of([item])
  np.testing.assert_allclose(found.margin_N, [0.4, -0.4])  # the tie of the last two is left out
  assert list(found.longer_N) == [2, 1] and list(found.alike_N) == [False, False]


def test_a_row_by_hand():
  items = [
    Item("p", ["long answer here", "short"], [1, 2], [1.0, 0.0]),  # right, longer preferred
    Item("q", ["short", "long answer here"], [1, 2], [0.0, 1.0]),  # wrong, shorter preferred
    Item("r", ["same", "size"], [2, 1], [0.0, 2.0]),  # right, of like length
    Item("s", ["same", "size"], [1, 1], [0.0, 2.0]),  # a tie
  ]
  row = reward_models.row(items, **SETTINGS)
  assert (row["pairs"], row["prompts"], row["ties"], row["num_length_matched"]) == (3, 3, 0.25, 1)
  assert row["accuracy"][0] == pytest.approx(2 / 3)
  assert row["longer_wins"][0] == 0.5 and row["follows_length"][0] == 1.0
  assert row["length_matched"][0] == 1.0 and row["shorter_wins"][0] == 0.0
  expected = [math.log1p(math.exp(-1)), math.log1p(math.exp(1)), math.log1p(math.exp(-2))]
  assert row["log_loss"] == pytest.approx(np.mean(expected))


def test_a_model_that_counts_words_is_found_out():
  rng = np.random.default_rng(0)
  items = []
  for number in range(300):
    lengths = rng.integers(1, 20, 2)
    answers = [" ".join(["w"] * n) for n in lengths]
    prefers = int(rng.random() < 0.7) == int(lengths[0] > lengths[1])
    items.append(
      Item(f"p{number}", answers, [1, 2] if prefers else [2, 1], [float(n) for n in lengths])
    )
  row = reward_models.row(items, bootstrap=100, seed=0)
  assert row["follows_length"][0] == 1.0
  assert row["accuracy"][0] == pytest.approx(row["longer_wins"][0], abs=0.03)
  assert row["shorter_wins"][0] == 0.0


def test_labelers_are_compared_with_the_model_and_with_each_other():
  items = [
    Item("p", ["a", "b"], [1, 2], [1.0, 0.0], "ann"),
    Item("p", ["a", "b"], [2, 1], [1.0, 0.0], "bob"),
    Item("q", ["a", "b"], [1, 2], [1.0, 0.0], "ann"),
    Item("q", ["a", "b"], [1, 2], [1.0, 0.0], "bob"),
  ]
  found = reward_models.table(items, **SETTINGS)
  assert {who: row["accuracy"][0] for who, row in found["labelers"].items()} == {
    "ann": 1.0,
    "bob": 0.5,
  }
  assert found["agreement"][0] == 0.5
  assert reward_models.table(items[:1], **SETTINGS)["agreement"] is None


def test_labelers_agree_on_the_same_answers_in_any_order():
  items = [
    Item("p", ["a", "b", "c"], [1, 2, 3], [0.0] * 3, "ann"),
    Item("p", ["c", "a", "b"], [2, 1, 3], [0.0] * 3, "bob"),  # a before c before b: bc is turned
    Item("q", ["a", "a"], [1, 2], [0.0] * 2, "ann"),  # which a is which is not known
    Item("q", ["a", "a"], [2, 1], [0.0] * 2, "bob"),
  ]
  assert reward_models.labeler_agreement(items, **SETTINGS)[0] == pytest.approx(2 / 3)


def test_best_of_four_and_ties_by_hand():
  items = [
    Item("p", list("abcd"), [1, 2, 2, 2], [1.0, 0.0, 0.0, 0.5]),
    Item("q", list("abcd"), [2, 1, 2, 2], [1.0, 1.0, 0.0, 0.5]),  # shared with one other
    Item("r", list("abcd"), [1, 1, 2, 2], [2.0, 1.9, 0.0, 0.5]),
    Item("s", list("abcd"), [1, 1, 2, 2], [2.0, 0.6, 0.0, 0.5]),  # above the others, but not clear
  ]
  found = reward_models.table(items, **SETTINGS)
  assert found["best"]["4"]["share"][0] == 0.75 and found["best"]["4"]["chance"] == 0.25
  assert found["best"]["4"]["items"] == 2
  assert found["ties"]["above"][0] == 1.0 and found["ties"]["clear"][0] == 0.5


def test_credit_is_that_of_rewardbench():
  assert [reward_models.credit(row) for row in GOLDEN["best_of"]] == pytest.approx(
    GOLDEN["credits"]
  )


def test_the_score_of_ties_is_that_of_rewardbench():
  entries = [Entry(row["id"], "Ties", row["num_correct"], row["scores"]) for row in GOLDEN["ties"]]
  assert reward_models.ties_score(entries) == pytest.approx(GOLDEN["ties_score"], abs=1e-12)
  best = [Entry(str(i), "Math", 1, row) for i, row in enumerate(GOLDEN["best_of"])]
  found = reward_models.rewardbench2(entries + best)
  assert found["Math"] == pytest.approx(np.mean(GOLDEN["credits"]))
  assert found["mean"] == pytest.approx((found["Math"] + found["Ties"]) / 2)
