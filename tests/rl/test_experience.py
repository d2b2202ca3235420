"""What PPO's updates learn from, made of a rollout: rewards, advantages, returns and what is told of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.ops import kl as kl_ops
from instructjax.rl import rows, scoring
from instructjax.rl import step as ppo_step
from instructjax.rl.experience import from_rollout
from tests.rl import episodes
from tests.rl.episodes import ENDS_B, MASK_BR, PROMPT, RESPONSE, RESPONSE_LENGTH_B, ROWS


@pytest.fixture(scope="module")
def rollout():
  return episodes.make_rollout()


KL_COEF = 0.3
SCORE_CASES = {
  "plain": dict(whiten_advantages=False),
  "fixed": dict(whiten_advantages=False, missing_eos="fixed"),
  "exclude": dict(missing_eos="exclude"),
  "whitened rewards": dict(whiten_advantages=False, whiten_rewards=True),
  "rescore": dict(whiten_advantages=False, behaviour_logprob="rescore"),
  "rloo": dict(
    whiten_advantages=False, advantage="rloo", samples_per_prompt=2, missing_eos="fixed"
  ),
  "grpo": dict(whiten_advantages=False, advantage="grpo", samples_per_prompt=3),
  "list": dict(
    whiten_advantages=False,
    missing_eos="fixed",
    rewards=("0.5*rm", "-2*length:2-4", "ensemble:uncertainty"),
    ensemble=("a", "b"),
    ensemble_penalty=0.25,
  ),
}


@pytest.fixture(scope="module")
def scored(quick_jit, nets, weights, rollout, ppo_config, random_params):
  """name -> Scored, and the log-probs behind them: one program."""

  members = [random_params(nets.scalar, seed) for seed in (5, 6)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

  def everything(params, value_params, frozen, rollout):
    state = ppo_step.create_state(params, value_params, nets, ppo_config, jax.random.key(0))
    state = dataclasses.replace(state, kl_coef=jnp.float32(KL_COEF))
    args = rollout.token_BL, rollout.is_token_BL
    logprob = functools.partial(
      scoring.response_logprob, nets.policy, prompt_length=PROMPT, temperature=0.7
    )
    behind = dict(
      policy=logprob(params, *args),
      ref=logprob(frozen.ref_params, *args),
      score=scoring.sequence_score(nets.scalar, frozen.reward_params, *args),
      members=[scoring.sequence_score(nets.scalar, member, *args) for member in members],
      value=scoring.response_value(nets.scalar, value_params, *args, prompt_length=PROMPT),
    )
    results = {
      name: from_rollout(
        nets,
        dataclasses.replace(ppo_config, **changes),
        rows.padded(),
        state,
        dataclasses.replace(frozen, ensemble_params=stacked if "ensemble" in changes else None),
        rollout,
      )
      for name, changes in SCORE_CASES.items()
    }
    return results, behind

  return jax.tree.map(np.asarray, quick_jit(everything)(*weights, rollout))


def expected_reward(score_B, behaviour_BR, ref_BR):
  reward_BR = -KL_COEF * (behaviour_BR - ref_BR)
  for row, length in enumerate(RESPONSE_LENGTH_B):
    reward_BR[row, length - 1] += score_B[row]
    reward_BR[row, length:] = 0
  return reward_BR


def expected_advantage(reward_BR, value_BR, lam=0.95):
  advantage_BR = np.zeros(reward_BR.shape)
  for row, length in enumerate(RESPONSE_LENGTH_B):
    following = 0.0
    for step in reversed(range(length)):
      next_value = value_BR[row, step + 1] if step + 1 < length else 0.0
      following = reward_BR[row, step] + next_value - value_BR[row, step] + lam * following
      advantage_BR[row, step] = following
  return advantage_BR


def test_rloo_compares_with_the_other_answers_the_kl_in_the_reward(scored):
  """Rows 0 and 1 answer one prompt, 2 and 3 the next: each answer's baseline is the other one."""
  results, behind = scored
  experience = results["rloo"].experience
  # An answer that never ends has the fixed score, as with a value network.
  reward_B = np.where(ENDS_B, behind["score"], -1.5) - KL_COEF * results["rloo"].kl_B
  expected_B = reward_B - reward_B.reshape(3, 2)[:, ::-1].reshape(-1)
  np.testing.assert_allclose(experience.advantage_BR, expected_B[:, None] * MASK_BR, atol=1e-5)
  assert experience.value_BR is experience.return_BR is experience.ref_logprob_BR is None
  assert "explained_variance" not in results["rloo"].metrics
  assert results["rloo"].metrics["objective"] == results["fixed"].metrics["objective"]


