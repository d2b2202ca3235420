"""The stage of PPO: the FLOPs that it counts, and what it gives to its step.

That it trains is in tests/rl/test_step_program.py and test_pipeline.py.
"""

import contextlib
import dataclasses
import types
from unittest import mock

import jax
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.rl import step as ppo_step
from instructjax.stages import ppo
from instructjax.train.optim import make_optimizer
from tests import micro, tiny

VOCAB, EOS, PROMPT, RESPONSE, DOCUMENT = 23, 0, 3, 6, 8


@pytest.fixture
def nets(tiny_config, adam_config):
  policy, scalar = (tiny.make_model(tiny_config, VOCAB, head) for head in ("lm", "scalar"))
  tx = make_optimizer(adam_config, 100)
  return ppo_step.Nets(policy, scalar, tx, tx, stop_ids=(EOS,), max_response_length=RESPONSE)


def test_model_flops_of_an_iteration(ppo_config, nets):
  """16 prompts of 2 tokens on average and 50 sampled tokens; see tests/models/test_flops.py for the weights."""
  layers, head, scalar_head = 2 * 1632, 2 * 23 * 16, 2 * 17
  metrics = {"tokens": 50.0, "prompt_length": 2.0}
  read = 50 + 16 * 2
  policy = read * (layers + 2 * (PROMPT + RESPONSE) * 16) + 50 * head
  scalar = read * (layers + 2 * (PROMPT + RESPONSE) * 16 + scalar_head)
  text = 16 * 8 * DOCUMENT * (layers + 2 * DOCUMENT * 16 + head)
  plain = dataclasses.replace(ppo_config, ptx_rows=1, ptx_microbatches=1)
  ptx = dataclasses.replace(ppo_config, gamma=0.5, behaviour_logprob="rescore")
  count = lambda cfg: ppo.model_flops(nets, cfg, PROMPT, metrics)
  # Sampled, scored by the reference (and anew by the policy), valued, rewarded; then two epochs, three times.
  assert count(ptx) == 3 * policy + 2 * scalar + 2 * 3 * (policy + scalar + text)
  assert count(plain) == 2 * policy + 2 * scalar + 2 * 3 * (policy + scalar)


# --- what the stage gives to its step -------------------------------------------------------------


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
      ppo, "make_optimizer", lambda optim, updates: made.append((optim, updates)) or len(made)
    ),
    mock.patch.object(ppo, "make_model", lambda config, mesh, role, vocab_size: (role, vocab_size)),
  ):
    nets = ppo.make_nets(config, "mesh", config.ppo, 23, (7, 9))
  assert (nets.policy, nets.scalar) == (("policy", 23), ("reward", 23))
  assert (nets.policy_tx, nets.value_tx) == (1, 2)
  assert made == [
    (dataclasses.replace(optim, clip_norm=None), 5 * 3 * 2)
    for optim in (config.ppo.policy_optim, config.ppo.value_optim)
  ]
  assert made[0] != made[1] and config.ppo.policy_optim.clip_norm == 1.0
  assert (nets.stop_ids, nets.max_response_length, nets.slots) == ((7, 9), 24, 4)


def test_it_reads_training_prompts_and_training_text():
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}),
    tokenizer=types.SimpleNamespace(vocab_size=23),
    data=types.SimpleNamespace(prompt_tokens={"train": "prompts"}.__getitem__),
    data_seed=lambda stage: f"seed of {stage}",
    own_rows=lambda count: ("own", count),
  )
  text = lambda ctx, split, **kwargs: (split, kwargs)
  with (
    mock.patch.object(ppo.batching, "prompt_batches", lambda *a, **k: (a, k)),
    mock.patch.object(ppo.batching, "ZippedBatches", lambda parts: parts),
    mock.patch.object(ppo, "document_batches", text),
  ):
    cfg = dataclasses.replace(ctx.config.ppo, gamma=0.5, ptx_rows=3, ptx_length=11)
    parts = ppo._batches(ctx, cfg, "ppo_ptx")
    plain = ppo._batches(ctx, dataclasses.replace(cfg, gamma=0.0), "ppo")
  (prompts,), kwargs = parts["prompts"]
  seed = "seed of ppo_ptx"
  assert prompts == "prompts"
  assert kwargs == dict(
    length=36, batch_size=8, seed=seed, vocab_size=23, places=("own", 8), repeats=1
  )
  assert parts["pretrain"] == ("train", dict(length=11, batch_size=24, seed=seed))
  assert plain.keys() == {"prompts"}


