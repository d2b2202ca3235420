"""The PPO iteration as one program: what is in it, what it changes, that it learns, and on any mesh."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.core.structs import PackedBatch, PromptBatch
from instructjax.parallel import sharding
from instructjax.rl import step as ppo_step
from instructjax.stages import rl_nets
from instructjax.train import profiling
from instructjax.train.optim import make_optimizer
from tests import tiny

VOCAB, EOS, GOOD, PROMPT, RESPONSE, DOCUMENT = 23, 0, 7, 3, 6, 8
HOST = re.compile(
  r"custom.call|callback|infeed|outfeed|\b(stablehlo\.)?(send|recv)\b|annotate_device"
)


@pytest.fixture(scope="module")
def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


@pytest.fixture(autouse=True)
def _on_one_device(one_device):
  with jax.set_mesh(one_device):  # as the pipeline does; a test may set another mesh inside
    yield


@pytest.fixture(scope="module")
def configs(ppo_config):
  """Plain PPO on the rollout's own log-probs, and PPO-ptx with everything else switched on."""
  ptx = dict(gamma=0.5, behaviour_logprob="rescore", kl_controller="adaptive", missing_eos="fixed")
  return {
    "ppo": dataclasses.replace(ppo_config, ptx_rows=1, ptx_microbatches=1),
    "ppo_ptx": dataclasses.replace(ppo_config, **ptx),
    "packed": dataclasses.replace(ppo_config, ptx_rows=1, packed_rows=4),
    "no_average": dataclasses.replace(ppo_config, ptx_rows=1, ema_decay=0.0),
  }


@pytest.fixture(scope="module")
def nets(tiny_config, adam_config):
  policy, scalar = (tiny.make_model(tiny_config, VOCAB, head) for head in ("lm", "scalar"))
  tx = make_optimizer(adam_config, 100)
  return ppo_step.Nets(policy, scalar, tx, tx, stop_ids=(EOS,), max_response_length=RESPONSE)


@pytest.fixture(scope="module")
def frozen_weights(nets, random_params):
  return ppo_step.Frozen(random_params(nets.policy, 1), random_params(nets.scalar, 2))


def make_batch(cfg, mesh, seed=0):
  rng = np.random.default_rng(seed)
  is_prompt_BP = np.arange(PROMPT)[None] >= rng.integers(0, PROMPT, (cfg.batch_size, 1))
  token_BP = np.where(is_prompt_BP, rng.integers(1, VOCAB, is_prompt_BP.shape), VOCAB)
  index_B = np.arange(cfg.batch_size, dtype=np.int32)
  batch = {"prompts": PromptBatch(token_BP.astype(np.int32), is_prompt_BP, index_B)}
  if cfg.gamma:
    shape = (cfg.batch_size * cfg.ptx_rows, DOCUMENT)
    column_BL = np.broadcast_to(np.arange(DOCUMENT, dtype=np.int32), shape)
    token_BL = rng.integers(0, VOCAB, shape).astype(np.int32)
    weight_BL = (column_BL > 0).astype(np.float32)
    batch["pretrain"] = PackedBatch(token_BL, np.ones(shape, np.int32), column_BL, weight_BL)
  return sharding.place_batch(mesh, batch)


