"""The RL stages `ppo`, `ppo_ptx` and `ppo_beta0`: weights, data, shardings and the outer loop around rl/step.py."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax.core import results
from instructjax.core.config import Config, PPOConfig
from instructjax.core.stages import REFERENCE
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
  config: Config, mesh: Mesh, cfg: PPOConfig, vocab_size: int, stop_ids: tuple[int, ...]
) -> ppo_step.Nets:
  """The networks and optimisers of an RL stage.

  The optimisers do not clip. The step clips each term of the gradient on its own, so that clipping cannot change the
  weight of one term against the other.

  Args:
    config: the run's config.
    mesh: its devices.
    cfg: the PPO settings of the stage, see `lineage.variant`.
    vocab_size, stop_ids: those of the tokenizer.
  Raises:
    UserError: the warmup is as long as the stage.
  """
  policy_tx, value_tx = _optimizers(cfg)
  return ppo_step.Nets(
    policy=make_model(config, mesh, "policy", vocab_size),
    scalar=make_model(config, mesh, "reward", vocab_size),
    policy_tx=policy_tx,
    value_tx=value_tx,
    stop_ids=stop_ids,
    max_response_length=config.data.max_response_length,
    slots=config.rollout.slots,
  )


def _optimizers(cfg: PPOConfig):
  """Those of the policy and of the value network."""
  # The schedule counts updates, of which an iteration makes one for each minibatch of each epoch.
  updates = cfg.num_iterations * cfg.num_epochs * cfg.num_minibatches
  unclipped = lambda optim: make_optimizer(dataclasses.replace(optim, clip_norm=None), updates)
  return unclipped(cfg.policy_optim), unclipped(cfg.value_optim)


def state_shardings(mesh: Mesh, nets: ppo_step.Nets, cfg: PPOConfig) -> PPOState:
  """The sharding of a PPOState: optimiser states and the average are sharded like the weights that they belong to."""
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
  """Makes the PPOState before the first iteration; returns (state, its shardings).

  The policy starts as `params`, and the value network as the reward model (details item 20).
  """
  shardings = state_shardings(mesh, nets, cfg)

  def create(params, value_params, key):
    # Copies, because the step donates its state and the originals go on as reference and reward model.
    params, value_params = jax.tree.map(jnp.copy, (params, value_params))
    return ppo_step.create_state(params, value_params, nets, cfg, key)

  return jax.jit(create, out_shardings=shardings)(params, reward_params, key), shardings


def freeze(
  nets: ppo_step.Nets, shardings: PPOState, ref_params: Params, reward_params: Params
) -> ppo_step.Frozen:
  """The reference and the reward model as the step reads them: cast once to the dtype that they run in.

  In float32 there is nothing to cast, and the weights are taken as they are, without a copy.
  """

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
  """Batches of {'prompts'} and, for PPO-ptx, of pretraining rows, which are advanced and saved together."""
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
  return batching.ZippedBatches(parts)


def _describe(ctx: Context):
  """Makes the callback on an iteration's samples, which returns (extra metrics, rows of the sample table).

  If the prompts are the demo's, the gold score is among the metrics. It is only logged; training never sees it.
  """
  simulation = sources.simulation(ctx.config.data.prompts)
  prompt_length = ctx.config.data.max_prompt_length

  def describe(samples: Samples, step: int):
    rollout = samples.rollout
    # On every process, before all but the first leave: gathering takes part of all.
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
  """Makes the evaluation (state, step) -> loss on held-out pretraining text, the alignment tax along the training.

  It reads the weights that the stage `evaluate` will judge, the average or the policy itself.
  """
  loss = supervised.make_lm_evaluation(nets.policy, ctx.mesh, ctx.config.pretrain.microbatches)
  rows = validation_rows(ctx, ctx.config.pretrain.length)
  averaged = policies.judges_average(ctx)

  def evaluate(state: PPOState, step: int) -> dict[str, float]:
    return {"pretrain_loss": loss(state.ema_params if averaged else state.params, rows)}

  return evaluate


def model_flops(
  nets: ppo_step.Nets, cfg: PPOConfig, prompt_length: int, metrics: Mapping[str, float]
) -> float:
  """FLOPs of an iteration by the models' definition: without padding and without anything computed twice.

  Args:
    nets, cfg: networks and settings of the stage.
    prompt_length: columns of a prompt.
    metrics: the iteration's metrics, which say how long its prompts and answers are.
  """
  sampled = metrics["tokens"]
  read = sampled + cfg.batch_size * metrics["prompt_length"]
  columns = prompt_length + nets.max_response_length
  policy = flops.forward(nets.policy, read, columns, sampled)
  scalar = flops.forward(nets.scalar, read, columns)
  text = cfg.batch_size * cfg.ptx_rows * cfg.ptx_length if cfg.gamma > 0 else 0
  # Policy's shape: the rollout, the reference's log-probabilities and, if rescored, the policy's own. Scalar: values
  # and rewards.
  scored = (2 + (cfg.behaviour_logprob == "rescore")) * policy + 2 * scalar
  # A backward pass costs two forward passes, so an update counts three.
  updated = 3 * (policy + scalar + flops.forward(nets.policy, text, cfg.ptx_length))
  return scored + cfg.num_epochs * updated


def _settings(ctx: Context, stage: str) -> tuple[PPOConfig, ppo_step.Nets]:
  cfg, given = lineage.variant(ctx.config, stage), ctx.given.get("rm")
  nets = make_nets(ctx.config, ctx.mesh, cfg, ctx.tokenizer.vocab_size, ctx.tokenizer.stop_ids)
  return cfg, dataclasses.replace(nets, score_skips=given.score_skips if given else None)


def check_settings(config: Config, stage: str):
  """Checks the stage's settings.

  Raises:
    UserError: a warmup is as long as the stage.
  """
  _optimizers(lineage.variant(config, stage))


def run(ctx: Context, stage: str):
  """Trains one RL policy. It starts from `ppo_init`, with a frozen `ppo_init` as reference and a frozen `rm` as reward.

  Raises:
    StageStopped: a metric is not finite, or the KL is above `ppo.max_kl`.
    UserError: the stage was made with other settings, or files cannot be read or written.
    Preempted: the run was told to stop.
  """
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
  given = {"reference": policies.load(ctx, REFERENCE), "reward_model": policies.load_reward(ctx)}
  state, shardings = initial_state(ctx.mesh, cfg, nets, *given.values(), key=ctx.key(stage))
  # A fingerprint holds how the frozen networks were made; a checkpoint also holds a hash of the weights themselves, so
  # that a run never resumes against others. Layers are stacked for the hash, so that it is the same on every platform.
  # done.json does not hold it: a finished stage is then recognised without loading any weights.
  reference = {
    name: checkpoint.tree_fingerprint(stacking.relay(params, stacking.stacked))
    for name, params in given.items()
  }
  frozen = freeze(nets, shardings, *given.values())
  # Where `frozen` holds cast copies, this frees the float32 originals before training starts.
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
    evaluate_steps=loop.Steps(every=ctx.config.evaluate.pretrain_every, also=(1,)),
    limits={"kl": cfg.max_kl} if cfg.max_kl else {},
    show=("reward", "gold", "kl", "entropy", "ptx_loss"),
    on_samples=_describe(ctx),
    flops=lambda metrics: model_flops(nets, cfg, ctx.config.data.max_prompt_length, metrics),
  )
  finish(ctx, stage, run_, cfg.num_iterations, results.Nothing())