@pytest.mark.parametrize(("weights", "read"), [("ema", "average"), ("raw", "policy")])
def test_the_held_out_loss_is_of_the_weights_that_are_judged(nets, weights, read):
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, evaluate__weights=weights), mesh="mesh"
  )
  state = types.SimpleNamespace(params="policy", ema_params="average")
  rows = lambda ctx, length: f"held-out rows of {length}"
  with (
    mock.patch.object(
      ppo.supervised, "make_lm_evaluation", lambda model, mesh, microbatches: lambda *a: (model, *a)
    ),
    mock.patch.object(ppo, "validation_rows", rows),
  ):
    found = ppo._held_out_loss(ctx, nets, ())(state, 3)
  assert found == {"pretrain_loss": (nets.policy, read, "held-out rows of 60")}


@pytest.mark.parametrize("max_kl, documents", [(0.0, ["documents"]), (30.0, [])])
def test_the_stage_starts_from_ppo_init_and_the_shifted_reward_model(max_kl, documents):
  """Both stay frozen as reference and reward; policy and value network begin as their copies."""
  cfg = micro.config(
    "ppo", {}, ppo__max_kl=max_kl, ppo__num_iterations=7, evaluate__pretrain_every=3
  )
  ctx = types.SimpleNamespace(config=cfg, mesh="mesh", key=lambda stage: f"key of {stage}")
  fitted, made, finished = {}, {}, []
  run = types.SimpleNamespace(fingerprint={"a": "1"})

  def initial_state(mesh, cfg, nets, params, reward_params, key):
    made["state"] = (mesh, nets, params, reward_params, key)
    return "state", "shardings"

  fit = lambda run, state, step, batches, **kwargs: fitted.update(
    kwargs, run=run, state=state, step=step, batches=batches
  )
  with contextlib.ExitStack() as stack:
    patch = lambda *args: stack.enter_context(mock.patch.object(*args))
    patch(ppo, "_settings", lambda ctx, stage: (ctx.config.ppo, "nets"))
    patch(ppo, "stage_run", lambda *a, **k: run)
    patch(ppo, "is_finished", lambda run: False)
    patch(ppo, "finish", lambda ctx, *rest: finished.append(rest))
    patch(ppo, "initial_state", initial_state)
    patch(ppo, "freeze", lambda *a: made.update(frozen=a) or "frozen")
    patch(ppo, "_batches", lambda ctx, cfg, stage: f"batches of {stage}")
    patch(ppo, "_held_out_loss", lambda ctx, nets, base: "held-out loss")
    patch(ppo, "_describe", lambda ctx, watch: f"describe, {watch}")
    patch(ppo, "_watch", lambda *a: "watch")
    patch(ppo, "_functions", lambda cfg: ())
    patch(ppo.host_rewards, "with_sources", lambda run, made_with, functions: run)
    patch(ppo.text_scorers, "open_all", lambda cfg: [])
    patch(ppo.ensembles, "load", lambda ctx, stage, members: None)
    patch(ppo.lineage, "reads", lambda config, stage: ("prompts", *documents))
    patch(ppo.ppo_step, "make_train_step", lambda *a: a)
    patch(ppo.policies, "load", lambda ctx, name, read: f"weights of {name}")
    patch(ppo.policies, "load_reward", lambda ctx, read, stage: f"shifted {stage}")
    patch(ppo.weight_hash, "tree_fingerprint", lambda tree: f"hash of {tree}")
    patch(ppo.dataclasses, "replace", lambda run, **changes: changes)
    patch(ppo.loop, "fit", fit)
    ppo.run(ctx, "ppo")
  given = "weights of ppo_init", "shifted rm"
  assert made["state"] == ("mesh", "nets", *given, "key of ppo")
  assert made["frozen"] == ("nets", "shardings", *given, None, (), ())  # no ensemble, no base
  assert fitted["constants"] == ("frozen",) and fitted["state"] == "state"
  assert fitted["step"] == ("nets", cfg.ppo, "shardings")
  assert fitted["batches"] == "batches of ppo" and fitted["num_steps"] == 7
  assert fitted["limits"] == ({"kl": 30.0} if max_kl else {})
  assert fitted["evaluate"] == ("held-out loss" if documents else None)
  assert [step for step in range(8) if step in fitted["evaluate_steps"]] == [1, 3, 6]
  hashes = dict(reference=f"hash of {given[0]}", reward_model=f"hash of {given[1]}")
  assert fitted["run"]["fingerprint"] == {"a": "1"} | hashes
  assert finished == [("ppo", run, 7, ppo.results.Nothing())]