def test_grpo_normalises_scores_by_group_and_keeps_the_reference_for_the_loss(scored):
  results, behind = scored
  experience = results["grpo"].experience
  score_NK = behind["score"].reshape(2, 3)
  expected_B = (
    (score_NK - score_NK.mean(1, keepdims=True)) / score_NK.std(1, keepdims=True)
  ).ravel()
  np.testing.assert_allclose(experience.advantage_BR, expected_B[:, None] * MASK_BR, atol=1e-4)
  np.testing.assert_array_equal(experience.ref_logprob_BR, behind["ref"])
  assert experience.value_BR is experience.return_BR is None
  assert results["plain"].experience.ref_logprob_BR is None


def test_details_23_reward_is_the_kl_at_each_token_and_the_score_at_the_last(scored, rollout):
  results, behind = scored
  experience, metrics = results["plain"].experience, results["plain"].metrics
  score_B, kl_B = results["plain"].score_B, results["plain"].kl_B
  np.testing.assert_array_equal(score_B, behind["score"])
  behaviour_BR = rollout.behaviour_logprob_BR
  np.testing.assert_array_equal(experience.behaviour_logprob_BR, behaviour_BR)
  reward_BR = expected_reward(score_B, behaviour_BR, behind["ref"])
  advantage_BR = expected_advantage(reward_BR, behind["value"])
  np.testing.assert_allclose(experience.advantage_BR, advantage_BR, atol=1e-5)
  value_BR = np.where(MASK_BR, behind["value"], 0)
  np.testing.assert_allclose(experience.return_BR, advantage_BR + value_BR, atol=1e-5)
  np.testing.assert_array_equal(experience.value_BR, value_BR)
  kl = np.where(MASK_BR, behaviour_BR - behind["ref"], 0).sum(1)
  np.testing.assert_allclose(kl_B, kl, atol=1e-5)
  expected = dict(
    kl=kl.mean(),
    reward=score_B.mean(),
    objective=np.mean(score_B - KL_COEF * kl),
    eos=5 / 6,
    response_length=RESPONSE_LENGTH_B.mean(),
    entropy=-behaviour_BR.sum() / ROWS,
    slot_waste=1 - 15 / 24,  # 5 + 1 + 1 + 5 + 2 + 1 tokens
    kl_coef=KL_COEF,
    tokens=15,
    prompt_length=rollout.is_token_BL[:, :PROMPT].sum() / ROWS,
    decode_steps=RESPONSE,
    score_waste=1 - 29 / 48,  # 8 + 3 + 3 + 6 + 5 + 4 tokens in six rows of 8
    reward_std=score_B.std(),
  )
  ratio_BR = np.exp(behind["ref"] - behaviour_BR)
  expected["kl_k3"] = np.where(MASK_BR, ratio_BR - 1 - np.log(ratio_BR), 0).sum(1).mean()
  error_BR = (value_BR - experience.return_BR)[MASK_BR]
  expected["explained_variance"] = 1 - np.mean(error_BR**2) / experience.return_BR[MASK_BR].var()
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_rescored_behaviour_is_the_policys_own(scored):
  results, behind = scored
  np.testing.assert_allclose(
    results["rescore"].experience.behaviour_logprob_BR, behind["policy"], atol=1e-6
  )
  kl = np.where(MASK_BR, behind["policy"] - behind["ref"], 0).sum(1)
  np.testing.assert_allclose(results["rescore"].kl_B, kl, atol=1e-5)


def test_a_reward_model_whose_pad_is_the_eos_is_read_before_it(nets, ppo_config, rollout):
  """As transformers reads it. Columns are numbered in place of scores; the responses begin in column 3."""
  rollout = jax.tree.map(jnp.asarray, rollout)
  zero_BR, column_L = jnp.zeros(MASK_BR.shape), jnp.arange(episodes.LENGTH, dtype=jnp.float32)
  said = {"ref_logprob_BR": zero_BR, "value_BR": zero_BR}
  said["score_BL"] = jnp.broadcast_to(column_L, rollout.token_BL.shape)
  fake = rows.RowLayout(score=lambda read, rollout: (said, 1), gradient=None)
  state = ppo_step.create_state({}, {}, nets, ppo_config, jax.random.key(0))

  def columns(**changes):
    changed = dataclasses.replace(nets, **changes)
    return from_rollout(changed, ppo_config, fake, state, None, rollout).score_B.tolist()

  # The answers' last columns; all but those of row 3, cut off, and row 4, which ends in another token, hold the EOS.
  assert columns() == [7, 3, 3, 7, 4, 3]
  assert columns(score_skips=episodes.EOS) == [6, 2, 2, 7, 4, 2]