@pytest.fixture(scope="module")
def start(quick_jit, configs, nets, frozen_weights, one_device):
  """start(name, mesh, seed, frozen) -> (step, state, frozen), built as the stage builds them."""
  states, layouts, steps = {}, {}, {}

  def place(mesh, model, tree):
    axes, shapes = models.param_axes(model), models.param_shapes(model)
    return jax.device_put(tree, sharding.param_shardings(mesh, axes, shapes))

  def one(name, mesh=one_device, seed=0, frozen=frozen_weights):
    cfg, reward_id = configs[name], id(frozen)
    frozen = ppo_step.Frozen(
      place(mesh, nets.policy, frozen.ref_params), place(mesh, nets.scalar, frozen.reward_params)
    )
    weights = frozen.ref_params, frozen.reward_params
    at, which = (name, mesh), (name, mesh, seed, reward_id)
    with jax.set_mesh(mesh), mock.patch.object(jax, "jit", quick_jit):
      if which not in states:
        key = jax.random.key(seed)
        states[which], layouts[at] = rl_nets.initial_state(mesh, cfg, nets, *weights, key)
      state = states.pop(which) if mesh != one_device else jax.tree.map(jnp.copy, states[which])
      if at not in steps:
        steps[at] = ppo_step.make_train_step(nets, cfg, layouts[at])
        if at == ("ppo_ptx", one_device):  # compiled ahead: its text can be read
          steps[at] = steps[at].lower(state, frozen, make_batch(cfg, mesh)).compile()
    return steps[at], state, frozen

  return one


def run(start, configs, name, mesh, *, iterations, seed=0):
  """(step, final state, metrics and samples of each iteration as NumPy) over the same prompts."""
  step, state, frozen = start(name, mesh, seed)
  batch, history = make_batch(configs[name], mesh), []
  with jax.set_mesh(mesh):
    for _ in range(iterations):
      state, metrics, samples = step(state, frozen, batch)
      history.append(jax.tree.map(np.asarray, (metrics, samples)))
  return step, state, history


@pytest.fixture(scope="module")
def ppo_run(start, configs, one_device):
  return run(start, configs, "ppo", one_device, iterations=3)


@pytest.fixture(scope="module")
def ptx_run(start, configs, one_device):
  return run(start, configs, "ppo_ptx", one_device, iterations=3)


def to_numpy(state):
  state = dataclasses.replace(state, key=jax.random.key_data(state.key))
  return jax.tree.map(np.array, state)


def responses(history):
  return [samples.rollout.token_BL[:, PROMPT:] for _, samples in history]


def test_an_iteration_is_one_program_without_the_host(start):
  text = start("ppo_ptx")[0].as_text()
  assert text.count(" while(") > 3  # the whole of it: decode, advantages, updates
  assert not HOST.findall(text)
  assert "input_output_alias" in text.splitlines()[0]  # the donated state is reused


def test_details_34_gamma_0_is_plain_ppo_though_pretraining_rows_come_along(
  start, configs, one_device
):
  step, state, frozen = start("ppo")
  batch = make_batch(configs["ppo"], one_device)
  more = batch | {"pretrain": make_batch(configs["ppo_ptx"], one_device)["pretrain"]}
  text = step.lower(state, frozen, batch).as_text()
  assert text == step.lower(state, frozen, more).as_text()
  assert text.count("stablehlo.while") > 3 and not HOST.findall(text)


def test_every_phase_of_a_profile_is_in_the_program(start):
  step, _, _ = start("ppo_ptx")
  phases = set(profiling.operation_phases(step.as_text()).values())
  assert phases >= {*profiling.PHASES} - {"gradient", "optimizer"}  # of the supervised stages


def test_tokens_are_those_sampled(ppo_run, configs):
  _, _, history = ppo_run
  for metrics, samples in history:
    rollout = samples.rollout
    assert metrics["tokens"] == rollout.is_response_BR.sum()
    rows = configs["ppo"].batch_size
    assert metrics["prompt_length"] == rollout.is_token_BL[:, :PROMPT].sum() / rows


def test_a_run_compiles_once(ppo_run):
  step, state, history = ppo_run
  assert step._cache_size() == 1 and int(state.step) == len(history) == 3


def test_the_state_is_donated_and_the_frozen_weights_are_not_touched(
  start, configs, one_device, frozen_weights
):
  step, state, frozen = start("ppo")
  expected = jax.tree.map(np.array, frozen_weights)
  new_state, *_ = step(state, frozen, make_batch(configs["ppo"], one_device))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  jax.tree.map(np.testing.assert_array_equal, frozen, expected)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), new_state.params, expected.ref_params)
  assert jax.tree.all(moved)  # while every weight of the policy did move


