"""The findings that the paper does not have: what they need and what they say. test_findings.py has them both ways."""

import dataclasses

import numpy as np

from instructjax.report import doubts
from tests.report import example


def _find(results):
  found = doubts.find(results, bootstrap=20, seed=0)
  return {finding["id"]: finding for finding in found if finding is not None}


def _same(measured, gold):
  return dataclasses.replace(measured, gold=gold * np.ones(len(measured.gold)))


def test_win_rates_over_what_needs_no_training():
  results = example.results()
  line = results.untrained["echo"]
  measured = results.measured | {"ppo_ptx": _same(results.measured["ppo_ptx"], 1.0)}
  untrained = {
    "echo": _same(line, 0.0),
    "best_line": _same(line, 1.0),
    "demonstrations": _same(line, 2.0),
  }
  results = dataclasses.replace(results, measured=measured, untrained=untrained)
  wins = doubts.untrained_wins(results, bootstrap=20, seed=0)
  assert wins == {
    "echo": (1.0, [1.0, 1.0]),
    "best_line": (0.5, [0.5] * 2),
    "demonstrations": (0.0, [0.0] * 2),
  }
  found = _find(results)["over_untrained"]
  assert found["measured"] == {"echo": 1.0, "best_line": 0.5, "demonstrations": 0.0}
  assert found["holds"] is False
  # Demonstrations alone may be better.
  del untrained["best_line"]
  assert _find(results)["over_untrained"]["holds"] is True


def test_it_is_said_if_best_of_n_does_not_reach_the_policys_kl():
  results = example.results()
  best = results.best_at_kl["ppo_ptx"]
  assert "n = 6 answers of PPO init." in _find(results)["over_best_of_n"]["claim"]
  short = {"ppo_ptx": dataclasses.replace(best, reaches=False)}
  claim = _find(dataclasses.replace(results, best_at_kl=short))["over_best_of_n"]["claim"]
  assert "which is less KL than the policy's" in claim


def test_how_often_new_topics_are_named_stands_in_the_claim():
  results = example.results()
  share = lambda found: f"{found['ppo_ptx'].names_topic.mean():.0%}"
  claim = _find(results)["new_topics"]["claim"]
  assert f"names {share(results.new_topics)} of these" in claim
  assert f"and {share(results.measured)} of those seen" in claim


def test_without_a_policy_there_is_nothing_to_doubt():
  results = dataclasses.replace(example.results(), measured={}, new_topics={}, best_at_kl={})
  assert _find(results) == {}


def test_findings_that_rest_on_win_rates_are_named():
  assert {"over_untrained", "over_best_of_n", "new_topics"} == set(_find(example.results())) - {
    "own_words"
  }
  assert {"over_untrained", "over_best_of_n", "new_topics"} <= set(doubts.JUDGED)
