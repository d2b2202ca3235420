"""Means, intervals and paired differences of scores."""

import json
import types

import numpy as np
import pytest
from scipy import stats

from instructjax.evaluation import items, runner, summary, tasks
from instructjax.evaluation.task import Metric

MEAN = Metric("accuracy", "Accuracy", "share", 1)
# The share of right words, of all items together.
CORPUS = Metric("words", "Words", "percent", 1, corpus=lambda sums: 100 * sums[0] / sums[1])


EACH = np.arange(40)  # 40 items, each a group of its own


def planned(num_items, prompt="zero_shot"):
  contexts = tuple(types.SimpleNamespace(context=str(i)) for i in range(num_items))
  asked = items.Asked(tuple(range(num_items)), contexts, (None,) * num_items, "")
  return runner.Planned("hellaswag", prompt, tasks.found()["hellaswag"], asked, "a.jsonl", {})


def test_a_mean_has_the_interval_of_scipys_bootstrap():
  values = np.random.default_rng(1).integers(0, 2, 60).astype(float)
  found = summary.measured(MEAN, values, np.arange(60), 0)
  reference = stats.bootstrap(
    (values,), np.mean, n_resamples=summary.BOOTSTRAP, method="percentile", rng=0
  ).confidence_interval
  assert found["value"] == values.mean() and found["num_items"] == 60
  np.testing.assert_allclose(found["interval"], [reference.low, reference.high], atol=0.02)


def test_an_item_that_is_no_part_of_a_metric_does_not_count():
  found = summary.measured(MEAN, np.array([1.0, np.nan, 0.0, np.nan]), np.arange(4), 0)
  assert (found["value"], found["num_items"]) == (0.5, 2)


def test_a_metric_of_a_corpus_is_no_mean_of_items():
  # 1 of 1 and 0 of 9 words: 10% of all words, where the mean over items would be 50%.
  found = summary.measured(CORPUS, np.array([[1.0, 1.0], [0.0, 9.0]]), np.arange(2), 0)
  assert found["value"] == 10 and found["interval"] == [0, 100]
  a, b = np.array([[1.0, 2.0]] * 12), np.array([[2.0, 2.0]] * 12)
  told = summary.difference(CORPUS, "a", "b", a, b, np.arange(12), 0)
  assert (told["difference"], told["interval"], told["verdict"]) == (50, [50, 50], "higher")


def test_differences_are_paired():
  # Items differ far more than the models, of which b is a little better on each.
  hard = np.random.default_rng(0).normal(0, 10, 40)
  told = summary.difference(MEAN, "a", "b", hard, hard + 0.1, EACH, 0)
  assert told["difference"] == pytest.approx(0.1) and told["verdict"] == "higher"
  assert summary.difference(MEAN, "a", "b", hard + 0.1, hard, EACH, 0)["verdict"] == "lower"
  alone = summary.measured(MEAN, hard, EACH, 0)["interval"]
  assert alone[1] - alone[0] > 1  # unpaired, it would be lost in this
  # Only items that both have.
  missing = hard.copy()
  missing[:35] = np.nan
  assert (
    summary.difference(MEAN, "a", "b", missing, hard + 0.1, EACH, 0)["verdict"] == "cannot be told"
  )


def test_models_without_an_item_in_common_have_no_difference():
  scores = {
    "sft": {"accuracy": np.array([1.0, np.nan])},
    "ppo": {"accuracy": np.array([np.nan, 1.0])},
  }
  fits = {name: {"cut": 0, "too long": 1} for name in scores}
  (row,) = summary.part(planned(2), scores, fits, 0)["metrics"]
  assert row["models"].keys() == scores.keys() and row["differences"] == []