def test_details_20_the_value_network_starts_as_the_reward_model_and_is_its_own(
  start, configs, one_device
):
  step, state, frozen = start("ppo")
  reward_params = jax.tree.map(np.array, frozen.reward_params)
  jax.tree.map(np.testing.assert_array_equal, state.value_params, reward_params)
  others = jax.tree.leaves((frozen, state.params))
  assert not {id(leaf) for leaf in jax.tree.leaves(state.value_params)} & {id(x) for x in others}
  state, *_ = step(state, frozen, make_batch(configs["ppo"], one_device))
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.value_params, reward_params)
  assert jax.tree.all(moved)  # trained, head and trunk,
  jax.tree.map(np.testing.assert_array_equal, frozen.reward_params, reward_params)  # it alone


def test_details_8_the_first_minibatchs_ratio_is_1(ppo_run, ptx_run):
  """To rounding, with the rollout's log-probs and with rescored ones: the forward of 16 rows and the
  differentiated one of 8 are not the same program."""
  for metrics, _ in ppo_run[2] + ptx_run[2]:
    np.testing.assert_allclose(metrics["first_ratio_max"], 1, atol=1e-5)
  assert ppo_run[2][0][0]["ratio_max"] > 1.01  # the metric does see other ratios


def test_kl_starts_at_0_and_the_score_is_the_reward_models(ppo_run):
  metrics, samples = ppo_run[2][0]
  np.testing.assert_allclose(samples.kl_B, 0, atol=1e-4)
  np.testing.assert_allclose(metrics["reward"], samples.score_B.mean(), rtol=1e-5)
  assert np.abs(ppo_run[2][2][1].kl_B).max() > 1e-3


def test_details_7_sampling_noise_differs_between_iterations(start, configs, one_device, ppo_run):
  """Also where the weights do not: the iteration's number alone changes the draw."""
  first, second, _ = responses(ppo_run[2])
  assert not np.array_equal(first, second)
  step, state, frozen = start("ppo")
  state = dataclasses.replace(state, step=jax.device_put(jnp.int32(5), state.step.sharding))
  _, _, samples = step(state, frozen, make_batch(configs["ppo"], one_device))
  assert np.mean(np.asarray(samples.rollout.token_BL)[:, PROMPT:] != first) > 0.5


@pytest.mark.parametrize("name", ["ppo", "ppo_ptx"])
def test_equal_seeds_give_equal_bits(start, configs, one_device, ppo_run, ptx_run, name):
  _, state, history = {"ppo": ppo_run, "ppo_ptx": ptx_run}[name]
  _, again, history_again = run(start, configs, name, one_device, iterations=3)
  jax.tree.map(np.testing.assert_array_equal, to_numpy(again), to_numpy(state))
  jax.tree.map(np.testing.assert_array_equal, history_again, history)
  _, _, other = run(start, configs, name, one_device, iterations=1, seed=1)
  assert not np.array_equal(responses(other)[0], responses(history)[0])


def test_a_decay_of_0_keeps_no_average_and_changes_nothing_else(
  start, configs, one_device, ppo_run
):
  _, state, history = run(start, configs, "no_average", one_device, iterations=3)
  expected = dataclasses.replace(to_numpy(ppo_run[1]), ema_params=None)
  jax.tree.map(np.testing.assert_array_equal, to_numpy(state), expected)
  jax.tree.map(np.testing.assert_array_equal, history, ppo_run[2])


