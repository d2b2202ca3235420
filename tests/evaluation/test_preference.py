"""Who is preferred to whom, by hand; a judge of length is found out, and one of content is not."""

import numpy as np
import pytest
from scipy import optimize

from instructjax.evaluation import preference
from instructjax.evaluation.preference import Answers

SETTINGS = {"bootstrap": 200, "seed": 0}


def test_outcomes_count_ties_half():
  found = preference.outcomes(np.array([1.0, 0.0, 2.0, np.nan]), np.array([0.0, 1.0, 2.0, 1.0]))
  np.testing.assert_array_equal(found, [1, 0, 0.5, np.nan])


def test_a_comparison_by_hand():
  outcome = np.array([1, 1, 0.5, 0, np.nan])
  found = preference.compare(outcome, np.zeros(5), np.array([0, 0, 1, 2, 3]), **SETTINGS)
  assert (found["judged"], found["win_rate"][0]) == (4, 0.625)
  assert (found["wins"], found["ties"], found["losses"]) == (0.5, 0.25, 0.25)
  assert found["longer"][0] == 0.5 and found["length_alone"][0] == 0.5
  # With lengths that say nothing, the fitted rate is the rate, but for the ridge.
  assert found["length_controlled"][0] == pytest.approx(0.625, abs=0.01)
  assert found["explained"] is None  # three prompts cannot tell .625 from .5
  assert preference.compare(np.array([np.nan]), np.zeros(1), np.zeros(1, int), **SETTINGS) is None


def test_the_fit_is_that_of_a_general_optimiser():
  rng = np.random.default_rng(0)
  term = np.tanh(rng.normal(0, 1, 300))
  outcome = (rng.random(300) < 1 / (1 + np.exp(-(0.4 + 1.5 * term)))).astype(float)
  outcome[:20] = 0.5

  def loss(beta):
    z = beta[0] + beta[1] * term
    return np.sum(np.logaddexp(0, z) - outcome * z) + 0.5 * preference._RIDGE * np.sum(beta**2)

  expected = optimize.minimize(loss, np.zeros(2), tol=1e-10).x
  (found,) = preference.fit_length(outcome, term, np.ones((1, 300)))
  np.testing.assert_allclose(found, expected, atol=1e-4)


def judge_by(kind, count=3000):
  """A judge between answers of which a's is longer in .75 of the cases: by length, or by content alone."""
  rng = np.random.default_rng(1)
  longer = rng.random(count) < 0.75
  term = np.where(longer, 0.7, -0.7)
  if kind == "length":
    outcome = longer.astype(float)
  else:
    outcome = (rng.random(count) < 0.8).astype(float)
  return preference.compare(outcome, term, np.arange(count), **SETTINGS)


def test_a_judge_of_length_is_found_out():
  found = judge_by("length")
  assert found["win_rate"][0] == found["longer"][0]
  low, high = found["length_controlled"][1]
  assert low < 0.65 and 0.35 < high
  assert found["explained"] > 0.8


def test_a_judge_of_content_is_not():
  found = judge_by("content")
  assert found["length_controlled"][0] == pytest.approx(0.8, abs=0.06)
  assert abs(found["explained"]) < 0.2


def test_both_sides_of_a_pair_add_up():
  found = Answers(["p", "q", "q"], {"a": ["xxx", "x", "x"], "b": ["x", "xx", "xxxx"]})
  verdicts = preference.from_scores({"a": [1.0, 2.0, 0.0], "b": [0.0, 2.0, 1.0]})
  rows = preference.every_pair(found, verdicts, **SETTINGS)
  for key in ("win_rate", "longer", "length_controlled", "length_alone"):
    assert rows["a"]["b"][key][0] + rows["b"]["a"][key][0] == pytest.approx(1)
  assert rows["a"]["b"]["longer"][0] == pytest.approx(1 / 3)


def test_people_rank_answers_in_any_order_and_are_averaged():
  found = Answers(["p", "q"], {"a": ["one", "same"], "b": ["two", "same"]})
  rankings = [
    ("p", ["two", "one"], [1, 2]),
    ("p", ["one", "two"], [1, 2]),
    ("p", ["one", "two"], [1, 1]),
    ("q", ["same", "other"], [1, 2]),  # of one answer, so of no pair
    ("r", ["one", "two"], [1, 2]),  # of a prompt that was not asked
  ]
  verdicts, unused = preference.from_rankings(found, rankings)
  np.testing.assert_array_equal(verdicts["a", "b"], [0.5, np.nan])
  assert unused == 2


def test_habits_name_the_word_that_took_over():
  prompts = ["of the king", "of the sea", "of the hill"]
  answers = {
    "sft": ["the king came", "a sea of glass", "by the hill"],
    "ppo": ["servant of the servant of the", "the servant", "of the servant"],
  }
  found = preference.habits(Answers(prompts, answers), "sft")
  assert found["ppo"]["spam"] == ("servant", 1.0, 0.0)
  assert found["ppo"]["repeats"] == pytest.approx(1 / 3)  # "of the" twice
  assert found["sft"]["distinct"] == 1.0 and found["sft"]["repeats"] == 0.0
  assert found["ppo"]["words"] == pytest.approx(11 / 3) and found["ppo"]["frequent"] == 1.0


def test_notes_of_labelers_are_means_by_policy():
  rows = [
    ("p", "a", {"likert": 5, "hallucination": True}),
    ("q", "a", {"likert": 7, "hallucination": False}),
    ("p", "b", {"likert": 2}),
  ]
  found = preference.metadata(rows, **SETTINGS)
  assert found["a"]["likert"] == (6.0, [5.0, 7.0]) and found["a"]["hallucination"][0] == 0.5
  assert set(found["b"]) == {"likert"}
