"""The stage around ppo.py: weights, data, shardings and the outer loop of `ppo`, `ppo_ptx` and `ppo_beta0`."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax.core import results
from instructjax.core.config import Config, PPOConfig
from instructjax.core.structs import Params, PPOState, Samples, tree_of
from instructjax.data import batching, sources
from instructjax.models import flops, transformer
from instructjax.parallel import sharding, stacking
from instructjax.rl import step as ppo_step
from instructjax.stages import answers, lineage, policies
from instructjax.stages.context import Context, finish, is_finished, make_model, stage_run
from instructjax.stages.text_rows import document_batches, validation_rows
from instructjax.train import checkpoint, loop, supervised
from instructjax.train.optim import make_optimizer

_ADVICE = (
  "if only ppo.max_kl is too low, raise it and run again: the run goes on. Else lower"
  " ppo.policy_optim.learning_rate or raise ppo.beta, for all RL stages alike, in another --workdir"
)


def make_nets(
  config: Config, mesh: Mesh, cfg: PPOConfig, vocab_size: int, eos_id: int
) -> ppo_step.Nets:
  """Networks and optimisers. Clipping is left to the step, which clips each term of the gradient on its own.

  Args:
    config: of the run.
    mesh: its devices.
    cfg: its PPO block as the stage runs it.
    vocab_size, eos_id: of the tokenizer.
  Raises:
    UserError: the warmup is as long as the stage.
  """
  updates = cfg.num_iterations * cfg.num_epochs * cfg.num_minibatches
  unclipped = lambda optim: make_optimizer(dataclasses.replace(optim, clip_norm=None), updates)  # noqa: E731
  return ppo_step.Nets(
    policy=make_model(config, mesh, "policy", vocab_size),
    scalar=make_model(config, mesh, "reward", vocab_size),
    policy_tx=unclipped(cfg.policy_optim),
    value_tx=unclipped(cfg.value_optim),
    eos_id=eos_id,
    max_response_length=config.data.max_response_length,
    slots=config.rollout.slots,
  )


def state_shardings(mesh: Mesh, nets: ppo_step.Nets, cfg: PPOConfig) -> PPOState:
  """Where a PPOState lies: optimisers and average as the weights they belong to."""
  replicated = sharding.replicated(mesh)
  policy_shardings, policy_shapes = transformer.param_shardings(mesh, nets.policy)
  value_shardings, value_shapes = transformer.param_shardings(mesh, nets.scalar)
  return tree_of(
    PPOState,
    step=replicated,
    params=policy_shardings,
    opt_state=sharding.opt_state_shardings(nets.policy_tx, policy_shapes, policy_shardings, mesh),
    value_params=value_shardings,
    value_opt_state=sharding.opt_state_shardings(
      nets.value_tx, value_shapes, value_shardings, mesh
    ),
    ema_params=policy_shardings if cfg.ema_decay else None,
    kl_coef=replicated,
    key=replicated,
  )


def initial_state(
  mesh: Mesh,
  cfg: PPOConfig,
  nets: ppo_step.Nets,
  params: Params,
  reward_params: Params,
  key: jax.Array,
) -> tuple[PPOState, PPOState]:
  """(PPOState, its shardings) before the first iteration; copies of the weights given."""
  shardings = state_shardings(mesh, nets, cfg)

  def create(params, value_params, key):
    params, value_params = jax.tree.map(jnp.copy, (params, value_params))
    return ppo_step.create_state(params, value_params, nets, cfg, key)

  return jax.jit(create, out_shardings=shardings)(params, reward_params, key), shardings


def freeze(
  nets: ppo_step.Nets, shardings: PPOState, ref_params: Params, reward_params: Params
) -> ppo_step.Frozen:
  """The two networks as the step reads them; those given where there is nothing to cast."""

  def frozen(model, params, places):
    if model.execution.dtype == "float32":
      return params
    cast = functools.partial(transformer.frozen_weights, model)
    return jax.jit(cast, out_shardings=places)(params)

  return ppo_step.Frozen(
    ref_params=frozen(nets.policy, ref_params, shardings.params),
    reward_params=frozen(nets.scalar, reward_params, shardings.value_params),
  )


def _batches(ctx: Context, cfg: PPOConfig, stage: str):
  seed = ctx.data_seed(stage)
  parts = {
    "prompts": batching.prompt_batches(
      ctx.data.prompt_tokens("train"),
      length=ctx.config.data.max_prompt_length,
      batch_size=cfg.batch_size,
      seed=seed,
      vocab_size=ctx.tokenizer.vocab_size,
      places=ctx.own_rows(cfg.batch_size),
    )
  }
  if cfg.gamma > 0:
    rows = cfg.batch_size * cfg.ptx_rows
    parts["pretrain"] = document_batches(
      ctx, "train", length=cfg.ptx_length, batch_size=rows, seed=seed
    )
  return batching.zip_batches(parts)


def _describe(ctx: Context, cfg: PPOConfig):
  """Callback on an iteration's samples: (extra metrics, rows of the sample table).

  Gold scores exist only where the prompts are the demo's; they steer nothing.
  """
  simulation = sources.simulation(ctx.config.data.prompts)
  prompt_length = ctx.config.data.max_prompt_length

  def describe(samples: Samples, step: int):
    rollout = samples.rollout
    token_BL, is_token_BL, score_B, kl_B = sharding.to_host(
      (rollout.token_BL, rollout.is_token_BL, samples.score_B, samples.kl_B)
    )
    if jax.process_index() != 0:
      return {}, ()
    text = np.where(is_token_BL, token_BL, ctx.tokenizer.pad_id)
    prompts = answers.decode(ctx.tokenizer, text[:, :prompt_length])
    responses = answers.decode(ctx.tokenizer, text[:, prompt_length:])
    extra = {}
    if simulation is not None:
      extra["gold"] = float(np.mean(simulation.gold_score(prompts, responses)))
    columns = (prompts, responses, score_B, kl_B)
    rows = [
      {"prompt": p, "answer": a, "score": float(s), "kl": float(k)}
      for p, a, s, k in list(zip(*columns))[: ctx.config.log.samples]
    ]
    return extra, rows

  return describe


def _held_out_loss(ctx: Context, nets: ppo_step.Nets):
  """(state, step) -> loss on held-out pretraining text of the weights that evaluation judges."""
  loss = supervised.make_lm_evaluation(nets.policy, ctx.mesh)
  rows = validation_rows(ctx, ctx.config.pretrain.length)
  averaged = policies.judges_average(ctx)

  def evaluate(state: PPOState, step: int) -> dict[str, float]:
    return {"pretrain_loss": loss(state.ema_params if averaged else state.params, rows)}

  return evaluate


def model_flops(
  nets: ppo_step.Nets, cfg: PPOConfig, prompt_length: int, metrics: Mapping[str, float]
) -> float:
  """FLOPs of an iteration by the models' definition: no padding, nothing computed twice.

  Args:
    nets, cfg: of the stage.
    prompt_length: columns of a prompt.
    metrics: of the iteration, which say how long prompts and answers are.
  """
  sampled = metrics["tokens"]
  read = sampled + cfg.batch_size * metrics["prompt_length"]
  columns = prompt_length + nets.max_response_length
  policy = flops.forward(nets.policy, read, columns, sampled)
  scalar = flops.forward(nets.scalar, read, columns)
  text = cfg.batch_size * cfg.ptx_rows * cfg.ptx_length if cfg.gamma > 0 else 0
  # The rollout, the reference's log-probs and perhaps the policy's own; values and rewards.
  scored = (2 + (cfg.behaviour_logprob == "rescore")) * policy + 2 * scalar
  updated = 3 * (policy + scalar + flops.forward(nets.policy, text, cfg.ptx_length))
  return scored + cfg.num_epochs * updated


def _settings(ctx: Context, stage: str) -> tuple[PPOConfig, ppo_step.Nets]:
  cfg = lineage.variant(ctx.config, stage)
  return cfg, make_nets(ctx.config, ctx.mesh, cfg, ctx.tokenizer.vocab_size, ctx.tokenizer.eos_id)


def check(ctx: Context, stage: str):
  """Raises UserError where a warmup is as long as the stage."""
  _settings(ctx, stage)


def run(ctx: Context, stage: str):
  """Trains one RL policy from `ppo_init`, against the frozen `ppo_init` and `rm`."""
  cfg, nets = _settings(ctx, stage)
  run_ = stage_run(
    ctx,
    stage,
    cfg,
    model=ctx.config.model,
    reward_model=ctx.config.reward_model,
    data=ctx.config.data,
    rollout=ctx.config.rollout,
  )
  if is_finished(run_):
    return
  given = {"reference": policies.load(ctx, "ppo_init"), "reward_model": policies.load_reward(ctx)}
  state, shardings = initial_state(ctx.mesh, cfg, nets, *given.values(), key=ctx.key(stage))
  reference = {
    name: checkpoint.tree_fingerprint(stacking.relay(params, stacking.stacked))
    for name, params in given.items()
  }
  frozen = freeze(nets, shardings, *given.values())
  del given
  loop.fit(
    dataclasses.replace(run_, fingerprint={**run_.fingerprint, **reference}, advice=_ADVICE),
    state,
    ppo_step.make_train_step(nets, cfg, shardings),
    _batches(ctx, cfg, stage),
    num_steps=cfg.num_iterations,
    constants=(frozen,),
    place=lambda batch: sharding.place_batch(ctx.mesh, batch),
    evaluate=_held_out_loss(ctx, nets),
    evaluate_steps={1, *range(0, cfg.num_iterations + 1, ctx.config.evaluate.pretrain_every)} - {0},
    limits={"kl": cfg.max_kl} if cfg.max_kl else {},
    show=("reward", "gold", "kl", "entropy", "ptx_loss"),
    on_samples=_describe(ctx, cfg),
    flops=lambda metrics: model_flops(nets, cfg, ctx.config.data.max_prompt_length, metrics),
  )
  finish(ctx, stage, run_, cfg.num_iterations, results.Nothing())