def test_ema_and_kl_coefficient_follow_their_formulas(start, configs, one_device):
  cfg = configs["ppo_ptx"]
  step, state, frozen = start("ppo_ptx")
  for _ in range(3):
    before = to_numpy(state)
    state, metrics, _ = step(state, frozen, make_batch(cfg, one_device))
    after = to_numpy(state)
    mean = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema_params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema_params, mean)
    error = np.clip(metrics["kl"] / cfg.kl_target - 1, -0.2, 0.2)
    expected = before.kl_coef * (1 + error * cfg.batch_size / cfg.kl_horizon)
    np.testing.assert_allclose(after.kl_coef, expected, rtol=1e-5)
    np.testing.assert_array_equal(metrics["kl_coef"], before.kl_coef)  # the one that was in force
    assert after.kl_coef != before.kl_coef and after.step == before.step + 1
    np.testing.assert_array_equal(after.key, before.key)


@pytest.mark.parametrize("row", [0, 7, 63, 64, 127])
def test_details_34_every_pretraining_row_counts(start, configs, one_device, ptx_run, row):
  """Eight rows an episode (C.4): 128 beside 16 episodes, and none is left out."""
  cfg = configs["ppo_ptx"]
  batch = make_batch(cfg, one_device)
  rows = batch["pretrain"]
  assert len(rows.token_BL) == 8 * cfg.batch_size
  token_BL = np.array(rows.token_BL)
  token_BL[row] = (token_BL[row] + 1) % VOCAB
  changed = dataclasses.replace(rows, token_BL=sharding.place_batch(one_device, token_BL))
  step, state, frozen = start("ppo_ptx")
  _, metrics, _ = step(state, frozen, batch | {"pretrain": changed})
  assert metrics["ptx_loss"] != ptx_run[2][0][0]["ptx_loss"]


def counting_reward(nets):
  """Reward-model weights by hand: the last column attends to all alike and adds up the GOODs."""
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), models.param_shapes(nets.scalar))
  (layer,) = params["layers"]
  for norm in (layer["attention_norm"], layer["mlp_norm"], params["final_norm"]):
    norm["scale_D"] += 1
  params["embedding"]["token_VD"][:, 1] = 5
  params["embedding"]["token_VD"][GOOD, :2] = 5, 0
  layer["attention"]["w_qkv_DGQK"][0, 0, -1, 0] = 1  # value: "is GOOD"
  layer["attention"]["w_out_GRKD"][0, :, 0, 2] = 1
  params["head"]["w_D"][2] = 2
  return params


def test_ppo_raises_a_reward_that_counts_a_token(start, configs, nets, one_device, frozen_weights):
  frozen = ppo_step.Frozen(frozen_weights.ref_params, counting_reward(nets))
  step, state, frozen = start("ppo", frozen=frozen)
  share, reward = [], []
  for seed in range(20):
    state, metrics, samples = step(state, frozen, make_batch(configs["ppo"], one_device, seed))
    rollout = jax.tree.map(np.asarray, samples.rollout)
    share.append(np.mean(rollout.token_BL[:, PROMPT:][rollout.is_response_BR] == GOOD))
    reward.append(float(metrics["reward"]))
  assert np.mean(share[:3]) < 0.2 and np.mean(share[-3:]) > 0.6, share
  assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.5, reward


def assert_equal_runs(got, expected):
  (step, state, history), (_, expected_state, expected_history) = got, expected
  assert step._cache_size() == 1
  for (metrics, samples), (expected_metrics, expected_samples) in zip(history, expected_history):
    for name in ("token_BL", "is_response_BR", "num_steps"):
      pair = (getattr(s.rollout, name) for s in (samples, expected_samples))
      np.testing.assert_array_equal(*pair, err_msg=name)
    for name in expected_metrics:
      np.testing.assert_allclose(
        metrics[name], expected_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name
      )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, to_numpy(state), to_numpy(expected_state))


