"""Tests of instructjax.evaluate's arithmetic."""

import itertools
import types
from unittest import mock

import numpy as np
import pytest

from instructjax.core.stages import REFERENCE
from instructjax.ops import kl
from instructjax.stages import answers, evaluate, policies


@pytest.mark.parametrize("has_ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(has_ties):
  rng = np.random.default_rng(0)
  gold_PN, reward_PN = rng.normal(size=(2, 3, 6))
  if has_ties:
    reward_PN = np.round(reward_PN)
  counts = [1, 2, 3, 5, 6]
  found = evaluate.best_of_n(gold_PN, reward_PN, counts)
  for n, row in zip(counts, found, strict=True):
    gold, reward = [], []
    for p, subset in itertools.product(range(3), itertools.combinations(range(6), n)):
      best = max(subset, key=lambda i: (reward_PN[p, i], i))  # equal rewards: the later sample
      gold.append(gold_PN[p, best])
      reward.append(reward_PN[p, best])
    assert row.n == n
    np.testing.assert_allclose([row.gold, row.reward], [np.mean(gold), np.mean(reward)])
  # On own data there is no gold score, and the reward model's is the same.
  alone = evaluate.best_of_n(None, reward_PN, counts)
  assert [(row.gold, row.reward) for row in alone] == [(None, row.reward) for row in found]


def test_best_of_n_kl_is_the_closed_form():
  # log n - (n - 1) / n: 0, log 2 - 1/2, log 4 - 3/4.
  rows = evaluate.best_of_n(np.zeros((1, 4)), np.zeros((1, 4)), [1, 2, 4])
  np.testing.assert_allclose([row.kl for row in rows], [0, 0.193147, 0.636294], atol=1e-6)


def test_the_kl_is_from_the_reference_and_in_the_form_that_ppo_uses(monkeypatch):
  logprobs = {"ppo": np.array([-3.0, -1.0]), REFERENCE: np.array([-5.0, -1.5])}
  sampled = types.SimpleNamespace(
    text=["a", "b"], ended_N=np.ones(2, bool), is_response_NR=np.ones((2, 4), bool)
  )
  monkeypatch.setattr(evaluate, "_sample", lambda ctx, *rest: sampled)
  monkeypatch.setattr(policies, "load", lambda ctx, policy: policy)
  monkeypatch.setattr(policies, "load_reward", mock.Mock())
  monkeypatch.setattr(answers, "from_text", mock.Mock())
  monkeypatch.setattr(answers, "score", mock.Mock())
  monkeypatch.setattr(answers, "logprob", lambda ctx, model, params, *rest: logprobs[params])
  ctx = mock.Mock()
  ctx.config.data.prompts = "jsonl:prompts"
  measure = lambda: evaluate._measure(ctx, "ppo", ["x", "y"], "evaluate")
  np.testing.assert_array_equal(measure().kl, [2.0, 0.5])
  monkeypatch.setitem(kl.FORMS, "k2", lambda logprob, ref_logprob: (logprob - ref_logprob) ** 2 / 2)
  monkeypatch.setattr(kl, "FORM", "k2")
  np.testing.assert_array_equal(measure().kl, [2.0, 0.125])
