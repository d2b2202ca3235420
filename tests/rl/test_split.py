"""The step in several programs gives what the one program gives, and calls the host in between."""

import dataclasses

import jax
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.core.structs import PromptBatch
from instructjax.parallel import sharding
from instructjax.rl import split
from instructjax.rl import step as ppo_step
from instructjax.stages import rl_nets
from instructjax.train import profiling
from instructjax.train.optim import make_optimizer
from tests import tiny

VOCAB, EOS, PROMPT, RESPONSE = 23, 0, 3, 6


@pytest.fixture(scope="module")
def runs(quick_jit, tiny_config, adam_config, ppo_config, random_params):
  """Three iterations by either step: (one program, split), each with state, history and what the host was given."""
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  policy, scalar = (tiny.make_model(tiny_config, VOCAB, head) for head in ("lm", "scalar"))
  tx = make_optimizer(adam_config, 100)
  nets = ppo_step.Nets(policy, scalar, tx, tx, stop_ids=(EOS,), max_response_length=RESPONSE)
  weights = random_params(policy, 1), random_params(scalar, 2)
  given = []

  def on_host(rollout, iteration):
    length_B = np.asarray(rollout.is_response_BR).sum(axis=1)
    given.append((iteration, length_B))
    return {"brevity": -np.maximum(length_B - 5, 0).astype(np.float32)}

  def run(rewards):
    cfg = dataclasses.replace(
      ppo_config, ptx_rows=1, ptx_microbatches=1, rewards=rewards, num_epochs=1
    )
    state, shardings = rl_nets.initial_state(mesh, cfg, nets, *weights, jax.random.key(0))
    is_split = "python" in rewards[1]
    if is_split:
      step = split.make_split_step(nets, cfg, shardings, on_host)
    else:
      step = ppo_step.make_train_step(nets, cfg, shardings)
    token_BP = np.random.default_rng(0).integers(1, VOCAB, (cfg.batch_size, PROMPT))
    index_B = np.arange(cfg.batch_size, dtype=np.int32)
    batch = PromptBatch(token_BP.astype(np.int32), np.ones(token_BP.shape, bool), index_B)
    frozen = jax.device_put(ppo_step.Frozen(*weights), sharding.replicated(mesh))
    arguments = frozen, sharding.place_batch(mesh, {"prompts": batch})
    text = ""
    if is_split:  # compiled ahead: the text can be read
      compiled = step.lower(state, *arguments).compile()
      text = compiled.as_text()
      step = dataclasses.replace(step, **dict(zip(("sample", "read", "learn"), compiled.programs)))
    history = []
    for _ in range(3):
      before = state
      state, metrics, samples = step(state, *arguments)
      # The state's memory is used again, and what is frozen stays.
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
      assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments))
      history.append(jax.tree.map(np.asarray, (metrics, samples)))
    return jax.tree.map(np.asarray, state.params), history, text

  with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "jit", quick_jit)
    one = run(("rm", "0.5*length:-5"))
    two = run(("rm", "0.5*python:checks:brevity"))
  return one, two, given


def test_the_split_step_gives_the_numbers_of_the_one_program(runs):
  (params, history, _), (split_params, split_history, _), _ = runs
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  for (metrics, samples), (split_metrics, split_samples) in zip(history, split_history):
    np.testing.assert_array_equal(samples.rollout.token_BL, split_samples.rollout.token_BL)
    np.testing.assert_array_equal(samples.rewards["length"], split_samples.rewards["brevity"])
    for name, value in metrics.items():
      close(value, split_metrics[name.replace("/length", "/brevity")])
  jax.tree.map(close, params, split_params)


def test_the_sum_is_what_is_learned_from(runs):
  (_, history, _), _, _ = runs
  metrics, samples = history[0]
  length_B = samples.rollout.is_response_BR.sum(axis=1)
  rule_B = -np.maximum(length_B - 5.0, 0)
  assert 0 < np.count_nonzero(rule_B) < len(rule_B)
  np.testing.assert_array_equal(samples.rewards["length"], rule_B)
  total_B = samples.score_B + 0.5 * rule_B
  expected = {
    "reward": samples.score_B.mean(),  # which stays that of the reward model
    "rewards/rm": samples.score_B.mean(),
    "rewards/rm/std": samples.score_B.std(),
    "rewards/length": rule_B.mean(),
    "rewards/length/std": rule_B.std(),
    "rewards/total": total_B.mean(),
    "rewards/total/std": total_B.std(),
    "objective": np.mean(total_B - metrics["kl_coef"] * samples.kl_B),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_host_is_given_each_rollout_with_its_iteration(runs):
  _, (_, history, _), given = runs
  assert [iteration for iteration, _ in given] == [1, 2, 3]
  for (_, length_B), (_, samples) in zip(given, history):
    np.testing.assert_array_equal(length_B, samples.rollout.is_response_BR.sum(axis=1))


def test_every_phase_of_a_profile_is_in_one_of_the_programs(runs):
  text = runs[1][2]
  assert text.count("HloModule ") == 3
  phases = {*profiling.operation_phases(text).values()}
  absent = {"gradient", "optimizer", "update/ptx"}  # of other stages, and of PPO-ptx
  assert phases >= {*profiling.PHASES} - absent
