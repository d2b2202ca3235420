"""Means, intervals and paired differences of scores."""

import json

import numpy as np
import pytest
from scipy import stats

from instructjax.evaluation import items, runner, summary, tasks
from instructjax.evaluation.task import Metric

MEAN = Metric("accuracy", "Accuracy", "share", 1)
# The share of right words, of all items together.
CORPUS = Metric("words", "Words", "percent", 1, corpus=lambda sums: 100 * sums[0] / sums[1])


def planned(num_items, prompt="zero_shot"):
  asked = items.Asked(tuple(range(num_items)), (None,) * num_items, (None,) * num_items, "")
  return runner.Planned("hellaswag", prompt, tasks.found()["hellaswag"], asked, "a.jsonl", {})


def test_a_mean_has_the_interval_of_scipys_bootstrap():
  values = np.random.default_rng(1).integers(0, 2, 60).astype(float)
  found = summary.measured(MEAN, values, 0)
  reference = stats.bootstrap(
    (values,), np.mean, n_resamples=summary.BOOTSTRAP, method="percentile", rng=0
  ).confidence_interval
  assert found["value"] == values.mean() and found["num_items"] == 60
  np.testing.assert_allclose(found["interval"], [reference.low, reference.high], atol=0.02)


def test_an_item_that_is_no_part_of_a_metric_does_not_count():
  found = summary.measured(MEAN, np.array([1.0, np.nan, 0.0, np.nan]), 0)
  assert (found["value"], found["num_items"]) == (0.5, 2)


def test_a_metric_of_a_corpus_is_no_mean_of_items():
  # 1 of 1 and 0 of 9 words: 10% of all words, where the mean over items would be 50%.
  found = summary.measured(CORPUS, np.array([[1.0, 1.0], [0.0, 9.0]]), 0)
  assert found["value"] == 10 and found["interval"] == [0, 100]
  a, b = np.array([[1.0, 2.0]] * 12), np.array([[2.0, 2.0]] * 12)
  told = summary.difference(CORPUS, "a", "b", a, b, 0)
  assert (told["difference"], told["interval"], told["verdict"]) == (50, [50, 50], "higher")


def test_differences_are_paired():
  # Items differ far more than the models, of which b is a little better on each.
  hard = np.random.default_rng(0).normal(0, 10, 40)
  told = summary.difference(MEAN, "a", "b", hard, hard + 0.1, 0)
  assert told["difference"] == pytest.approx(0.1) and told["verdict"] == "higher"
  assert summary.difference(MEAN, "a", "b", hard + 0.1, hard, 0)["verdict"] == "lower"
  alone = summary.measured(MEAN, hard, 0)["interval"]
  assert alone[1] - alone[0] > 1  # unpaired, it would be lost in this
  # Only items that both have.
  missing = hard.copy()
  missing[:35] = np.nan
  assert summary.difference(MEAN, "a", "b", missing, hard + 0.1, 0)["verdict"] == "cannot be told"


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
    {"sft": "a", "ppo": "b"}, [found], [runner.Skipped("piqa", "no", "mend")], {}
  )
  summary.write(tmp_path / "summary.json", whole)
  read = json.loads((tmp_path / "summary.json").read_text())
  assert read["skipped"] == [{"task": "piqa", "reason": "no"}]
  assert read["parts"][0]["metrics"][0]["paper"][3] == [0.552, 0.69, 0.807]
