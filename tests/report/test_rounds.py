"""What rounds of comparisons bought, by hand."""

import dataclasses

import numpy as np
import pytest

from instructjax.report import rounds
from instructjax.report.results import Round
from tests.report import example


def test_a_correlation_is_pearsons():
  rng = np.random.default_rng(1)
  gold = rng.normal(size=60)
  reward = 1e4 + 0.5 * gold + rng.normal(size=60)
  value, (low, high) = rounds.correlation(reward, gold, 2, 500, np.random.default_rng(0))
  assert value == pytest.approx(np.corrcoef(reward, gold)[0, 1], abs=1e-6)
  assert low < value < high


def test_its_interval_resamples_prompts_not_answers():
  """Answers to one prompt that are all alike count as one."""
  rng = np.random.default_rng(2)
  x, y = rng.normal(size=(2, 20))
  width = lambda found: found[1][1] - found[1][0]
  of = lambda x, y, samples: rounds.correlation(x, y, samples, 2000, np.random.default_rng(0))
  once, often = of(x, y, 1), of(np.repeat(x, 8), np.repeat(y, 8), 8)
  assert once[0] == pytest.approx(often[0])
  assert width(once) == pytest.approx(width(often), rel=1e-6)


def test_a_score_that_never_varies_tells_nothing():
  rng = np.random.default_rng(0)
  assert rounds.correlation(np.ones(4), np.arange(4.0), 2, 10, rng) == (0.0, [0.0, 0.0])


def two_rounds():
  results = example.results()
  first = results.measured["ppo_ptx"]
  better = dataclasses.replace(first, gold=first.gold + 10)  # every answer wins over every other
  measured = {**results.measured, "ppo_ptx_2": better}
  names = ("ppo_ptx", "ppo_ptx_2")
  made = [
    Round(
      number,
      tuple(example.judged(a) for a in accuracies),
      (None, example.judged(accuracies[1] - 0.1)),  # nobody was held out in the first round
      {n: scores for n in names},
    )
    for number, accuracies, scores in ((1, (0.7, 0.5), -first.gold), (2, (0.7, 0.65), first.gold))
  ]
  return dataclasses.replace(results, measured=measured, rounds=made)


def test_each_reward_model_is_judged_on_each_round():
  results = two_rounds()
  found = rounds.table(results, bootstrap=50, seed=0)
  first, second = found["reward_models"]
  assert [value for value, _ in first["accuracy"]] == [0.7, 0.5]
  assert first["accuracy"][1][1] == pytest.approx([0.5 - 0.0196, 0.5 + 0.0196])
  nobody, (value, _) = second["heldout"]
  assert nobody is None and value == pytest.approx(0.55)
  assert first["correlation"]["ppo_ptx"][0] == pytest.approx(-1)
  assert second["correlation"]["ppo_ptx_2"][0] == pytest.approx(1)
  old, new = found["policies"]
  assert (old["over_previous"], new["over_previous"]) == (None, (1.0, [1.0, 1.0]))
  assert new["gold"] == pytest.approx(old["gold"] + 10)
  assert rounds.table(example.results(), bootstrap=50, seed=0) == {}