@pytest.mark.parametrize("init", ["reward_model", "policy"])
def test_what_the_value_network_starts_from(ppo_config, nets, random_params, init):
  """C.4's reward model as it is, or the policy's trunk under a head that values everything at 0."""
  mesh = ppo.sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  cfg = dataclasses.replace(ppo_config, value_init=init)
  params, reward_params = random_params(nets.policy, 1), random_params(nets.scalar, 2)
  made = ppo.initial_value(mesh, cfg, nets, params, reward_params)
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
  mesh = ppo.sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  params = ppo.adapters.init(policy, jax.random.key(0))
  cfg = dataclasses.replace(ppo_config, value_init="policy")
  made = ppo.initial_value(mesh, cfg, nets, params, None)
  assert jax.tree.structure(made) == jax.tree.structure(ppo.adapters.trained_shapes(scalar))
  jax.tree.map(np.testing.assert_array_equal, made["layers"], params["layers"])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(made["head"]))


@pytest.mark.parametrize("init", ["policy", "reward_model"])
def test_the_value_network_has_the_base_of_what_it_starts_from(init):
  """With a base for the policy and another for the reward model."""
  changes = dict(model__weights="a", reward_model__weights="b", adapter__rank=2)
  config = micro.config("ppo", {}, ppo__value_init=init, **changes)
  ppo.check_settings(config, "ppo")
  nets = ppo.make_nets(config, None, config.ppo, 23, (7,))
  frozen = ppo_step.Frozen("ref", "reward", base="policy's", scalar_base="reward model's")
  join = lambda model, base, params: (model.head, base, params)
  with mock.patch.object(ppo.adapters, "join", join):
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
  with mock.patch.object(ppo, "make_optimizer", lambda optim, updates: lengths.append(updates)):
    ppo._optimizers(tiny.CONFIG, cfg)
  assert lengths == [12, 20]


def test_the_first_state_holds_copies_of_what_stays_frozen(ppo_config, nets, random_params):
  mesh = ppo.sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  params, reward_params = random_params(nets.policy, 1), random_params(nets.scalar, 2)
  state, _ = ppo.initial_state(mesh, ppo_config, nets, params, reward_params, jax.random.key(0))
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
  frozen = ppo.freeze(nets, shardings, *given)
  assert frozen.ref_params is given[0] and frozen.reward_params is given[1]


@pytest.mark.parametrize("prompts", ["demo:", "jsonl:a"])
def test_samples_are_told_with_their_own_numbers(monkeypatch, prompts):
  """Of three answers, two are shown; the gold score, where there is one, is of all."""
  ctx = types.SimpleNamespace(
    config=micro.config(
      "ppo", {}, data__prompts=prompts, data__max_prompt_length=2, log__samples=2
    ),
    tokenizer=types.SimpleNamespace(pad_id=9),
  )
  token_BL = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 0]])
  rollout = types.SimpleNamespace(token_BL=token_BL, is_token_BL=token_BL < 8)
  samples = types.SimpleNamespace(
    rollout=rollout,
    score_B=np.array([0.5, 1.5, 2.5]),
    kl_B=np.array([3.0, 4.0, 5.0]),
    rewards={"answer": np.array([1.0, 0.0, 1.0])},  # a function of that name
  )
  watched = []
  watch = lambda step, values, texts: watched.append((step, values, texts()))
  gold = lambda prompts, texts: [len(p) + 10 * int(t[0]) for p, t in zip(prompts, texts)]
  simulation = types.SimpleNamespace(gold_score=gold) if prompts == "demo:" else None
  monkeypatch.setattr(ppo.judging, "simulation", lambda ctx: simulation)
  decode = lambda tokenizer, rows: ["".join(str(t) for t in row if t != 9) for row in rows]
  monkeypatch.setattr(ppo.answers, "decode", decode)
  extra, rows = ppo._describe(ctx, watch)(samples, 1)
  assert rows == [
    {"prompt": "12", "answer": "3", "score": 0.5, "rewards/answer": 1.0, "kl": 3.0},
    {"prompt": "45", "answer": "6", "score": 1.5, "rewards/answer": 0.0, "kl": 4.0},
  ]
  expected = {"rm": samples.score_B, **samples.rewards}
  assert watched == [(1, expected, (["12"], ["3"]))]
  # 2 + 30, 2 + 60, and 1 + 0: the pad is no text.
  assert extra == ({"gold": 95 / 3} if simulation else {})
