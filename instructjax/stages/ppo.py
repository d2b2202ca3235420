"""The RL stages (`ppo`, `ppo_ptx` and others): weights, data, shardings and the outer loop around rl/step.py."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax.core import results, terminal
from instructjax.core import rewards as reward_lists
from instructjax.core.config import Config, OptimConfig, PPOConfig
from instructjax.core.stages import REFERENCE
from instructjax.core.structs import Params, PPOState, Samples, tree_of
from instructjax.data import batching
from instructjax.models import adapters, flops, heads, transformer
from instructjax.parallel import agreement, distributed, sharding
from instructjax.rl import split
from instructjax.rl import step as ppo_step
from instructjax.stages import (
  answers,
  bases,
  ensembles,
  host_rewards,
  judging,
  lineage,
  policies,
  reward_functions,
  text_scorers,
)
from instructjax.stages.context import (
  Context,
  finish,
  is_finished,
  make_model,
  stage_run,
  tell_adapter,
)
from instructjax.stages.text_rows import document_batches, validation_rows
from instructjax.train import loop, supervised, weight_hash
from instructjax.train.metrics import read_metrics
from instructjax.train.optim import make_optimizer, require_steps

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
  policy_tx, value_tx = _optimizers(config, cfg)
  return ppo_step.Nets(
    policy=make_model(config, mesh, "policy", vocab_size),
    scalar=make_model(config, mesh, "reward", vocab_size),
    policy_tx=policy_tx,
    value_tx=value_tx,
    stop_ids=stop_ids,
    max_response_length=config.data.max_response_length,
    slots=config.rollout.slots,
    shares_base=len(set(lineage.frozen_stages(config))) == 1,
    value_on_policy=cfg.value_init == "policy",
  )


def _optimizers(config: Config, cfg: PPOConfig):
  """Those of the policy and of the value network; None where there is no value network."""

  # The schedule counts updates, of which an iteration makes one for each minibatch of each epoch.
  def unclipped(optim: OptimConfig, name: str, iterations: int):
    updates = iterations * cfg.num_epochs * cfg.num_minibatches
    require_steps(optim, updates, f"config.ppo.{name}")
    return make_optimizer(
      dataclasses.replace(lineage.optim(config, optim), clip_norm=None), updates
    )

  # While only the value network learns, the policy's schedule stands still.
  policy_tx = unclipped(cfg.policy_optim, "policy_optim", cfg.num_iterations - cfg.value_warmup)
  if not cfg.has_value_network:
    return policy_tx, None
  return policy_tx, unclipped(cfg.value_optim, "value_optim", cfg.num_iterations)


def state_shardings(mesh: Mesh, nets: ppo_step.Nets, cfg: PPOConfig) -> PPOState:
  """The sharding of a PPOState: optimiser states and the average are sharded like the weights that they belong to."""
  replicated = sharding.replicated(mesh)
  policy_shardings, policy_shapes = adapters.trained_shardings(mesh, nets.policy)
  value_shardings = value_opt_state = None
  if nets.value_tx is not None:
    value_shardings, value_shapes = adapters.trained_shardings(mesh, nets.scalar)
    value_opt_state = sharding.opt_state_shardings(
      nets.value_tx, value_shapes, value_shardings, mesh
    )
  return tree_of(
    PPOState,
    step=replicated,
    params=policy_shardings,
    opt_state=sharding.opt_state_shardings(nets.policy_tx, policy_shapes, policy_shardings, mesh),
    value_params=value_shardings,
    value_opt_state=value_opt_state,
    ema_params=policy_shardings if cfg.ema_decay else None,
    kl_coef=replicated,
    key=replicated,
  )


def initial_state(
  mesh: Mesh,
  cfg: PPOConfig,
  nets: ppo_step.Nets,
  params: Params,
  value_params: Params | None,
  key: jax.Array,
) -> tuple[PPOState, PPOState]:
  """Makes the PPOState before the first iteration; returns (state, its shardings).

  The policy starts as `params`, and the value network, if there is one, as `value_params`: see `initial_value`.
  """
  shardings = state_shardings(mesh, nets, cfg)

  def create(params, value_params, key):
    # Copies, because the step donates its state and the originals go on as reference and reward model.
    params, value_params = jax.tree.map(jnp.copy, (params, value_params))
    return ppo_step.create_state(params, value_params, nets, cfg, key)

  return jax.jit(create, out_shardings=shardings)(params, value_params, key), shardings


def initial_value(
  mesh: Mesh, cfg: PPOConfig, nets: ppo_step.Nets, params: Params, reward_params: Params
) -> Params | None:
  """What the value network starts from: the reward model (details item 20), or the policy's trunk under a new head.

  The new head is of zeros, as in N: its first values are 0, the reward model's mean over demonstrations (C.2). None if
  there is no value network.
  """
  if not cfg.has_value_network:
    return None
  if cfg.value_init == "reward_model":
    return reward_params
  shardings, shapes = adapters.trained_shardings(mesh, nets.scalar)
  head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["head"])
  return jax.device_put(heads.scalar_params_from_lm(params, shapes | {"head": head}), shardings)


def freeze(
  nets: ppo_step.Nets,
  shardings: PPOState,
  ref_params: Params,
  reward_params: Params,
  ensemble_params: Params | None = None,
  base: tuple[Params, ...] = (),
  scalar_base: tuple[Params, ...] = (),
) -> ppo_step.Frozen:
  """The reference and the reward model as the step reads them: cast once to the dtype that they run in.

  In float32 there is nothing to cast, and the weights are taken as they are, without a copy. So are those of
  `ensembles.load`, which come in their dtype. Adapters are small and stay float32; their base comes from
  `bases.of_networks`, and that of the reward model only if it is another one.
  """
  if base:
    return ppo_step.Frozen(ref_params, reward_params, ensemble_params, base[0], *scalar_base)

  def frozen(model, params):
    if model.execution.dtype == "float32":
      return params
    places, _ = transformer.param_shardings(sharding.mesh_of(shardings), model)
    cast = functools.partial(transformer.frozen_weights, model)
    return jax.jit(cast, out_shardings=places)(params)

  return ppo_step.Frozen(
    ref_params=frozen(nets.policy, ref_params),
    reward_params=frozen(nets.scalar, reward_params),
    ensemble_params=ensemble_params,
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
      repeats=cfg.samples_per_prompt,
    )
  }
  if cfg.gamma > 0:
    rows = cfg.batch_size * cfg.ptx_rows
    parts["pretrain"] = document_batches(
      ctx, "train", length=cfg.ptx_length, batch_size=rows, seed=seed
    )
  return batching.ZippedBatches(parts)


def _describe(ctx: Context, watch: Callable[..., None]):
  """Makes the callback on an iteration's samples, which returns (extra metrics, rows of the sample table).

  If the prompts are a simulated task's, the gold score is among the metrics. It is only logged; training never sees it.

  Args:
    ctx: the run.
    watch: stops the stage for a reward that never varies; see `host_rewards.watch_constants`.
  """
  simulation = judging.simulation(ctx)
  prompt_length = ctx.config.data.max_prompt_length

  def describe(samples: Samples, step: int):
    rollout = samples.rollout
    # On every process, before all but the first leave: gathering takes part of all.
    token_BL, is_token_BL, score_B, kl_B, rewards = sharding.to_host(
      (rollout.token_BL, rollout.is_token_BL, samples.score_B, samples.kl_B, samples.rewards)
    )
    text = np.where(is_token_BL, token_BL, ctx.tokenizer.pad_id)
    decode = lambda rows: answers.decode(ctx.tokenizer, rows)
    texts = lambda end: (decode(text[:end, :prompt_length]), decode(text[:end, prompt_length:]))
    watch(step, {"rm": score_B, **rewards}, lambda: texts(1))
    if simulation is None and jax.process_index() != 0:
      return {}, ()
    prompts, responses = texts(None)
    extra = {}
    # On every process: a gold score may ask the base, which is on all devices.
    if simulation is not None:
      extra["gold"] = float(np.mean(simulation.gold_score(prompts, responses)))
    if jax.process_index() != 0:
      return {}, ()
    # Named as in the metrics: a function of the user's may be called `score` or `answer`.
    named = {f"rewards/{name}": value_B for name, value_B in rewards.items()}
    columns = {"score": score_B, **named, "kl": kl_B}
    rows = [
      {"prompt": prompt, "answer": answer, **{key: float(x[i]) for key, x in columns.items()}}
      for i, (prompt, answer) in enumerate(zip(prompts, responses))
      if i < ctx.config.log.samples
    ]
    return extra, rows

  return describe


def _held_out_loss(ctx: Context, nets: ppo_step.Nets, base: tuple[Params, ...]):
  """Makes the evaluation (state, step) -> loss on held-out pretraining text, the alignment tax along the training.

  It reads the weights that the stage `evaluate` will judge, the average or the policy itself.
  """
  loss = supervised.make_lm_evaluation(nets.policy, ctx.mesh, ctx.config.pretrain.microbatches)
  rows = validation_rows(ctx, ctx.config.pretrain.length)
  averaged = lineage.judges_average(ctx.config)

  def evaluate(state: PPOState, step: int) -> dict[str, float]:
    params = state.ema_params if averaged else state.params
    return {"pretrain_loss": loss(adapters.joined(nets.policy, base, params), rows)}

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
  # and rewards, of one reward model or of an ensemble.
  networks = 1 + len(cfg.ensemble) + cfg.has_value_network
  scored = (2 + (cfg.behaviour_logprob == "rescore")) * policy + networks * scalar
  updated = (
    flops.training(nets.policy, read, columns, sampled)
    + cfg.has_value_network * flops.training(nets.scalar, read, columns)
    + flops.training(nets.policy, text, cfg.ptx_length)
  )
  return scored + cfg.num_epochs * updated


def _settings(ctx: Context, stage: str) -> tuple[PPOConfig, ppo_step.Nets]:
  cfg, given = lineage.variant(ctx.config, stage), ctx.given.get("rm")
  nets = make_nets(ctx.config, ctx.mesh, cfg, ctx.tokenizer.vocab_size, ctx.tokenizer.stop_ids)
  members = ensembles.open_all(ctx.config, cfg)
  nets = dataclasses.replace(
    nets,
    score_skips=given.score_skips if given else None,
    ensemble_skips=tuple(one.score_skips for one in members),
    shares_base=nets.shares_base or (lineage.is_adapted(ctx.config) and bases.is_shared(ctx)),
  )
  return cfg, nets


def _functions(cfg: PPOConfig) -> tuple[reward_functions.Function, ...]:
  """The rewards that are functions of the user's or rules about text, imported.

  Raises:
    UserError: one cannot be imported or called.
  """
  listed = reward_lists.parse(cfg.rewards, "config.ppo.rewards")
  own = [reward for reward in reward_lists.on_host(listed) if reward.kind != "model"]
  return tuple(map(reward_functions.load, own))


def check_settings(config: Config, stage: str):
  """Checks the stage's settings, which its row of the table may have changed.

  Raises:
    UserError: a rule is broken, a warmup is as long as the stage, a reward function cannot be imported or called, a
      further reward model is none or has another shape.
  """
  cfg = lineage.variant(config, stage)
  cfg.validate("config.ppo")
  _optimizers(config, cfg)
  _functions(cfg)
  ensembles.open_all(config, cfg)
  text_scorers.open_all(cfg)


def check(ctx: Context, stage: str):
  """Checks that all processes have the same rewards, and tries each reward function on two rows.

  Raises:
    UserError: they differ, a function raises an exception or does not return a finite number for each row, or a further
      reward model has another tokenizer.
  """
  cfg = lineage.variant(ctx.config, stage)
  functions, members = _functions(cfg), ensembles.open_all(ctx.config, cfg)
  ensembles.require_tokenizer(members, ctx.tokenizer)
  facts = {
    f"the source of {one.reward.spelling}": f"{one.checksum}\t{', '.join(one.files)}"
    for one in functions
  }
  facts |= ensembles.fingerprints(ctx, members)
  facts |= text_scorers.fingerprints(ctx, text_scorers.open_all(cfg))
  if facts:
    agreement.require_same(distributed.team(), f"rewards of {stage}", facts)
  if functions and jax.process_index() == 0:
    host_rewards.try_out(functions, ctx.tokenizer, ctx.data.prompt_tokens("train")[:2])


def _make_step(
  ctx: Context,
  stage: str,
  nets: ppo_step.Nets,
  cfg: PPOConfig,
  shardings: PPOState,
  functions: Sequence[reward_functions.Function],
) -> Callable:
  """The step as one program, or split around the rewards that the host computes; says which."""
  tell = terminal.say if jax.process_index() == 0 else lambda line: None
  if not functions:
    tell(f"{stage}: an iteration is one XLA program; its reward: {', '.join(cfg.rewards)}")
    return ppo_step.make_train_step(nets, cfg, shardings)
  names = ", ".join(one.reward.spelling for one in functions)
  tell(
    f"{stage}: an iteration is split in two after its rollout, since {names} needs the answers' text; the networks"
    " score meanwhile"
  )
  on_host = host_rewards.make(stage, ctx.tokenizer, functions)
  return split.make_split_step(nets, cfg, shardings, on_host)


def _watch(ctx: Context, stage: str, cfg: PPOConfig):
  listed = reward_lists.parse(cfg.rewards, "config.ppo.rewards")
  records = read_metrics(ctx.directory(stage))
  return host_rewards.watch_constants(stage, listed, cfg.constant_iterations, records)


def run(ctx: Context, stage: str):
  """Trains one RL policy. It starts from `ppo_init`, its frozen reference; the frozen `rm` of its round is the reward.

  Raises:
    StageStopped: a metric is not finite, or the KL is above `ppo.max_kl`.
    UserError: the stage was made with other settings, or files cannot be read or written.
    Preempted: the run was told to stop.
  """
  cfg, nets = _settings(ctx, stage)
  run_ = stage_run(ctx, stage)
  functions, members = _functions(cfg), ensembles.open_all(ctx.config, cfg)
  scorers = text_scorers.open_all(cfg)
  made_with = {
    **run_.fingerprint,
    **ensembles.fingerprints(ctx, members),
    **text_scorers.fingerprints(ctx, scorers),
  }
  # What is finished was made by these functions. What is not may go on with a mended one, and says so.
  run_ = host_rewards.with_sources(run_, made_with, functions)
  if is_finished(run_):
    return
  base, scalar_base = bases.of_networks(ctx, stage)
  given = {
    "reference": policies.load(ctx, REFERENCE, policies.load_trained_step),
    "reward_model": policies.load_reward(
      ctx, policies.load_trained_step, lineage.reward_model(stage)
    ),
  }
  value_params = initial_value(ctx.mesh, cfg, nets, *given.values())
  state, shardings = initial_state(
    ctx.mesh, cfg, nets, given["reference"], value_params, key=ctx.key(stage)
  )
  del value_params
  if cfg.value_warmup and jax.process_index() == 0:
    terminal.say(f"{stage} iterations 1 to {cfg.value_warmup}: only the value network learns")
  # A fingerprint holds how the frozen networks were made; a checkpoint also holds a hash of the weights themselves, so
  # that a run never resumes against others. done.json does not hold it: a finished stage is then recognised without
  # loading any weights.
  reference = {name: weight_hash.tree_fingerprint(params) for name, params in given.items()}
  frozen = freeze(
    nets,
    shardings,
    given["reference"],
    given["reward_model"],
    ensembles.load(ctx, stage, members),
    base,
    scalar_base,
  )
  functions += tuple(text_scorers.load(ctx, stage, one, cfg) for one in scorers)
  tell_adapter(ctx, stage, "policy", lineage.optim(ctx.config, cfg.policy_optim))
  # Where `frozen` holds cast copies, this frees the float32 originals before training starts.
  del given
  loop.fit(
    dataclasses.replace(run_, fingerprint={**made_with, **reference}, advice=_ADVICE),
    state,
    _make_step(ctx, stage, nets, cfg, shardings, functions),
    _batches(ctx, cfg, stage),
    num_steps=cfg.num_iterations,
    constants=(frozen,),
    place=lambda batch: sharding.place_batch(ctx.mesh, batch),
    evaluate=_held_out_loss(ctx, nets, base)
    if "documents" in lineage.reads(ctx.config, stage)
    else None,
    evaluate_steps=loop.Steps(every=ctx.config.evaluate.pretrain_every, also=(1,)),
    limits={"kl": cfg.max_kl} if cfg.max_kl else {},
    show=("reward", "rewards/total", "gold", "kl", "entropy", "ptx_loss"),
    on_samples=_describe(ctx, _watch(ctx, stage, cfg)),
    flops=lambda metrics: model_flops(nets, cfg, ctx.config.data.max_prompt_length, metrics),
  )
  finish(ctx, stage, run_, cfg.num_iterations, results.Nothing())
