"""The parts of the PPO step: the gradient of eq. 2, and the order in which minibatches are taken."""

import dataclasses
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.core.structs import PackedBatch, PromptBatch
from instructjax.models import adapters
from instructjax.parallel import sharding
from instructjax.rl import rows
from instructjax.rl import step as ppo_step
from instructjax.rl.experience import Experience, Frozen
from instructjax.stages import rl_nets
from tests import tiny
from tests.rl import episodes
from tests.rl.episodes import LENGTH, PROMPT, ROWS, VOCAB

ALL_TRAINED = Frozen(
  ref_params=None, reward_params=None
)  # no adapters, so updates read nothing of it


GAMMA, CLIP_NORM = 0.7, 0.05


def assert_trees_close(got, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=tolerance), got, expected
  )


# --- what an iteration is made of -----------------------------------------------------------------


@pytest.fixture
def iteration(nets, ppo_config, monkeypatch):
  """iteration(step, **changes of the config) -> (what the parts were given, state, metrics, samples).

  The parts are scripted: the updates move the weight from 2 to 4, and the KL is 9.
  """
  nets = dataclasses.replace(nets, slots=3)

  def one(step=0, **changes):
    cfg, given = dataclasses.replace(ppo_config, **changes), {}
    state = ppo_step.create_state(
      {"w": jnp.float32(2)}, {"w": jnp.float32(7)}, nets, cfg, jax.random.key(5)
    )
    state = dataclasses.replace(state, step=jnp.int32(step))

    def generate(model, params, prompts, key, **kwargs):
      given["rollout"] = dict(model=model, params=params, prompts=prompts, key=key, **kwargs)
      return "rollout"

    def from_rollout(nets, cfg, rows, state, frozen, rollout):
      given["scored"] = (state, frozen, rollout)
      metrics = {"kl": jnp.float32(9), "reward": jnp.float32(1)}
      return types.SimpleNamespace(
        experience="episodes", metrics=metrics, score_B="scores", kl_B="kls", rewards="rewards"
      )

    def update(nets, cfg, rows, frozen, state, episodes, ptx, key):
      given["update"] = dict(state=state, episodes=episodes, ptx=ptx, key=key)
      after = dataclasses.replace(state, params={"w": jnp.float32(4)})
      return after, {"approx_kl": jnp.float32(3)}

    monkeypatch.setattr(ppo_step.sampling, "generate", generate)
    monkeypatch.setattr(ppo_step.experience, "from_rollout", from_rollout)
    monkeypatch.setattr(ppo_step, "update", update)
    batch = {"prompts": "prompts", "pretrain": "text"}
    return given, *ppo_step.train_step(nets, cfg, rows.padded(), state, ALL_TRAINED, batch)

  return one


def test_an_iteration_samples_then_scores_then_learns(iteration, nets):
  given, state, metrics, samples = iteration(gamma=0.5)
  rollout = given["rollout"]
  assert rollout["model"] is nets.policy and rollout["params"] == {"w": 2}
  assert rollout["prompts"] == "prompts" and rollout["temperature"] == 0.7
  limits = (rollout["max_new_tokens"], rollout["stop_ids"], rollout["slots"])
  assert limits == (episodes.RESPONSE, nets.stop_ids, 3)
  assert given["scored"][0].params == {"w": 2} and given["scored"][1:] == (ALL_TRAINED, "rollout")
  assert (given["update"]["episodes"], given["update"]["ptx"]) == ("episodes", "text")
  assert metrics == {"kl": 9, "reward": 1, "approx_kl": 3}
  assert (samples.rollout, samples.score_B, samples.kl_B) == ("rollout", "scores", "kls")
  assert samples.rewards == "rewards"
  assert (state.step, state.params) == (1, {"w": 4})


def test_pretraining_rows_are_for_a_gamma_above_0(iteration):
  assert iteration(gamma=0.0)[0]["update"]["ptx"] is None
  assert iteration(gamma=1e-6)[0]["update"]["ptx"] == "text"


def test_the_average_of_the_policys_weights_hand_worked(iteration):
  # .9 * 2 + .1 * 4; the average starts as the policy.
  np.testing.assert_allclose(iteration(ema_decay=0.9)[1].ema_params["w"], 2.2, rtol=1e-6)
  assert iteration(ema_decay=0.0)[1].ema_params is None


