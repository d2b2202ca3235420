"""Which stages of the table a config runs, and which stages each of them starts from. Pure functions of the config.

Called by the stages, pipeline.py and launch/. Imports no JAX, because a plan needs no devices.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from instructjax.core.config import Config, OptimConfig, PPOConfig
from instructjax.core.stages import (
  RANKED,
  REFERENCE,
  RL_STAGES,
  ROLES,
  STAGES,
  selector,
  stage_of_kind,
  stage_of_policy,
)


def value(config: Config, name: str) -> Any:
  """The value of a config field by its dotted name, as `ppo.batch_size`."""
  result: Any = config
  for part in name.split("."):
    result = getattr(result, part)
  return result


def given(config: Config, stage: str) -> str:
  """The path of the weights that the config gives in place of what `stage` would train; '' if it gives none."""
  field = STAGES[stage].given_by
  return value(config, field) if field else ""


def is_replaced(config: Config, stage: str) -> bool:
  """Whether given weights stand for a stage, which then does not run. `rm` runs all the same, to measure them."""
  return bool(given(config, stage)) and STAGES[stage].kind != "rm"


def reads(config: Config, stage: str) -> tuple[str, ...]:
  """The kinds of records that a stage reads in this config.

  What would only be measured is done without, if the config names no source of it: a given reward model needs neither
  comparisons nor demonstrations, evaluation needs neither documents nor demonstrations, and PPO without the pretraining
  term needs no documents.
  """
  row = STAGES[stage]
  optional: tuple[str, ...] = ()
  if row.kind == "rm" and given(config, stage):
    optional = ("comparisons", "demonstrations")
  if row.is_rl and not variant(config, stage).gamma:
    optional = ("documents",)
  if row.kind == "evaluate":
    optional = ("documents", "demonstrations")
  return tuple(kind for kind in row.reads if kind not in optional or getattr(config.data, kind))


def collects(config: Config) -> bool:
  """Whether the run collects comparisons from simulated labelers (stage `collect`) instead of reading a user's."""
  return config.data.are_collected


def collected(config: Config, stage: str) -> tuple[str, ...]:
  """The stages whose rankings a reward model's stage reads, by round; the config's source is beside them, if any."""
  return tuple(name for name in parents(config, stage) if STAGES[name].kind == "collect")


def contents(config: Config, stage: str) -> tuple[str, ...]:
  """What a stage reads, by the names under which `Contents` knows it: kinds, and collecting stages of later rounds."""
  kinds = reads(config, stage)
  later = [name for name in collected(config, stage) if STAGES[name].round > 1]
  return (*kinds, *(later if "comparisons" in kinds else ()))


def kinds_read(config: Config, stages: Collection[str]) -> list[str]:
  """Kinds of records that these stages read from a source that the config names, in order of name.

  Comparisons that the run collects itself have no such source.
  """
  kinds = {kind for stage in stages for kind in reads(config, stage)}
  return sorted(kinds - ({"comparisons"} if collects(config) else set()))


def base_stage(config: Config, role: str) -> str:
  """The stage that trains the base of a role, `policy` or `reward`.

  One stage serves both if the two networks and the weights given for them are the same.
  """
  shared = config.same_network and config.reward_model.weights == config.model.weights
  return "pretrain" if role == "policy" or shared else "reward_pretrain"


def bases(config: Config) -> tuple[str, ...]:
  """The stages that train the bases of policy and reward model; one stage if they share a base."""
  return tuple(dict.fromkeys(base_stage(config, role) for role in ("policy", "reward")))


def frozen_stage(config: Config, stage: str) -> str:
  """The stage whose weights are the frozen base where adapters are trained: that of what `stage` trains.

  A finished network that is given in place of a stage is a base itself.
  """
  row = STAGES[stage]
  if row.is_base or given(config, stage):
    return stage
  if row.is_rl:
    return frozen_stage(config, REFERENCE)
  if row.kind == "rm":
    is_from_sft = config.rm.start_from == "sft"
    return frozen_stage(config, "sft") if is_from_sft else base_stage(config, "reward")
  return base_stage(config, "policy")


def frozen_stages(config: Config) -> tuple[str, str]:
  """The stages whose weights are the frozen bases of policy and reward model; the same twice if they share one."""
  return frozen_stage(config, REFERENCE), frozen_stage(config, stage_of_kind("rm").name)


def stage_of(config: Config, policy: str) -> str:
  """The stage that trains a policy; for the larger base, `pretrain` if policy and reward model share a base."""
  stage = stage_of_policy(policy).name
  return base_stage(config, "reward") if stage == "reward_pretrain" else stage


