"""What an RL stage begins with: optimisers, the first state, and what stays frozen."""

import dataclasses
import functools
import types
from unittest import mock

import jax
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.models import adapters
from instructjax.parallel import sharding
from instructjax.rl import step as ppo_step
from instructjax.stages import ppo, rl_nets
from instructjax.train.optim import make_optimizer
from tests import micro, tiny

VOCAB, EOS, RESPONSE = 23, 0, 6


@pytest.fixture
def nets(tiny_config, adam_config):
  policy, scalar = (tiny.make_model(tiny_config, VOCAB, head) for head in ("lm", "scalar"))
  tx = make_optimizer(adam_config, 100)
  return ppo_step.Nets(policy, scalar, tx, tx, stop_ids=(EOS,), max_response_length=RESPONSE)


def test_optimisers_leave_clipping_to_the_step_and_count_updates():
  config = micro.config(
    "ppo",
    {},
    ppo__num_iterations=5,
    ppo__num_epochs=3,
    ppo__num_minibatches=2,
    rollout__slots=4,
    ppo__policy_optim__learning_rate=0.25,
  )
  made = []
  with (
    mock.patch.object(
      rl_nets, "make_optimizer", lambda optim, updates: made.append((optim, updates)) or len(made)
    ),
    mock.patch.object(
      rl_nets, "make_model", lambda config, mesh, role, vocab_size: (role, vocab_size)
    ),
  ):
    nets = rl_nets.make_nets(config, "mesh", config.ppo, 23, (7, 9))
  assert (nets.policy, nets.scalar) == (("policy", 23), ("reward", 23))
  assert (nets.policy_tx, nets.value_tx) == (1, 2)
  assert made == [
    (dataclasses.replace(optim, clip_norm=None), 5 * 3 * 2)
    for optim in (config.ppo.policy_optim, config.ppo.value_optim)
  ]
  assert made[0] != made[1] and config.ppo.policy_optim.clip_norm == 1.0
  assert (nets.stop_ids, nets.max_response_length, nets.slots) == ((7, 9), 24, 4)


def test_prompts_are_shared_where_rows_and_attention_hold_trees():
  kwargs = dict(ppo__samples_per_prompt=2, ppo__packed_rows=2, ppo__share_prompts=True)
  config = micro.config("ppo", {}, **kwargs)
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  model = lambda attention: types.SimpleNamespace(
    execution=dataclasses.replace(tiny.EXECUTION, attention=attention)
  )
  why = functools.partial(rl_nets.why_not_shared, config)
  assert why(config.ppo, mesh, model("plain")) == ""
  assert "execution.attention=plain" in why(config.ppo, mesh, model("splash"))
  changed = lambda **changes: dataclasses.replace(config.ppo, **changes)
  assert "has one answer" in why(changed(samples_per_prompt=1), mesh, model("plain"))
  assert "4 would do" in why(changed(samples_per_prompt=4), mesh, model("plain"))
  assert "packed_rows=0 gives" in why(changed(packed_rows=0), mesh, model("plain"))
  # Only rows that divide a minibatch are advised, of 6, 5 and 2 answers: 3 or more have room.
  sizes = dict(samples_per_prompt=4, packed_rows=2, num_minibatches=2)
  assert "3 would do" in why(changed(batch_size=12, **sizes), mesh, model("plain"))
  assert "5 would do" in why(changed(batch_size=10, **sizes), mesh, model("plain"))
  assert "no number" in why(changed(batch_size=4, **sizes), mesh, model("plain"))
  with mock.patch.object(rl_nets, "make_model", lambda *_: model("plain")):
    made = lambda cfg: rl_nets.make_nets(config, mesh, cfg, 23, (7,)).shares_prompts
    assert made(config.ppo) is True
    assert not made(changed(samples_per_prompt=4)) and not made(changed(share_prompts=False))