def test_questions_about_one_passage_are_resampled_together():
  """Ten questions a passage with one answer in common say as much as one: the interval is that of 20 passages."""
  of_passage = np.random.default_rng(3).integers(0, 2, 20).astype(float)
  values, group_N = np.repeat(of_passage, 10), np.repeat(np.arange(20), 10)
  found = summary.measured(MEAN, values, group_N, 0)
  alone = summary.measured(MEAN, of_passage, np.arange(20), 0)
  assert (found["num_items"], found["num_groups"]) == (200, 20)
  assert found["value"] == alone["value"]
  np.testing.assert_allclose(found["interval"], alone["interval"], atol=1e-12)
  wide, narrow = found["interval"], summary.measured(MEAN, values, np.arange(200), 0)["interval"]
  assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])  # sqrt(10) = 3.2
  # A metric of a corpus: each passage's words are all right or all wrong.
  words = np.stack([values, np.ones(200)], axis=1)
  of_words = summary.measured(CORPUS, words, group_N, 0)
  np.testing.assert_allclose(of_words["interval"], 100 * np.array(found["interval"]), atol=1e-9)


def test_passages_of_different_lengths_count_by_their_questions():
  """The mean is over items. Resampled by hand: of passages with 1 and 3 questions, 00, 01, 10 or 11 are drawn."""
  found = summary.measured(MEAN, np.array([1.0, 0.0, 0.0, 0.0]), np.array([0, 1, 1, 1]), 0)
  assert found["value"] == 0.25 and found["interval"] == [0.0, 1.0]


def test_a_difference_needs_ten_passages():
  better = np.ones(90)
  few, enough = np.repeat(np.arange(9), 10), np.repeat(np.arange(10), 9)
  told = lambda group_N: summary.difference(MEAN, "a", "b", 0 * better, better, group_N, 0)
  assert told(few)["verdict"] == "cannot be told" and told(enough)["verdict"] == "higher"
  words = np.stack([better, better], axis=1)
  none = np.stack([0 * better, better], axis=1)
  told = summary.difference(CORPUS, "a", "b", none, words, enough, 0)
  assert (told["difference"], told["interval"], told["verdict"]) == (100, [100, 100], "higher")


@pytest.mark.parametrize(
  ("interval", "num_items", "verdict"),
  [
    ((0.01, 0.2), 40, "higher"),
    ((-0.2, -0.01), 40, "lower"),
    ((-0.1, 0.1), 40, "cannot be told"),
    ((0.0, 0.1), 40, "cannot be told"),
    ((-0.1, 0.0), 40, "cannot be told"),
    ((0.5, 0.5), 9, "cannot be told"),
  ],
)
def test_what_an_interval_tells(interval, num_items, verdict):
  assert summary.verdict(interval, num_items) == verdict


def test_a_part_says_what_is_shown_and_what_is_missing(tmp_path):
  scores = {
    "sft": {"accuracy": np.array([1.0, 0.0]), "acc": np.array([1.0, 1.0])},
    "ppo": {"accuracy": np.array([1.0, 1.0]), "acc": np.array([1.0, 1.0])},
  }
  fits = {name: {"cut": 0, "too long": 0} for name in scores}
  found = summary.part(planned(2), scores, fits, 0)
  shown = {row["key"]: row["is_shown"] for row in found["metrics"]}
  assert shown == {"accuracy": True, "acc": False} and found["missing"] == {}
  (row,) = (row for row in found["metrics"] if row["is_shown"])
  assert row["paper"].gpt == (0.549, 0.673, 0.781)
  assert [(one["a"], one["b"], one["difference"]) for one in row["differences"]] == [
    ("sft", "ppo", 0.5)
  ]
  assert summary.part(planned(2, "harness"), scores, fits, 0)["missing"] == {
    "acc_norm": "no item has it"
  }
  del scores["ppo"]["accuracy"]
  fits["ppo"]["too long"] = 2
  assert summary.part(planned(2), scores, fits, 0)["missing"] == {
    "accuracy": "ppo: every item is too long to be asked"
  }
  whole = summary.whole(
    {"sft": "a", "ppo": "b"}, [found], [runner.Skipped("piqa", "no", "mend")], {}, {}
  )
  summary.write(tmp_path / "summary.json", whole)
  read = json.loads((tmp_path / "summary.json").read_text())
  assert read["findings"] == []  # the base is not among the models
  assert read["skipped"] == [{"task": "piqa", "reason": "no"}]
  assert read["parts"][0]["metrics"][0]["paper"][3] == [0.552, 0.69, 0.807]