def test_eight_devices_equal_one(start, configs, one_device, mesh):
  got = run(start, configs, "ppo_ptx", mesh, iterations=2)
  assert_equal_runs(got, run(start, configs, "ppo_ptx", one_device, iterations=2))
  split = mesh.shape["fsdp"] * mesh.shape["tensor"]
  w_qkv = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(got[1])
    if "w_qkv" in jax.tree_util.keystr(path)
  ]
  assert len(w_qkv) == 7  # both networks, their moments and the EMA stay split as they came
  assert all(leaf.addressable_shards[0].data.size * split == leaf.size for leaf in w_qkv)
  step, state, _ = got
  with jax.set_mesh(mesh):  # rows that are not split are not moved in silence
    frozen = jax.tree.map(jnp.copy, ppo_step.Frozen(state.ema_params, state.value_params))
    rows = jax.device_put(make_batch(configs["ppo_ptx"], mesh), sharding.replicated(mesh))
    with pytest.raises(ValueError, match="does not match the sharding"):
      step(state, frozen, rows)


def test_eight_devices_equal_one_without_pretraining(start, configs, one_device):
  got = run(start, configs, "ppo", sharding.make_mesh(MeshConfig(1, 2, 2, 2)), iterations=2)
  assert_equal_runs(got, run(start, configs, "ppo", one_device, iterations=2))


def test_frozen_weights_in_bfloat16_lie_as_the_networks_do(configs, nets, frozen_weights):
  mesh, given = (
    sharding.make_mesh(MeshConfig(1, 2, 2, 2)),
    (frozen_weights.ref_params, frozen_weights.reward_params),
  )
  plain = rl_nets.state_shardings(mesh, nets, configs["ppo"])
  assert rl_nets.freeze(nets, plain, *given).ref_params is given[0]  # float32: nothing to cast
  narrow = lambda model: dataclasses.replace(
    model, execution=dataclasses.replace(model.execution, dtype="bfloat16")
  )
  nets = dataclasses.replace(nets, policy=narrow(nets.policy), scalar=narrow(nets.scalar))
  with jax.set_mesh(mesh):
    placed = jax.device_put(given, (plain.params, plain.value_params))
    frozen = rl_nets.freeze(nets, plain, *placed)
  for got, places in (
    (frozen.ref_params, plain.params),
    (frozen.reward_params, plain.value_params),
  ):
    assert jnp.dtype("bfloat16") in {x.dtype for x in jax.tree.leaves(got)}
    jax.tree.map(
      lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(), got, places
    )


def test_shared_rows_give_the_run_of_padded_ones(start, configs, one_device):
  got = run(start, configs, "packed", sharding.make_mesh(MeshConfig(1, 2, 2, 2)), iterations=2)
  assert_equal_runs(got, run(start, configs, "ppo", one_device, iterations=2))


def test_slots_change_no_result(quick_jit, start, configs, nets, one_device, ppo_run):
  _, state, frozen = start("ppo")
  with mock.patch.object(jax, "jit", quick_jit):
    shardings = rl_nets.state_shardings(one_device, nets, configs["ppo"])
    step = ppo_step.make_train_step(dataclasses.replace(nets, slots=4), configs["ppo"], shardings)
  step = step.lower(state, frozen, make_batch(configs["ppo"], one_device)).compile()
  assert not HOST.findall(step.as_text())
  _, metrics, samples = step(state, frozen, make_batch(configs["ppo"], one_device))
  expected_metrics, expected_samples = ppo_run[2][0]
  np.testing.assert_array_equal(samples.rollout.token_BL, expected_samples.rollout.token_BL)
  assert metrics["decode_steps"] > expected_metrics["decode_steps"]
  for name in expected_metrics.keys() - {"slot_waste", "decode_steps"}:
    np.testing.assert_allclose(
      metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name
    )


def test_no_key_is_used_twice(configs, nets, one_device, frozen_weights):
  cfg = configs["ppo"]
  state = ppo_step.create_state(
    frozen_weights.ref_params, frozen_weights.reward_params, nets, cfg, jax.random.key(0)
  )
  with jax.debug_key_reuse(True):  # checked as the step is traced
    step = ppo_step.make_train_step(nets, cfg, rl_nets.state_shardings(one_device, nets, cfg))
    step.trace(state, frozen_weights, make_batch(cfg, one_device))
