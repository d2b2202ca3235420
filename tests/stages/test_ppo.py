"""The stage of PPO: the FLOPs that it counts, and what it gives to its step.

That it trains is in tests/rl/test_step_program.py and test_pipeline.py.
"""

import contextlib
import dataclasses
import types
from unittest import mock

import numpy as np
import pytest

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


@pytest.mark.parametrize(
  "stage, reward_model, max_kl, documents",
  [("ppo", "rm", 0.0, ["documents"]), ("ppo", "rm", 30.0, []), ("ppo_ptx_2", "rm_2", 0.0, [])],
)
def test_the_stage_starts_from_ppo_init_and_the_shifted_reward_model(
  stage, reward_model, max_kl, documents
):
  """Both stay frozen as reference and reward; policy and value network begin as their copies.

  The reward model is that of the stage's own round of comparisons.
  """
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
    patch(ppo.rl_nets, "initial_state", initial_state)
    patch(ppo.rl_nets, "freeze", lambda *a: made.update(frozen=a) or "frozen")
    patch(ppo, "_batches", lambda ctx, cfg, stage: f"batches of {stage}")
    patch(ppo, "_held_out_loss", lambda ctx, nets, base: "held-out loss")
    patch(ppo, "_describe", lambda ctx, watch: f"describe, {watch}")
    patch(ppo, "_watch", lambda *a: "watch")
    patch(ppo, "_functions", lambda cfg: ())
    patch(ppo.host_rewards, "with_sources", lambda run, made_with, functions: run)
    patch(ppo.text_scorers, "open_all", lambda cfg: [])
    patch(ppo.ensembles, "load", lambda ctx, stage, members: None)
    patch(ppo.lineage, "kept_steps", lambda config, stage: f"kept of {stage}")
    patch(ppo.lineage, "reads", lambda config, stage: ("prompts", *documents))
    patch(ppo.ppo_step, "make_train_step", lambda *a: a)
    patch(ppo.policies, "load", lambda ctx, name, read: f"weights of {name}")
    patch(ppo.policies, "load_reward", lambda ctx, read, stage: f"shifted {stage}")
    patch(ppo.weight_hash, "tree_fingerprint", lambda tree: f"hash of {tree}")
    patch(ppo.dataclasses, "replace", lambda run, **changes: changes)
    patch(ppo.loop, "fit", fit)
    ppo.run(ctx, stage)
  given = "weights of ppo_init", f"shifted {reward_model}"
  assert made["state"] == ("mesh", "nets", *given, f"key of {stage}")
  assert made["frozen"] == ("nets", "shardings", *given, None, (), ())  # no ensemble, no base
  assert fitted["constants"] == ("frozen",) and fitted["state"] == "state"
  assert fitted["step"] == ("nets", cfg.ppo, "shardings")
  assert fitted["batches"] == f"batches of {stage}" and fitted["num_steps"] == 7
  assert fitted["limits"] == ({"kl": 30.0} if max_kl else {})
  assert fitted["evaluate"] == ("held-out loss" if documents else None)
  assert [step for step in range(8) if step in fitted["evaluate_steps"]] == [1, 3, 6]
  assert fitted["keep_steps"] == f"kept of {stage}"
  hashes = dict(reference=f"hash of {given[0]}", reward_model=f"hash of {given[1]}")
  assert fitted["run"]["fingerprint"] == {"a": "1"} | hashes
  assert finished == [(stage, run, 7, ppo.results.Nothing())]


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