def test_beta_moves_only_if_it_is_adaptive_hand_worked(iteration):
  # KL 9 of 6 is .5 above the target, clipped to .2; 16 episodes of a horizon of 100: .2 * .16 = .032.
  adaptive = dict(kl_controller="adaptive", beta=0.5, kl_target=6.0, kl_horizon=100)
  np.testing.assert_allclose(iteration(**adaptive)[1].kl_coef, 0.5 * 1.032, rtol=1e-6)
  assert iteration(**adaptive | dict(kl_controller="fixed"))[1].kl_coef == 0.5


def test_while_only_the_value_network_learns_average_and_beta_stay(iteration):
  """Bit for bit: .9 * 2 + .1 * 2 need not be 2, and a KL of 0 would lower beta."""
  changes = dict(
    value_warmup=2, ema_decay=0.9, kl_controller="adaptive", beta=0.5, kl_target=6.0, kl_horizon=100
  )
  for step in (0, 1):
    after = iteration(step, **changes)[1]
    assert (after.ema_params["w"], after.kl_coef, after.step) == (2, 0.5, step + 1)
  after = iteration(2, **changes)[1]
  np.testing.assert_allclose([after.ema_params["w"], after.kl_coef], [2.2, 0.5 * 1.032], rtol=1e-6)


def test_details_7_no_two_iterations_draw_the_same_noise(iteration):
  keys, runs = [], [iteration(step) for step in (0, 1, 1)]
  for given, state, *_ in runs:
    keys.append(
      tuple(jax.random.key_data(given[name]["key"]).tolist() for name in ("rollout", "update"))
    )
    assert state.key == jax.random.key(5)  # which stays as it was
  assert keys[1] == keys[2]  # a function of the step's number: a resumed run draws it again
  assert len({str(key) for pair in keys[:2] for key in pair}) == 4


def test_create_state_starts_at_step_0_with_the_config_s_beta(nets, ppo_config):
  params, value_params = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
  state = ppo_step.create_state(
    params, value_params, nets, dataclasses.replace(ppo_config, beta=0.3), jax.random.key(0)
  )
  assert state.step == 0 and state.kl_coef == np.float32(0.3)
  assert state.params is params and state.value_params is value_params
  np.testing.assert_array_equal(state.ema_params["w"], params["w"])
  assert state.ema_params["w"] is not params["w"]


def test_the_program_gives_the_states_memory_away_and_keeps_every_layout(nets, ppo_config):
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  shardings = rl_nets.state_shardings(mesh, nets, ppo_config)
  with mock.patch.object(jax, "jit") as jit:
    made = ppo_step.make_train_step(nets, ppo_config, shardings)
  (_, kwargs) = jit.call_args
  assert made is jit.return_value and kwargs["donate_argnums"] == 0
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  state, frozen, batch = kwargs["in_shardings"]
  assert state is shardings and batch == split
  assert frozen.ref_params is shardings.params and frozen.reward_params == shardings.value_params
  state, metrics, samples = kwargs["out_shardings"]
  assert state is shardings and metrics == whole
  assert samples.score_B == samples.rollout.token_BL == split
  assert samples.rollout.num_steps == samples.rollout.slot_steps == whole


@pytest.mark.parametrize("is_apart", [False, True])
def test_adapters_learn_what_whole_weights_would_by_the_chain_rule(
  quick_jit, nets, ppo_config, random_params, is_apart
):
  """Policy and value network on one base, or each on its own."""
  adapter = tiny.adapter(rank=2, alpha=3.0, targets=("q", "k", "v", "up"))
  adapted = dataclasses.replace(
    nets, policy=nets.policy.clone(adapter=adapter), scalar=nets.scalar.clone(adapter=adapter)
  )
  rng = np.random.default_rng(0)
  noise = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
  base = random_params(nets.policy, 1)
  other = adapters.base_of(nets.scalar, random_params(nets.scalar, 2)) if is_apart else None
  frozen = Frozen(None, None, base=base, scalar_base=other)
  batch = episodes.make_experience()

  def compare(loss, model, base):
    merged = lambda trained: adapters.merge(model, adapters.base_of(model, base), trained)
    ours = lambda trained: loss(adapted, ppo_config, frozen, trained, batch)[0]
    whole = lambda trained: loss(nets, ppo_config, ALL_TRAINED, merged(trained), batch)[0]
    trained = jax.tree.map(noise, adapters.trained_shapes(model))
    assert_trees_close(*quick_jit(lambda t: (jax.grad(ours)(t), jax.grad(whole)(t)))(trained))

  compare(ppo_step.policy_loss, adapted.policy, base)
  compare(ppo_step.value_loss, adapted.scalar, other if is_apart else base)