@pytest.mark.parametrize("init", ["reward_model", "policy"])
def test_what_the_value_network_starts_from(ppo_config, nets, random_params, init):
  """C.4's reward model as it is, or the policy's trunk under a head that values everything at 0."""
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  cfg = dataclasses.replace(ppo_config, value_init=init)
  params, reward_params = random_params(nets.policy, 1), random_params(nets.scalar, 2)
  made = rl_nets.initial_value(mesh, cfg, nets, params, reward_params)
  if init == "reward_model":
    assert made is reward_params
    return
  assert made["head"].keys() == reward_params["head"].keys()
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(made["head"]))
  for name in made.keys() - {"head"}:
    jax.tree.map(np.testing.assert_array_equal, made[name], params[name])


def test_a_value_network_that_starts_from_the_policys_adapter(ppo_config, nets, random_params):
  """The adapter alone is copied: both networks share the base."""
  adapter = micro.config("ppo", {}, adapter__rank=2).adapter
  policy, scalar = (model.clone(adapter=adapter) for model in (nets.policy, nets.scalar))
  nets = dataclasses.replace(nets, policy=policy, scalar=scalar)
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  params = adapters.init(policy, jax.random.key(0))
  cfg = dataclasses.replace(ppo_config, value_init="policy")
  made = rl_nets.initial_value(mesh, cfg, nets, params, None)
  assert jax.tree.structure(made) == jax.tree.structure(adapters.trained_shapes(scalar))
  jax.tree.map(np.testing.assert_array_equal, made["layers"], params["layers"])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(made["head"]))


@pytest.mark.parametrize("init", ["policy", "reward_model"])
def test_the_value_network_has_the_base_of_what_it_starts_from(init):
  """With a base for the policy and another for the reward model."""
  changes = dict(model__weights="a", reward_model__weights="b", adapter__rank=2)
  config = micro.config("ppo", {}, ppo__value_init=init, **changes)
  ppo.check_settings(config, "ppo")
  nets = rl_nets.make_nets(config, None, config.ppo, 23, (7,))
  frozen = ppo_step.Frozen("ref", "reward", base="policy's", scalar_base="reward model's")
  join = lambda model, base, params: (model.head, base, params)
  with mock.patch.object(adapters, "join", join):
    assert frozen.reward(nets, "reward") == ("scalar", "reward model's", "reward")
    expected = {"policy": "policy's", "reward_model": "reward model's"}[init]
    assert frozen.value(nets, "value") == ("scalar", expected, "value")
    shared = dataclasses.replace(frozen, scalar_base=None)
    assert shared.reward(nets, "r") == ("scalar", "policy's", "r") == shared.value(nets, "r")


def test_the_policys_schedule_begins_after_the_warm_up(ppo_config):
  """2 of 5 iterations of 4 updates: its cosine ends after 12 of them, the value network's after 20."""
  optim = dataclasses.replace(
    ppo_config.policy_optim, schedule="cosine", warmup_steps=0, end_fraction=0.0
  )
  cfg = dataclasses.replace(
    ppo_config,
    num_iterations=5,
    value_warmup=2,
    num_epochs=2,
    num_minibatches=2,
    policy_optim=optim,
    value_optim=optim,
  )
  lengths = []
  with mock.patch.object(rl_nets, "make_optimizer", lambda optim, updates: lengths.append(updates)):
    rl_nets.optimizers(tiny.CONFIG, cfg)
  assert lengths == [12, 20]


def test_the_first_state_holds_copies_of_what_stays_frozen(ppo_config, nets, random_params):
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  params, reward_params = random_params(nets.policy, 1), random_params(nets.scalar, 2)
  state, _ = rl_nets.initial_state(mesh, ppo_config, nets, params, reward_params, jax.random.key(0))
  for made, given in (
    (state.params, params),
    (state.ema_params, params),
    (state.value_params, reward_params),
  ):
    jax.tree.map(np.testing.assert_array_equal, made, given)
  ours = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, reward_params))}
  theirs = [
    x.unsafe_buffer_pointer()
    for x in jax.tree.leaves((state.params, state.ema_params, state.value_params))
  ]
  assert len({*theirs}) == len(theirs) and not ours & {*theirs}


def test_frozen_weights_in_float32_are_taken_as_they_are(nets):
  given = {"w": 1.0}, {"w": 2.0}
  shardings = types.SimpleNamespace(params=None, value_params=None)
  frozen = rl_nets.freeze(nets, shardings, *given)
  assert frozen.ref_params is given[0] and frozen.reward_params is given[1]