def test_details_22_an_answer_that_never_ends_may_score_a_fixed_number(scored, rollout):
  results, behind = scored
  experience, score_B = results["fixed"].experience, results["fixed"].score_B
  reward_BR = expected_reward(
    np.where(ENDS_B, behind["score"], -1.5), rollout.behaviour_logprob_BR, behind["ref"]
  )
  expected_BR = expected_advantage(reward_BR, behind["value"])
  np.testing.assert_allclose(experience.advantage_BR, expected_BR, atol=1e-5)
  np.testing.assert_array_equal(score_B, behind["score"])  # reported as the model gave it
  metrics, kl_B = results["fixed"].metrics, results["fixed"].kl_B
  np.testing.assert_allclose(metrics["reward"], behind["score"].mean(), rtol=1e-5)
  objective = np.mean(np.where(ENDS_B, behind["score"], -1.5) - KL_COEF * kl_B)  # what PPO raises
  np.testing.assert_allclose(metrics["objective"], objective, rtol=1e-5)
  np.testing.assert_array_equal(experience.is_actor_BR, MASK_BR)
  assert np.any(experience.advantage_BR[3] != results["plain"].experience.advantage_BR[3])


def test_a_list_of_rewards_is_summed_and_the_fixed_score_takes_the_place_of_the_sum(
  scored, rollout
):
  results, behind = scored
  found, score_MB = results["list"], np.stack([behind["score"], *behind["members"]])
  rule_B = -np.maximum(2 - RESPONSE_LENGTH_B, 0) - np.maximum(RESPONSE_LENGTH_B - 4, 0)
  ensemble_B = score_MB.mean(axis=0) - 0.25 * score_MB.var(axis=0)
  assert found.rewards.keys() == {"length", "ensemble"}
  np.testing.assert_array_equal(found.rewards["length"], rule_B)
  np.testing.assert_allclose(found.rewards["ensemble"], ensemble_B, rtol=1e-5)
  total_B = 0.5 * behind["score"] - 2 * rule_B + ensemble_B
  reward_BR = expected_reward(
    np.where(ENDS_B, total_B, -1.5), rollout.behaviour_logprob_BR, behind["ref"]
  )
  expected_BR = expected_advantage(reward_BR, behind["value"])
  np.testing.assert_allclose(found.experience.advantage_BR, expected_BR, atol=1e-5)
  parts = {"rm": behind["score"], "length": rule_B, "ensemble": ensemble_B, "total": total_B}
  for name, value_B in parts.items():
    np.testing.assert_allclose(found.metrics[f"rewards/{name}"], value_B.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.metrics[f"rewards/{name}/std"], value_B.std(), rtol=1e-4)
  np.testing.assert_allclose(found.metrics["reward"], behind["score"].mean(), rtol=1e-5)
  np.testing.assert_allclose(found.metrics["ensemble_std"], score_MB.std(axis=0).mean(), rtol=1e-5)


def test_or_be_left_out_of_the_actors_loss_and_whitening(scored):
  results, _ = scored
  experience = results["exclude"].experience
  actor_BR = MASK_BR & ENDS_B[:, None]
  np.testing.assert_array_equal(experience.is_actor_BR, actor_BR)
  np.testing.assert_array_equal(
    experience.is_response_BR, MASK_BR
  )  # the value net still learns from it
  raw_BR = results["plain"].experience.advantage_BR
  raw = raw_BR[actor_BR]
  np.testing.assert_allclose(
    experience.advantage_BR[actor_BR], (raw - raw.mean()) / raw.std(), atol=1e-4
  )
  np.testing.assert_allclose(experience.return_BR, results["plain"].experience.return_BR, atol=1e-5)


def test_details_25_whitened_rewards_keep_their_mean(scored, rollout):
  results, behind = scored
  reward_BR = expected_reward(behind["score"], rollout.behaviour_logprob_BR, behind["ref"])
  mean, std = reward_BR[MASK_BR].mean(), reward_BR[MASK_BR].std()
  reward_BR = np.where(MASK_BR, (reward_BR - mean) / std + mean, 0)
  np.testing.assert_allclose(
    results["whitened rewards"].experience.advantage_BR,
    expected_advantage(reward_BR, behind["value"]),
    atol=1e-4,
  )


def test_a_new_form_of_the_kl_is_taken_from_the_table(
  nets, weights, rollout, ppo_config, monkeypatch
):
  """The reward follows FORM, and all other forms are logged, so a form needs no change outside ops/kl.py."""

  def shapes_and_kl():
    def score(params, value_params, frozen, rollout):
      state = ppo_step.create_state(params, value_params, nets, ppo_config, jax.random.key(0))
      return from_rollout(nets, ppo_config, rows.padded(), state, frozen, rollout)

    return jax.eval_shape(score, *weights, rollout)

  asked = []
  k2 = lambda logprob, ref_logprob: asked.append("k2") or (logprob - ref_logprob) ** 2 / 2
  monkeypatch.setitem(kl_ops.FORMS, "k2", k2)
  assert {"kl", "kl_k2", "kl_k3"} <= set(shapes_and_kl().metrics) and asked == ["k2"]
  monkeypatch.setattr(kl_ops, "FORM", "k2")
  names = set(shapes_and_kl().metrics)
  assert {"kl", "kl_k1", "kl_k3"} <= names and "kl_k2" not in names and asked == ["k2"] * 2
