"""Tests of instructjax.evaluate's arithmetic."""

import itertools
import types
from unittest import mock

import numpy as np
import pytest

from instructjax.core.stages import REFERENCE
from instructjax.ops import kl
from instructjax.stages import answers, evaluate, policies
from tests import micro


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


def test_prompts_are_the_first_of_the_test_split_that_fit():
  prompts = [types.SimpleNamespace(prompt=text) for text in ("x" * 37, "x" * 36, "a", "b")]
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, evaluate__num_prompts=2),
    tokenizer=types.SimpleNamespace(encode=list, bos_id=None),
    data=types.SimpleNamespace(
      records=lambda kind, split: {("prompts", "test"): prompts}[kind, split]
    ),
  )
  assert evaluate.test_prompts(ctx) == ["x" * 36, "a"]


def test_best_of_n_chooses_by_reward_among_answers_of_the_reference(monkeypatch):
  """Two prompts with five answers each; n is 1, 2, 4. Gold and reward disagree."""
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, evaluate__best_of_n=5, data__prompts="demo:"),
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
  monkeypatch.setattr(evaluate, "_sample", sample)
  monkeypatch.setattr(answers, "from_text", lambda ctx, *rest: rest)
  monkeypatch.setattr(answers, "score", score)
  monkeypatch.setattr(policies, "load_reward", lambda ctx: "reward model")
  monkeypatch.setattr(
    evaluate.judging, "simulation", lambda ctx: types.SimpleNamespace(gold_score=gold)
  )
  rows = evaluate._best_of_n(ctx, ["p", "q"], "evaluate")
  assert [row.n for row in rows] == [1, 2, 4]
  # Of all five the mean is 2 and 7. The best of 4 is the first, unless it is the one left out: .8 * 0 + .2 * 1.
  np.testing.assert_allclose([row.gold for row in rows], [4.5, 2.5 + 1.0, 2.5 + 0.2], rtol=1e-6)
  np.testing.assert_allclose([row.reward for row in rows], [-4.5, -3.5, -2.7], rtol=1e-6)
  off = types.SimpleNamespace(config=micro.config("ppo", {}, evaluate__best_of_n=1))
  assert evaluate._best_of_n(off, ["p"], "evaluate") == []


@pytest.mark.parametrize(("name", "cut"), [("ppo", False), ("base", True), ("reward_base", True)])
def test_answers_of_untuned_policies_end_at_a_newline(monkeypatch, name, cut):
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, evaluate__temperature=0.5),
    tokenizer=types.SimpleNamespace(encode=list, bos_id=None),
    model=lambda role: f"{role} model",
    key=lambda name: f"key of {name}",
  )
  monkeypatch.setattr(policies, "load", lambda ctx, name: f"weights of {name}")
  monkeypatch.setattr(answers, "sample", lambda ctx, *a, **k: (a, k))
  arguments, kwargs = evaluate._sample(ctx, name, ["ab"], "evaluate")
  role = {"reward_base": "reward_base"}.get(name, "policy")
  expected = f"{role} model", f"weights of {name}", [["a", "b"]], f"key of evaluate/{name}"
  assert arguments == expected
  assert kwargs == dict(temperature=0.5, prompt_length=36, to_newline=cut)


def test_there_are_no_examples_for_a_larger_base_that_there_is_not():
  """Where policy and reward model are given, no base is judged, with examples or without."""
  judged = lambda **changes: evaluate.judged_policies(
    types.SimpleNamespace(config=micro.config("ppo_ptx", {"prompts": "demo:"}, **changes))
  )
  assert judged() == ["base", "few_shot", "sft", "ppo_init", "ppo_ptx"]
  assert judged(model__weights="a")[:2] == ["base", "few_shot"]
  given = dict(sft__weights="a", ppo_init__weights="b", rm__weights="c")
  assert judged(**given) == ["sft", "ppo_init", "ppo_ptx"]
  assert judged(rm__weights="c", reward_model__d_mlp=48) == ["base", "sft", "ppo_init", "ppo_ptx"]


@pytest.mark.parametrize("names", [["base", "few_shot", "sft"], ["base", "sft"]])
def test_room_for_worked_examples_is_checked_if_they_are_judged(monkeypatch, names):
  checked = []
  monkeypatch.setattr(evaluate, "judged_policies", lambda ctx: names)
  monkeypatch.setattr(evaluate, "test_prompts", lambda ctx: "prompts")
  monkeypatch.setattr(evaluate, "few_shot_prompts", lambda ctx, prompts: checked.append(prompts))
  evaluate.check("ctx", "evaluate")
  assert checked == (["prompts"] if "few_shot" in names else [])
