"""The RL stages (`ppo`, `ppo_ptx` and others): weights, data, shardings and the outer loop around rl/step.py."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from instructjax.core import results, terminal
from instructjax.core import rewards as reward_lists
from instructjax.core.config import Config, PPOConfig
from instructjax.core.stages import REFERENCE
from instructjax.core.structs import Params, PPOState, Samples
from instructjax.data import batching
from instructjax.models import adapters, flops
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
  rl_nets,
  text_scorers,
)
from instructjax.stages.context import (
  Context,
  finish,
  is_finished,
  stage_run,
  tell_adapter,
)
from instructjax.stages.text_rows import document_batches, validation_rows
from instructjax.train import loop, supervised, weight_hash
from instructjax.train.metrics import read_metrics

_ADVICE = (
  "if only ppo.max_kl is too low, raise it and run again: the run goes on. Else lower"
  " ppo.policy_optim.learning_rate or raise ppo.beta, for all RL stages alike, in another --workdir"
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
  nets = rl_nets.make_nets(
    ctx.config, ctx.mesh, cfg, ctx.tokenizer.vocab_size, ctx.tokenizer.stop_ids
  )
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
  rl_nets.optimizers(config, cfg)
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
  scorers, team = text_scorers.open_all(cfg), distributed.team()
  ensembles.require_tokenizer(members, ctx.tokenizer)
  if team and (members or scorers):
    ctx.contents.share(team, f"rewards of {stage}", (), [*members, *(one.given for one in scorers)])
  facts = {
    f"the source of {one.reward.spelling}": f"{one.checksum}\t{', '.join(one.files)}"
    for one in functions
  }
  facts |= ensembles.fingerprints(ctx, members)
  facts |= text_scorers.fingerprints(ctx, scorers)
  if facts:
    agreement.require_same(team, f"rewards of {stage}", facts)
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
  value_params = rl_nets.initial_value(ctx.mesh, cfg, nets, *given.values())
  state, shardings = rl_nets.initial_state(
    ctx.mesh, cfg, nets, given["reference"], value_params, key=ctx.key(stage)
  )
  del value_params
  if cfg.value_warmup and jax.process_index() == 0:
    terminal.say(f"{stage} iterations 1 to {cfg.value_warmup}: only the value network learns")
  # A fingerprint holds how the frozen networks were made; a checkpoint also holds a hash of the weights themselves, so
  # that a run never resumes against others. done.json does not hold it: a finished stage is then recognised without
  # loading any weights.
  reference = {name: weight_hash.tree_fingerprint(params) for name, params in given.items()}
  frozen = rl_nets.freeze(
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
  if cfg.share_prompts and not nets.shares_prompts and jax.process_index() == 0:
    why = rl_nets.why_not_shared(ctx.config, cfg, ctx.mesh, nets.policy)
    terminal.say(f"{stage}: each answer keeps a copy of its prompt: {why}")
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
    keep_steps=lineage.kept_steps(ctx.config, stage),
    limits={"kl": cfg.max_kl} if cfg.max_kl else {},
    show=("reward", "rewards/total", "gold", "kl", "entropy", "ptx_loss"),
    on_samples=_describe(ctx, _watch(ctx, stage, cfg)),
    flops=lambda metrics: model_flops(nets, cfg, ctx.config.data.max_prompt_length, metrics),
  )
  finish(ctx, stage, run_, cfg.num_iterations, results.Nothing())
