"""Tests of instructjax.stages.sampled_best: best-of-n against a count of all subsets, and at a policy's KL."""

import itertools
import types

import numpy as np
import pytest

from instructjax.core.stages import REFERENCE
from instructjax.stages import answers, policies, sampled_best
from instructjax.stages.sampled_best import Pool


@pytest.mark.parametrize("has_ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(has_ties):
  rng = np.random.default_rng(0)
  gold_PN, reward_PN = rng.normal(size=(2, 3, 6))
  if has_ties:
    reward_PN = np.round(reward_PN)
  counts = [1, 2, 3, 5, 6]
  found = sampled_best.curve(Pool(reward_PN, gold_PN), counts)
  for n, row in zip(counts, found, strict=True):
    gold, reward = [], []
    for p, subset in itertools.product(range(3), itertools.combinations(range(6), n)):
      best = max(subset, key=lambda i: (reward_PN[p, i], i))  # equal rewards: the later sample
      gold.append(gold_PN[p, best])
      reward.append(reward_PN[p, best])
    assert row.n == n
    np.testing.assert_allclose([row.gold, row.reward], [np.mean(gold), np.mean(reward)])
  # On own data there is no gold score, and the reward model's is the same.
  alone = sampled_best.curve(Pool(reward_PN, None), counts)
  assert [(row.gold, row.reward) for row in alone] == [(None, row.reward) for row in found]


def test_best_of_n_kl_is_the_closed_form():
  # log n - (n - 1) / n: 0, log 2 - 1/2, log 4 - 3/4.
  rows = sampled_best.curve(Pool(np.zeros((1, 4)), None), [1, 2, 4])
  np.testing.assert_allclose([row.kl for row in rows], [0, 0.193147, 0.636294], atol=1e-6)


def test_best_of_n_chooses_by_reward_among_answers_of_the_reference(monkeypatch):
  """Two prompts with five answers each; n is 1, 2, 4. Gold and reward disagree."""
  ctx = types.SimpleNamespace(
    model=lambda role: role,
  )

  def sample(ctx, name, prompts, stage):
    assert (name, stage) == (REFERENCE, "evaluate/best_of_n")
    assert prompts == ["p"] * 5 + ["q"] * 5
    return types.SimpleNamespace(text=[f"{n}" for n in range(10)], ended_N="ended")

  def score(ctx, model, params, found):
    assert (model, params) == ("reward", "reward model")
    assert found == (["p"] * 5 + ["q"] * 5, [f"{n}" for n in range(10)], "ended")
    return -np.arange(10.0)

  gold = lambda prompts, texts: [float(text) for text in texts]
  monkeypatch.setattr(answers, "from_text", lambda ctx, *rest: rest)
  monkeypatch.setattr(answers, "score", score)
  monkeypatch.setattr(policies, "load_reward", lambda ctx: "reward model")
  draw = lambda name, prompts: sample(ctx, name, prompts, "evaluate/best_of_n")
  pool = sampled_best.draw(ctx, ["p", "q"], 5, draw, types.SimpleNamespace(gold_score=gold))
  rows = sampled_best.curve(pool, sampled_best.powers_of_two(5))
  assert [row.n for row in rows] == [1, 2, 4]
  # Of all five the mean is 2 and 7. The best of 4 is the first, unless it is the one left out: .8 * 0 + .2 * 1.
  np.testing.assert_allclose([row.gold for row in rows], [4.5, 2.5 + 1.0, 2.5 + 0.2], rtol=1e-6)
  np.testing.assert_allclose([row.reward for row in rows], [-4.5, -3.5, -2.7], rtol=1e-6)


@pytest.mark.parametrize(
  ("kl", "n"),
  # KL of n = 1, 2, 3, 4: 0, .193, log 3 - 2/3 = .432, .636.
  [(0.0, 1), (0.09, 1), (0.1, 2), (0.31, 2), (0.32, 3), (0.6, 4), (9.0, 4)],
)
def test_the_n_whose_kl_is_nearest(kl, n):
  assert sampled_best.count_at(kl, 4) == n


def test_a_policy_beside_best_of_n_at_its_kl():
  """Two prompts, three samples, n = 2: all pairs by hand."""
  reward_PN = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
  gold_PN = np.array([[5.0, 1.0, 3.0], [4.0, 2.0, 6.0]])
  # Best of each pair by reward has gold 1, 3, 3 and 4, 4, 2.
  judged_PS = np.array([[2.0, 3.0], [4.0, 1.0]])
  found = sampled_best.at_kl(Pool(reward_PN, gold_PN), 0.2, judged_PS)
  assert (found.n, found.reaches) == (2, True)
  assert found.gold == pytest.approx((7 / 3 + 10 / 3) / 2)
  # 2 beats 1 alone: 1/3; 3 beats 1 and ties twice: 2/3. 4 ties twice and beats 2: 2/3; 1 beats none.
  np.testing.assert_allclose(found.wins_P, [(1 / 3 + 2 / 3) / 2, (2 / 3 + 0) / 2])
  far = sampled_best.at_kl(Pool(reward_PN, gold_PN), 3.0, judged_PS)
  assert (far.n, far.reaches) == (3, False)
  by_reward = sampled_best.at_kl(Pool(reward_PN, None), 0.2, judged_PS)
  assert by_reward.gold is None
  # The best of each pair has reward 1, 2, 2. 2 beats 1 and ties twice: 2/3; 3 beats all.
  assert by_reward.wins_P[0] == pytest.approx((2 / 3 + 1) / 2)