def part_rows(config: Config, stage: str) -> dict[str, tuple[int, str]]:
  """Rows of the parts that a stage's batches are computed in: settings that divide the batch -> (rows, how to mend).

  The mesh must divide them like the batch. Where it does not, the rows of a part are whole on every device, and all
  devices compute the same.
  """
  row, found = STAGES[stage], {}
  for name in row.batches:
    block, _, field = name.partition(".")
    cfg = getattr(config, block)
    if field == "batch_size" and not (row.is_rl and block == row.block) and cfg.microbatches > 1:
      rows = cfg.batch_size // cfg.microbatches
      found[f"{block}.batch_size / microbatches"] = (
        rows,
        f"set fewer --config.{block}.microbatches",
      )
  return found | (_rl_rows(variant(config, stage), row.block) if row.is_rl else {})


def _rl_rows(cfg: PPOConfig, block: str) -> dict[str, tuple[int, str]]:
  """`part_rows` of an RL stage's own batch."""
  found, flag = {}, f"--config.{block}"
  minibatch = cfg.batch_size // cfg.num_minibatches
  what, recipe = f"{block}.batch_size / num_minibatches", "which changes the recipe"
  if not cfg.packed_rows:  # which divide the minibatch, and are among the stage's batches
    if cfg.score_microbatches > 1:
      rows = cfg.batch_size // cfg.score_microbatches
      mend = f"set fewer {flag}.score_microbatches"
      found[f"{block}.batch_size / score_microbatches"] = (rows, mend)
    found[what] = (minibatch, f"set fewer {flag}.num_minibatches, {recipe}")
    if cfg.microbatches > 1:
      mend = f"set fewer {flag}.microbatches"
      found[f"{what} / microbatches"] = (minibatch // cfg.microbatches, mend)
  if cfg.gamma:
    rows = minibatch * cfg.ptx_rows // cfg.ptx_microbatches
    mend = f"set fewer {flag}.ptx_microbatches"
    if cfg.ptx_microbatches == 1:
      mend = f"set more {flag}.ptx_rows, {recipe}"
    found[f"{what} * ptx_rows / ptx_microbatches"] = (rows, mend)
  return found


def rl_stages(config: Config) -> list[str]:
  """The RL stages that the config asks for. Others that lie in the workdir from earlier runs are not judged."""
  asked = {config.stage, *config.evaluate.compare}
  if config.collect.rounds > 1:
    asked.add(RANKED)
  asks = lambda field: field is not None and value(config, field)
  return [
    name
    for name in RL_STAGES
    if name in asked
    or asks(STAGES[name].asked_by)
    or 1 < STAGES[name].round <= config.collect.rounds
  ]


def reward_model(stage: str) -> str:
  """The stage of the reward model that an RL stage is trained against."""
  return next(parent for parent in STAGES[stage].parents if STAGES[parent].kind == "rm")


def variant(config: Config, stage: str) -> PPOConfig:
  """The PPO settings of an RL stage, which its row in the table changes.

  In the paper's terms, `ppo` is gamma = 0 (sec 3.5); `ppo_beta0` has no KL penalty either (E.7). `rloo` and `grpo` are
  gamma = 0 too, without a value network.
  """
  row = STAGES[stage]
  taken = {field: value(config, name) for field, name in row.takes.items()}
  return dataclasses.replace(config.ppo, **row.holds, **taken)


def kept_steps(config: Config, stage: str) -> tuple[int, ...]:
  """The iterations of an RL stage whose checkpoints stay, for evaluation to measure: `evaluate.checkpoints` of them.

  They lie evenly between the start and the end, without these two. A short run has fewer iterations than are asked for;
  then they are all of them.
  """
  last = variant(config, stage).num_iterations
  count = min(config.evaluate.checkpoints, last - 1)
  return tuple(round(i * last / (count + 1)) for i in range(1, count + 1))


def blocks(config: Config, stage: str) -> dict[str, Any]:
  """The settings that a stage's result depends on, besides the seed, the data and the stages that it starts from.

  Returns:
    name -> config block, or a part of one. The stage's own stands under `block` of its row.
  """
  row, data = STAGES[stage], config.data
  own: Any = variant(config, stage) if row.is_rl else getattr(config, row.block)
  result: dict[str, Any] = {}
  if row.is_base:
    read = {"validation_fraction": data.validation_fraction, "on_bad_record": data.on_bad_record}
    result = {"model": getattr(config, ROLES[row.require_role()].block), "documents": read}
  elif row.kind == "sft":
    result = {"model": config.model, "data": data}
  elif row.kind == "collect":
    result = {"data": data}
  elif row.kind == "rm":
    result = {"model": config.reward_model, "data": data}
  elif row.kind == "select":
    own = [own.num_prompts, own.temperature]
  elif row.is_rl:
    networks = {"model": config.model, "reward_model": config.reward_model}
    result = {**networks, "data": data, "rollout": config.rollout}
  elif row.kind == "best_of_n":
    result = {"data": data}
    # Of an RL policy, `policies.load` takes the averaged weights or the last ones.
    if STAGES[stage_of(config, own.policy)].is_rl:
      result["evaluate"] = {"weights": "ema" if judges_average(config) else "raw"}
  if trains_adapter(config, stage):
    result["adapter"] = config.adapter
  return {row.block: own, **result}


def judges_average(config: Config) -> bool:
  """Whether evaluation judges the running average of an RL policy's weights; with a decay of 0 no average is kept."""
  return config.evaluate.weights == "ema" and config.ppo.ema_decay > 0


def trains_adapter(config: Config, stage: str) -> bool:
  """Whether a stage trains an adapter in place of all weights."""
  row = STAGES[stage]
  return is_adapted(config) and row.role is not None and not row.is_base


def is_adapted(config: Config) -> bool:
  """Whether the stages after pretraining train adapters in place of all weights."""
  return config.adapter.rank > 0


def optim(config: Config, cfg: OptimConfig) -> OptimConfig:
  """The optimiser of a stage after pretraining: adapters have a higher learning rate."""
  if not is_adapted(config):
    return cfg
  rate = cfg.learning_rate * config.adapter.rate_factor
  return dataclasses.replace(cfg, learning_rate=rate)


def has_baseline(config: Config) -> bool:
  """Whether evaluation judges an SFT baseline.

  Where PPO's start is given, a baseline is not trained for the comparison alone: then there is one if it is given too.
  """
  return bool(given(config, "sft")) or not given(config, REFERENCE)


def parents(config: Config, stage: str) -> tuple[str, ...]:
  """The stages that `stage` starts from in this config, out of those that the table allows."""
  row = STAGES[stage]
  if is_replaced(config, stage):
    return ()
  absent = set(RL_STAGES) - set(rl_stages(config))
  absent |= {name for name, other in STAGES.items() if other.round > config.collect.rounds}
  if not collects(config):
    absent.add(stage_of_kind("collect").name)
  if row.kind == "best_of_n":
    speaker = stage_of(config, config.best_of_n.policy)
    chosen_anew = None if given(config, speaker) else selector(speaker)
    return tuple(dict.fromkeys((chosen_anew or speaker, "rm")))
  # The table allows three networks for it to start from; rm.start_from picks one. A given reward model has no start.
  if row.kind == "rm":
    start = "sft" if config.rm.start_from == "sft" else base_stage(config, "reward")
    absent |= {"pretrain", "reward_pretrain", "sft"} - (
      {start} if not given(config, stage) else set()
    )
  # The baseline is the epoch that is selected. A given one has no epochs, and is judged as it is.
  if row.kind == "evaluate":
    judged = ("sft" if given(config, "sft") else selector("sft")) if has_baseline(config) else None
    absent |= {"sft", selector("sft")} - {judged}
  return tuple(parent for parent in row.parents if parent not in absent)


def origin(config: Config, stage: str) -> str:
  """The path of the given weights that a stage's network descends from; '' if the run has trained it from scratch."""
  path = given(config, stage)
  if path:
    return path
  # The first parent with a network is the one whose weights the stage goes on with.
  trained = [parent for parent in parents(config, stage) if STAGES[parent].role]
  return origin(config, trained[0]) if trained else ""


def line(config: Config, stage: str) -> list[str]:
  """A stage and all stages that it comes from, in the order they run; also those for which given weights stand."""
  needed = [stage]
  for name in needed:  # the list grows meanwhile, until it holds all ancestors
    needed += [parent for parent in parents(config, name) if parent not in needed]
  return [name for name in STAGES if name in needed]


def plan(config: Config) -> list[str]:
  """The stages to run for `config.stage`, in order: itself and all that it starts from.

  Stages for which given weights stand are left out. For an RL stage the plan goes on to `evaluate`.
  """
  last = "evaluate" if STAGES[config.stage].is_rl else config.stage
  return [stage for stage in line(config, last) if not is_replaced(config, stage)]
