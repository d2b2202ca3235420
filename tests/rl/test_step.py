"""The parts of the PPO step: what it makes of a rollout (experience.py), and the gradient of eq. 2."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructjax import models
from instructjax.core.structs import PackedBatch, Rollout
from instructjax.rl import scoring, shared_rows
from instructjax.rl import step as ppo_step
from instructjax.rl.experience import Experience, from_rollout
from tests import tiny

VOCAB, EOS, ROWS, PROMPT, RESPONSE = 23, 0, 6, 3, 5
LENGTH = PROMPT + RESPONSE
RESPONSE_LENGTH_B = np.array([5, 1, 1, 5, 2, 1])
ENDS_B = np.array([True, True, True, False, True, True])  # row 3 is cut off by the limit
MASK_BR = np.arange(RESPONSE)[None] < RESPONSE_LENGTH_B[:, None]


@pytest.fixture(scope="module", autouse=True)
def _rows_of_two_widths():
  """Shared rows of 8 columns and of 4, as long episodes and short ones want."""
  with mock.patch.multiple(shared_rows, NARROWEST=4, NARROWING=2):
    yield


@pytest.fixture(scope="module")
def nets(tiny_config):
  policy, scalar = (tiny.make_model(tiny_config, VOCAB, head) for head in ("lm", "scalar"))
  tx = optax.sgd(1.0)
  return ppo_step.Nets(policy, scalar, tx, tx, eos_id=EOS, max_response_length=RESPONSE)


@pytest.fixture(scope="module")
def weights(nets, random_params):
  """Policy, value, reference and reward weights, all different."""
  return (
    random_params(nets.policy, 1),
    random_params(nets.scalar, 2),
    ppo_step.Frozen(random_params(nets.policy, 3), random_params(nets.scalar, 4)),
  )


def tokens_and_mask():
  rng = np.random.default_rng(0)
  is_prompt_BP = np.arange(PROMPT)[None] >= rng.integers(0, PROMPT, (ROWS, 1))
  is_token_BL = np.hstack([is_prompt_BP, MASK_BR])
  token_BL = rng.integers(1, VOCAB, (ROWS, LENGTH))
  for row in np.flatnonzero(ENDS_B):
    token_BL[row, PROMPT + RESPONSE_LENGTH_B[row] - 1] = EOS
  return np.where(is_token_BL, token_BL, VOCAB).astype(np.int32), is_token_BL


@pytest.fixture(scope="module")
def rollout():
  token_BL, is_token_BL = tokens_and_mask()
  logprob_BR = np.random.default_rng(1).uniform(-4, 0, MASK_BR.shape).astype(np.float32)
  return Rollout(
    token_BL=token_BL,
    is_token_BL=is_token_BL,
    is_response_BR=MASK_BR,
    behaviour_logprob_BR=np.where(MASK_BR, logprob_BR, 0),
    num_steps=np.int32(RESPONSE),
    slot_steps=np.int32(4 * ROWS),
  )


KL_COEF = 0.3
SCORE_CASES = {
  "plain": dict(whiten_advantages=False),
  "fixed": dict(whiten_advantages=False, missing_eos="fixed"),
  "exclude": dict(missing_eos="exclude"),
  "whitened rewards": dict(whiten_advantages=False, whiten_rewards=True),
  "rescore": dict(whiten_advantages=False, behaviour_logprob="rescore"),
  "packed": dict(whiten_advantages=False, packed_rows=2),
  "packed rescore": dict(whiten_advantages=False, behaviour_logprob="rescore", packed_rows=1),
}


@pytest.fixture(scope="module")
def scored(quick_jit, nets, weights, rollout, ppo_config):
  """name -> (Experience, metrics, reward-model scores, KL), and the log-probs behind them: one program."""

  def everything(params, value_params, frozen, rollout):
    args = rollout.token_BL, rollout.is_token_BL
    logprob = functools.partial(
      scoring.response_logprob, nets.policy, prompt_length=PROMPT, temperature=0.7
    )
    behind = dict(
      policy=logprob(params, *args),
      ref=logprob(frozen.ref_params, *args),
      score=scoring.sequence_score(nets.scalar, frozen.reward_params, *args),
      value=scoring.response_value(nets.scalar, value_params, *args, prompt_length=PROMPT),
    )
    results = {
      name: from_rollout(
        nets,
        dataclasses.replace(ppo_config, **changes),
        params,
        value_params,
        frozen,
        jnp.float32(KL_COEF),
        rollout,
      )
      for name, changes in SCORE_CASES.items()
    }
    return results, behind

  return jax.tree.map(np.asarray, quick_jit(everything)(*weights, rollout))


@pytest.mark.parametrize("name", ["plain", "rescore"])
def test_shared_rows_are_scored_as_padded_ones(scored, name):
  results = scored[0]
  packed = {"plain": "packed", "rescore": "packed rescore"}[name]
  (*got, got_metrics), (*want, want_metrics) = (
    (experience, *rest, {n: x for n, x in metrics.items() if n != "score_waste"})
    for experience, metrics, *rest in (results[packed], results[name])
  )
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6),
    (got, got_metrics),
    (want, want_metrics),
  )


def test_the_share_of_scored_cells_without_a_token(scored, rollout):
  results, num_tokens = scored[0], rollout.is_token_BL.sum()
  length_B = rollout.is_token_BL.sum(axis=1)
  assert sorted(length_B) == [3, 3, 4, 5, 6, 8]
  waste = {name: result[1]["score_waste"] for name, result in results.items()}
  np.testing.assert_allclose(waste["plain"], 1 - num_tokens / (ROWS * LENGTH), rtol=1e-6)
  # Rows of 8 with 8, with 6, with 5 and 3, then two of 4, which are a chunk, with 4 and with 3.
  np.testing.assert_allclose(waste["packed rescore"], 1 - num_tokens / (4 * LENGTH), rtol=1e-6)


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


def test_details_23_reward_is_the_kl_at_each_token_and_the_score_at_the_last(scored, rollout):
  results, behind = scored
  experience, metrics, score_B, kl_B = results["plain"]
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
  )
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_rescored_behaviour_is_the_policys_own(scored):
  results, behind = scored
  np.testing.assert_allclose(
    results["rescore"][0].behaviour_logprob_BR, behind["policy"], atol=1e-6
  )
  kl = np.where(MASK_BR, behind["policy"] - behind["ref"], 0).sum(1)
  np.testing.assert_allclose(results["rescore"][3], kl, atol=1e-5)


def test_details_22_an_answer_that_never_ends_may_score_a_fixed_number(scored, rollout):
  results, behind = scored
  experience, metrics, score_B, _ = results["fixed"]
  reward_BR = expected_reward(
    np.where(ENDS_B, behind["score"], -1.5), rollout.behaviour_logprob_BR, behind["ref"]
  )
  expected_BR = expected_advantage(reward_BR, behind["value"])
  np.testing.assert_allclose(experience.advantage_BR, expected_BR, atol=1e-5)
  np.testing.assert_array_equal(score_B, behind["score"])  # reported as the model gave it
  np.testing.assert_array_equal(experience.is_actor_BR, MASK_BR)
  assert np.any(experience.advantage_BR[3] != results["plain"][0].advantage_BR[3])


def test_or_be_left_out_of_the_actors_loss_and_whitening(scored):
  results, _ = scored
  experience = results["exclude"][0]
  actor_BR = MASK_BR & ENDS_B[:, None]
  np.testing.assert_array_equal(experience.is_actor_BR, actor_BR)
  np.testing.assert_array_equal(
    experience.is_response_BR, MASK_BR
  )  # the value net still learns from it
  raw_BR = results["plain"][0].advantage_BR
  raw = raw_BR[actor_BR]
  np.testing.assert_allclose(
    experience.advantage_BR[actor_BR], (raw - raw.mean()) / raw.std(), atol=1e-4
  )
  np.testing.assert_allclose(experience.return_BR, results["plain"][0].return_BR, atol=1e-5)


def test_details_25_whitened_rewards_keep_their_mean(scored, rollout):
  results, behind = scored
  reward_BR = expected_reward(behind["score"], rollout.behaviour_logprob_BR, behind["ref"])
  mean, std = reward_BR[MASK_BR].mean(), reward_BR[MASK_BR].std()
  reward_BR = np.where(MASK_BR, (reward_BR - mean) / std + mean, 0)
  np.testing.assert_allclose(
    results["whitened rewards"][0].advantage_BR,
    expected_advantage(reward_BR, behind["value"]),
    atol=1e-4,
  )


def pretraining_rows(num_rows):
  """Rows with weights of 0 among them, and unlike in number, so that mean and sum differ."""
  rng = np.random.default_rng(2)
  stop_B1 = rng.integers(3, LENGTH + 1, (num_rows, 1))
  column_BL = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (num_rows, LENGTH))
  is_token_BL = column_BL < stop_B1
  token_BL = np.where(is_token_BL, rng.integers(0, VOCAB, (num_rows, LENGTH)), VOCAB)
  weight_BL = (is_token_BL & (column_BL > 0)).astype(np.float32)
  return PackedBatch(token_BL.astype(np.int32), is_token_BL.astype(np.int32), column_BL, weight_BL)


def plain_logprob(nets, params, token_BL, is_token_BL, temperature):
  """log p of each token after the first, without our ops."""
  position_BL = jnp.cumsum(is_token_BL, axis=1) - is_token_BL
  logits_BTV = models.apply(
    nets.policy, params, token_BL, segment_BL=is_token_BL.astype(jnp.int32), position_BL=position_BL
  )[:, :-1]
  target_BT = jnp.where(is_token_BL, token_BL, 0)[:, 1:]
  logprob_BTV = jax.nn.log_softmax(logits_BTV / temperature)
  return jnp.take_along_axis(logprob_BTV, target_BT[..., None], axis=-1)[..., 0]


GAMMA, CLIP_NORM = 0.7, 0.05


@pytest.fixture(scope="module")
def gradients(quick_jit, nets, weights, ppo_config):
  """Gradients of eq. 2 as the step takes them, and jax.grad of its two terms written out anew."""
  token_BL, is_token_BL = tokens_and_mask()
  rng = np.random.default_rng(3)
  float_BR = lambda low, high: rng.uniform(low, high, MASK_BR.shape).astype(np.float32)
  batch = Experience(
    token_BL=token_BL,
    segment_BL=is_token_BL.astype(np.int32),
    is_response_BR=MASK_BR,
    is_actor_BR=MASK_BR & ENDS_B[:, None],
    behaviour_logprob_BR=float_BR(-4, -2),
    value_BR=float_BR(-1, 1),
    advantage_BR=float_BR(-2, 2),
    return_BR=float_BR(-2, 2),
  )
  rows = pretraining_rows(4 * ROWS)
  step = dataclasses.replace(ppo_config, gamma=GAMMA, ptx_rows=4, ptx_chunks=4)
  clipped = dataclasses.replace(step.policy_optim, clip_norm=CLIP_NORM)
  cases = {
    "ppo": (step, None),
    "mean": (step, rows),
    "one chunk": (dataclasses.replace(step, ptx_chunks=1), rows),
    "sum": (dataclasses.replace(step, ptx_reduction="sum"), rows),
    "gamma 0": (dataclasses.replace(step, gamma=0.0), rows),
    "clipped": (dataclasses.replace(step, policy_optim=clipped), rows),
    "packed by 1": (dataclasses.replace(step, packed_rows=1), None),
    "packed by 3": (dataclasses.replace(step, packed_rows=3), None),
  }

  def surrogate(params):
    logprob_BR = plain_logprob(nets, params, batch.token_BL, is_token_BL, 0.7)[:, PROMPT - 1 :]
    ratio_BR = jnp.exp(logprob_BR - batch.behaviour_logprob_BR)
    gain_BR = jnp.minimum(
      ratio_BR * batch.advantage_BR, jnp.clip(ratio_BR, 0.8, 1.2) * batch.advantage_BR
    )
    return -jnp.sum(jnp.where(batch.is_actor_BR, gain_BR, 0)) / batch.is_actor_BR.sum()

  def sum_nll(params):
    logprob_BT = plain_logprob(nets, params, rows.token_BL, rows.segment_BL > 0, 1.0)
    return -jnp.sum(jnp.where(rows.weight_BL[:, 1:] > 0, logprob_BT, 0))

  def everything(params):
    taken = {
      name: ppo_step.policy_gradient(params, nets, cfg, batch, ptx)
      for name, (cfg, ptx) in cases.items()
    }
    return taken, jax.grad(surrogate)(params), jax.value_and_grad(sum_nll)(params)

  taken, ppo_grads, (nll, lm_grads) = quick_jit(everything)(weights[0])
  return taken, ppo_grads, nll, lm_grads, rows.weight_BL.sum(), 4 * ROWS


def assert_trees_close(got, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance), got, expected
  )


def test_details_34_gradient_is_that_of_equation_2(gradients):
  taken, ppo_grads, nll, lm_grads, weight, _ = gradients
  assert_trees_close(taken["ppo"][0], ppo_grads)
  expected = jax.tree.map(lambda g, lm: g + GAMMA * lm / weight, ppo_grads, lm_grads)
  assert_trees_close(taken["mean"][0], expected)
  np.testing.assert_allclose(taken["mean"][1]["ptx_loss"], nll / weight, rtol=1e-5)
  size = lambda tree: float(optax.tree.norm(tree))
  assert size(ppo_grads) > 0.1 and GAMMA * size(lm_grads) / weight > 0.1  # neither term is idle
  np.testing.assert_allclose(
    taken["mean"][1]["ptx_grad_norm"], GAMMA * size(lm_grads) / weight, rtol=1e-4
  )


def test_sum_reduction_sums_over_tokens_and_averages_over_rows(gradients):
  taken, ppo_grads, nll, lm_grads, _, num_rows = gradients
  expected = jax.tree.map(lambda g, lm: g + GAMMA * lm / num_rows, ppo_grads, lm_grads)
  assert_trees_close(taken["sum"][0], expected)
  np.testing.assert_allclose(taken["sum"][1]["ptx_loss"], nll / num_rows, rtol=1e-5)


def test_accumulated_chunks_are_one_big_batch(gradients):
  taken = gradients[0]
  assert_trees_close(taken["mean"], taken["one chunk"], 1e-6)


@pytest.mark.parametrize("name, cells", [("packed by 1", 4 * LENGTH), ("packed by 3", 6 * LENGTH)])
def test_shared_rows_train_as_padded_ones(gradients, name, cells):
  """29 tokens: in three rows of 8 and two of 4, of which two or six fill a chunk."""
  (got, got_metrics), (want, metrics) = gradients[0][name], gradients[0]["ppo"]
  np.testing.assert_allclose(got_metrics["update_waste"], 1 - 29 / cells, rtol=1e-6)
  np.testing.assert_allclose(metrics["update_waste"], 1 - 29 / (ROWS * LENGTH), rtol=1e-6)
  assert_trees_close(got, want, 1e-6)
  for metric in metrics.keys() - {"update_waste"}:
    np.testing.assert_allclose(got_metrics[metric], metrics[metric], rtol=1e-5, err_msg=metric)


def test_the_value_loss_of_shared_rows_is_that_of_padded_ones(
  quick_jit, nets, weights, scored, ppo_config
):
  experience = scored[0]["plain"][0]
  shifted = dataclasses.replace(experience, value_BR=experience.value_BR + 0.3)  # clips some

  def both(value_params):
    return [
      ppo_step._loss_gradient(
        ppo_step.value_loss,
        value_params,
        nets,
        dataclasses.replace(ppo_config, packed_rows=rows),
        shifted,
        "is_response_BR",
      )
      for rows in (0, 2)
    ]

  padded, packed = quick_jit(both)(weights[1])
  assert padded[0][1]["clip_fraction"] > 0
  np.testing.assert_allclose(packed[0][0], padded[0][0], rtol=1e-6)
  assert_trees_close(packed[1], padded[1], 1e-6)
  np.testing.assert_allclose(
    packed[0][1]["clip_fraction"], padded[0][1]["clip_fraction"], rtol=1e-6
  )


def test_details_34_gamma_0_adds_nothing_to_any_bit(gradients):
  taken = gradients[0]
  jax.tree.map(np.testing.assert_array_equal, taken["gamma 0"][0], taken["ppo"][0])


def test_each_term_is_clipped_alone_before_gamma(gradients):
  taken, ppo_grads, _, lm_grads, weight, _ = gradients
  clip = lambda tree: jax.tree.map(lambda g: g * CLIP_NORM / optax.tree.norm(tree), tree)
  expected = jax.tree.map(lambda g, lm: g + GAMMA * lm, clip(ppo_grads), clip(lm_grads))
  assert_trees_close(taken["clipped"][0], expected)
  for name in ("policy_grad_norm", "ptx_grad_norm"):  # logged as they were
    np.testing.assert_allclose(taken["clipped"][1][name], taken["mean"][1][name], rtol=1e-5)


def test_details_29_each_epoch_visits_every_episode_once_in_a_new_order(
  nets, ppo_config, monkeypatch
):
  """And beside each minibatch stand the pretraining rows that are its share, all of them used."""
  cfg = dataclasses.replace(ppo_config, num_epochs=3, num_minibatches=2, gamma=1.0)
  visits, weights = [], {"w": jnp.zeros(())}

  def policy_gradient(params, nets, cfg, batch, ptx):
    visits.append((batch.token_BL[:, 0].tolist(), ptx.token_BL[:, 0].tolist()))
    return params, {"ratio_max": jnp.float32(1)}

  monkeypatch.setattr(ppo_step, "policy_gradient", policy_gradient)
  monkeypatch.setattr(
    ppo_step, "value_loss", lambda params, *_: (params["w"], {"clip_fraction": 0.0})
  )
  episode_B1 = jnp.arange(8)[:, None]
  experience = Experience(*[episode_B1] * len(dataclasses.fields(Experience)))
  ptx = PackedBatch(*[jnp.arange(16)[:, None]] * 4)
  opt_state = nets.policy_tx.init(weights)
  with jax.disable_jit():  # the scan over updates is then a Python loop, which shows its rows
    ppo_step._update(
      nets, cfg, (weights, opt_state, weights, opt_state), experience, ptx, jax.random.key(0)
    )
  epochs = [sum((rows for rows, _ in visits[i : i + 2]), []) for i in (0, 2, 4)]
  assert len(visits) == 6 and all(sorted(epoch) == list(range(8)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert [rows for _, rows in visits] == [list(range(8)), list(range(8, 16))] * 3