def test_details_29_each_epoch_visits_every_episode_once_in_a_new_order(
  nets, ppo_config, monkeypatch
):
  """And beside each minibatch stand the pretraining rows that are its share, all of them used."""
  cfg = dataclasses.replace(ppo_config, num_epochs=3, num_minibatches=2, gamma=1.0)
  visits, weights = [], {"w": jnp.zeros(())}

  def policy_gradient(nets, cfg, rows, frozen, params, batch, ptx):
    visits.append((batch.token_BL[:, 0].tolist(), ptx.token_BL[:, 0].tolist()))
    return params, {"ratio_max": jnp.float32(1)}

  def value_loss(nets, cfg, frozen, params, batch):
    return params["w"], {"clip_fraction": 0.0}

  monkeypatch.setattr(ppo_step, "policy_gradient", policy_gradient)
  monkeypatch.setattr(ppo_step, "value_loss", value_loss)
  episode_B1 = jnp.arange(8)[:, None]
  experience = Experience(*[episode_B1] * len(dataclasses.fields(Experience)))
  ptx = PackedBatch(*[jnp.arange(16)[:, None]] * 4)
  state = ppo_step.create_state(weights, weights, nets, cfg, jax.random.key(0))
  with jax.disable_jit():  # the scan over updates is then a Python loop, which shows its rows
    ppo_step.update(
      nets, cfg, rows.padded(), ALL_TRAINED, state, experience, ptx, jax.random.key(0)
    )
  epochs = [sum((index for index, _ in visits[i : i + 2]), []) for i in (0, 2, 4)]
  assert len(visits) == 6 and all(sorted(epoch) == list(range(8)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert [share for _, share in visits] == [list(range(8)), list(range(8, 16))] * 3


# --- one update of both networks ------------------------------------------------------------------

POLICY_RATE, VALUE_RATE = 1.0, 0.5


def test_each_networks_loss_is_a_mean_over_its_own_tokens(nets, ppo_config):
  """What shared rows weigh their chunks by."""
  asked = []

  def gradient(loss_fn, params, batch, over):
    asked.append((loss_fn.func, params["w"], over))
    metrics = {"clip_fraction": 0.0}
    return rows.Gradient(jnp.zeros(()), metrics, jax.tree.map(jnp.zeros_like, params), 1)

  params, value_params = {"w": jnp.float32(1)}, {"w": jnp.float32(2)}
  state = ppo_step.create_state(params, value_params, nets, ppo_config, jax.random.key(0))
  fake, batch = rows.RowLayout(score=None, gradient=gradient), episodes.make_experience()
  ppo_step._minibatch_update(nets, ppo_config, fake, ALL_TRAINED, state, batch, None)
  assert asked == [
    (ppo_step.policy_loss, 1, "is_actor_BR"),
    (ppo_step.value_loss, 2, "is_response_BR"),
  ]


def scripted_update(nets, ppo_config, monkeypatch, ratios, num_epochs=1):
  """`update` with gradients in place of the policy's and the value's that only report; metrics of all minibatches."""
  cfg = dataclasses.replace(ppo_config, num_epochs=num_epochs, num_minibatches=len(ratios))
  script, weights = iter(ratios * num_epochs), {"w": jnp.zeros(())}

  def policy_gradient(nets, cfg, rows, frozen, params, batch, ptx):
    ratio = jnp.float32(next(script))
    return params, {"ratio_max": ratio, "approx_kl": ratio}

  monkeypatch.setattr(ppo_step, "policy_gradient", policy_gradient)
  monkeypatch.setattr(
    ppo_step,
    "value_loss",
    lambda nets, cfg, frozen, params, batch: (params["w"], {"clip_fraction": 0.0}),
  )
  experience = Experience(*[jnp.arange(6)[:, None]] * len(dataclasses.fields(Experience)))
  state = ppo_step.create_state(weights, weights, nets, cfg, jax.random.key(0))
  with jax.disable_jit():  # the scan over updates is then a Python loop, which follows the script
    return ppo_step.update(
      nets, cfg, rows.padded(), ALL_TRAINED, state, experience, None, jax.random.key(0)
    )[1]


def test_ratio_max_is_the_greatest_of_all_minibatches_and_the_rest_are_means(
  nets, ppo_config, monkeypatch
):
  metrics = scripted_update(nets, ppo_config, monkeypatch, [1.5, 3.0, 1.5])
  assert (metrics["ratio_max"], metrics["approx_kl"], metrics["first_ratio_max"]) == (3, 2, 1.5)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_in_the_warm_up_only_the_value_network_learns(nets, ppo_config, step):
  """Three iterations, counted from 0. Of the policy neither weights nor Adam's state change in any bit."""
  cfg = dataclasses.replace(ppo_config, value_warmup=3)
  nets = dataclasses.replace(nets, policy_tx=optax.adam(0.1), value_tx=optax.adam(0.1))
  gradient = lambda loss_fn, params, batch, over: rows.Gradient(
    jnp.ones(()), {"clip_fraction": 0.0}, jax.tree.map(jnp.ones_like, params), 1
  )
  params, value_params = {"w": jnp.float32(0.1)}, {"w": jnp.float32(2)}
  state = ppo_step.create_state(params, value_params, nets, cfg, jax.random.key(0))
  state = dataclasses.replace(state, step=jnp.int32(step))
  fake, batch = rows.RowLayout(score=None, gradient=gradient), episodes.make_experience()
  after, metrics = ppo_step._minibatch_update(nets, cfg, fake, ALL_TRAINED, state, batch, None)
  same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
  stays = step < 3
  assert same(after.params, state.params) == stays
  assert same(after.opt_state, state.opt_state) == stays
  assert not same(after.value_params, state.value_params)
  assert not same(after.value_opt_state, state.value_opt_state)
  assert metrics["policy_grad_norm"] == 1  # what it would have learned is shown all the same


@pytest.fixture(scope="module")
def updates(quick_jit, nets, weights, ppo_config):
  """Steps of both networks by plain gradient descent on all episodes, and the value's gradient written out anew."""
  policy_params, value_params, _ = weights
  batch = jax.tree.map(jnp.asarray, episodes.make_experience())
  nets = dataclasses.replace(nets, policy_tx=optax.sgd(POLICY_RATE), value_tx=optax.sgd(VALUE_RATE))
  plain = dataclasses.replace(ppo_config, num_minibatches=1, num_epochs=1, clip=0.2, value_clip=0.7)
  narrow = dataclasses.replace(plain.value_optim, clip_norm=CLIP_NORM)
  cases = {
    "plain": plain,
    "policy": dataclasses.replace(plain, clip=0.5, value_optim=narrow),
    "value": dataclasses.replace(plain, value_clip=None, policy_optim=narrow),
  }
  is_token_BL = batch.segment_BL > 0
  position_BL = jnp.cumsum(is_token_BL, axis=1) - is_token_BL

  def value_loss(clip, params):
    value_BL = models.apply(
      nets.scalar,
      params,
      batch.token_BL,
      segment_BL=batch.segment_BL,
      position_BL=position_BL,
    )
    value_BR = value_BL[:, PROMPT - 1 : LENGTH - 1]  # before each token
    near_BR = jnp.clip(value_BR, batch.value_BR - clip, batch.value_BR + clip)
    loss_BR = jnp.maximum((value_BR - batch.return_BR) ** 2, (near_BR - batch.return_BR) ** 2)
    return jnp.sum(jnp.where(batch.is_response_BR, loss_BR, 0)) / batch.is_response_BR.sum() / 2

  def everything(policy_params, value_params):
    moved = {}
    for name, cfg in cases.items():
      state = ppo_step.create_state(policy_params, value_params, nets, cfg, jax.random.key(0))
      after, metrics = ppo_step.update(
        nets, cfg, rows.padded(), ALL_TRAINED, state, batch, None, jax.random.key(1)
      )
      change = lambda new, old: jax.tree.map(jnp.subtract, old, new)
      moved[name] = (
        change(after.params, policy_params),
        change(after.value_params, value_params),
        metrics,
      )
    grad = lambda clip: jax.value_and_grad(functools.partial(value_loss, clip))(value_params)
    return moved, grad(0.7), grad(np.inf)

  return quick_jit(everything)(policy_params, value_params)


def times(factor, tree):
  return jax.tree.map(lambda x: factor * x, tree)


def test_the_value_network_learns_the_returns_of_all_responses(updates):
  """Not advantages, not the actor's tokens only, by its own clip and rate."""
  moved, (loss, grads), (unclipped_loss, unclipped) = updates
  assert_trees_close(moved["plain"][1], times(VALUE_RATE, grads))
  assert_trees_close(moved["value"][1], times(VALUE_RATE, unclipped))
  np.testing.assert_allclose(moved["plain"][2]["value_loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(moved["value"][2]["value_loss"], unclipped_loss, rtol=1e-5)
  assert loss > 1.01 * unclipped_loss  # the clip is at work
  size = float(optax.tree.norm(grads))
  np.testing.assert_allclose(moved["plain"][2]["value_grad_norm"], size, rtol=1e-4)
  assert 0 < moved["plain"][2]["value_clip_fraction"] < 1
  assert moved["value"][2]["value_clip_fraction"] == 0


def test_each_networks_gradient_is_clipped_by_its_own_norm(updates):
  """In one case the value's alone, which the policy's other clip leaves as it is; in the other the policy's alone."""
  moved, (_, grads), _ = updates
  size = optax.tree.norm(grads)
  assert size > 4 * CLIP_NORM
  assert_trees_close(moved["policy"][1], times(VALUE_RATE * CLIP_NORM / size, grads))
  np.testing.assert_allclose(moved["policy"][2]["value_grad_norm"], size, rtol=1e-4)  # as it was
  plain, other, narrow = (moved[name][0] for name in ("plain", "policy", "value"))
  norm = optax.tree.norm(plain)
  np.testing.assert_allclose(norm, moved["plain"][2]["policy_grad_norm"], rtol=1e-4)
  assert norm > 4 * CLIP_NORM and optax.tree.norm(other) > 4 * CLIP_NORM
  assert_trees_close(narrow, times(POLICY_RATE * CLIP_NORM / norm, plain))
  with pytest.raises(AssertionError):
    assert_trees_close(other, plain)  # the policy's own clip


# --- the gradient of eq. 2 -------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def gradients(quick_jit, nets, weights, ppo_config):
  """Gradients of eq. 2 as the step takes them, and jax.grad of its two terms written out anew."""
  batch = episodes.make_experience()
  is_token_BL = batch.segment_BL > 0
  text = pretraining_rows(4 * ROWS)
  step = dataclasses.replace(ppo_config, gamma=GAMMA, ptx_rows=4, ptx_microbatches=4)
  clipped = dataclasses.replace(step.policy_optim, clip_norm=CLIP_NORM)
  cases = {
    "ppo": (step, None),
    "mean": (step, text),
    "one chunk": (dataclasses.replace(step, ptx_microbatches=1), text),
    "sum": (dataclasses.replace(step, ptx_reduction="sum"), text),
    "gamma 0": (dataclasses.replace(step, gamma=0.0), text),
    "clipped": (dataclasses.replace(step, policy_optim=clipped), text),
  }
  ref_BR = np.random.default_rng(5).uniform(-4, -2, episodes.MASK_BR.shape).astype(np.float32)
  with_ref = dataclasses.replace(batch, ref_logprob_BR=ref_BR)

  def kl_loss(params):
    """beta times the mean of k3, spelled out: the tokens' ratio to the policy, less its logarithm, less 1."""
    log_ratio_BR = (
      ref_BR - plain_logprob(nets, params, batch.token_BL, is_token_BL, 0.7)[:, PROMPT - 1 :]
    )
    k3_BR = jnp.exp(log_ratio_BR) - log_ratio_BR - 1
    return jnp.sum(jnp.where(batch.is_actor_BR, k3_BR, 0)) / batch.is_actor_BR.sum()

  def surrogate(params):
    logprob_BR = plain_logprob(nets, params, batch.token_BL, is_token_BL, 0.7)[:, PROMPT - 1 :]
    ratio_BR = jnp.exp(logprob_BR - batch.behaviour_logprob_BR)
    gain_BR = jnp.minimum(
      ratio_BR * batch.advantage_BR, jnp.clip(ratio_BR, 0.8, 1.2) * batch.advantage_BR
    )
    return -jnp.sum(jnp.where(batch.is_actor_BR, gain_BR, 0)) / batch.is_actor_BR.sum()

  def sum_nll(params):
    logprob_BT = plain_logprob(nets, params, text.token_BL, text.segment_BL > 0, 1.0)
    return -jnp.sum(jnp.where(text.weight_BL[:, 1:] > 0, logprob_BT, 0))

  def everything(params):
    taken = {
      name: ppo_step.policy_gradient(nets, cfg, rows.padded(), ALL_TRAINED, params, batch, ptx)
      for name, (cfg, ptx) in cases.items()
    }
    grpo = dataclasses.replace(ppo_config, advantage="grpo", beta=0.25)
    taken["grpo"] = ppo_step.policy_gradient(
      nets, grpo, rows.padded(), ALL_TRAINED, params, with_ref, None
    )
    taken["kl"] = jax.value_and_grad(kl_loss)(params)
    return taken, jax.grad(surrogate)(params), jax.value_and_grad(sum_nll)(params)

  taken, ppo_grads, (nll, lm_grads) = quick_jit(everything)(weights[0])
  return taken, ppo_grads, nll, lm_grads, text.weight_BL.sum(), 4 * ROWS


def test_details_34_gradient_is_that_of_equation_2(gradients):
  taken, ppo_grads, nll, lm_grads, weight, _ = gradients
  assert_trees_close(taken["ppo"][0], ppo_grads)
  np.testing.assert_allclose(
    taken["ppo"][1]["update_waste"], 1 - 29 / 48
  )  # 29 tokens in 6 x 8 cells
  expected = jax.tree.map(lambda g, lm: g + GAMMA * lm / weight, ppo_grads, lm_grads)
  assert_trees_close(taken["mean"][0], expected)
  np.testing.assert_allclose(taken["mean"][1]["ptx_loss"], nll / weight, rtol=1e-5)
  size = lambda tree: float(optax.tree.norm(tree))
  assert size(ppo_grads) > 0.1 and GAMMA * size(lm_grads) / weight > 0.1  # neither term is idle
  np.testing.assert_allclose(
    taken["mean"][1]["ptx_grad_norm"], GAMMA * size(lm_grads) / weight, rtol=1e-4
  )


def test_grpos_loss_holds_the_kl_to_the_reference(gradients):
  taken, ppo_grads, *_ = gradients
  kl_loss, kl_grads = taken["kl"]
  np.testing.assert_allclose(taken["grpo"][1]["kl_loss"], kl_loss, rtol=1e-5)
  assert kl_loss > 0.1 and optax.tree.norm(kl_grads) > 0.1
  expected = jax.tree.map(lambda g, kl: g + 0.25 * kl, ppo_grads, kl_grads)
  assert_trees_close(taken["grpo"][0], expected)
  loss = taken["ppo"][1]["policy_loss"] + 0.25 * kl_loss
  np.testing.assert_allclose(taken["grpo"][1]["policy_loss"], loss, rtol=1e-5)


def test_without_a_value_network_there_is_none_in_state_and_metrics(nets, weights, ppo_config):
  """Traced only."""
  params, _, frozen = weights
  bare = dataclasses.replace(nets, value_tx=None)
  cfg = dataclasses.replace(ppo_config, advantage="rloo", samples_per_prompt=2, batch_size=ROWS)
  prompts = PromptBatch(
    *(np.zeros((ROWS, PROMPT), kind) for kind in (np.int32, bool)), np.arange(ROWS)
  )

  def step(params, frozen, prompts):
    state = ppo_step.create_state(params, None, bare, cfg, jax.random.key(0))
    return ppo_step.train_step(bare, cfg, rows.padded(), state, frozen, {"prompts": prompts})

  state, metrics, _ = jax.eval_shape(step, params, frozen, prompts)
  assert state.value_params is state.value_opt_state is None
  assert not [name for name in metrics if "value" in name or "variance" in name]
  assert {"policy_loss", "kl", "reward"} <= metrics.keys()


def test_sum_reduction_sums_over_tokens_and_averages_over_rows(gradients):
  taken, ppo_grads, nll, lm_grads, _, num_rows = gradients
  expected = jax.tree.map(lambda g, lm: g + GAMMA * lm / num_rows, ppo_grads, lm_grads)
  assert_trees_close(taken["sum"][0], expected)
  np.testing.assert_allclose(taken["sum"][1]["ptx_loss"], nll / num_rows, rtol=1e-5)


def test_accumulated_chunks_are_one_big_batch(gradients):
  taken = gradients[0]
  (grads, metrics), (expected, expected_metrics) = taken["mean"], taken["one chunk"]
  episodes.assert_same_gradient(grads, expected)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


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
