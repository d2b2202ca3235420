"""Which stages of the table a config runs, and which stages each of them starts from. Pure functions of the config.

Called by the stages, pipeline.py and launch/. Imports no JAX, because a plan needs no devices.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from instructjax.core.config import Config, OptimConfig, PPOConfig
from instructjax.core.stages import RL_STAGES, ROLES, STAGES, stage_of_kind, stage_of_policy


def value(config: Config, name: str) -> Any:
  """The value of a config field by its dotted name, as `ppo.batch_size`."""
  result: Any = config
  for part in name.split("."):
    result = getattr(result, part)
  return result


def given(config: Config, stage: str) -> str:
  """The path of the weights that the config gives in place of a base which `stage` would train; '' if it gives none."""
  row = STAGES[stage]
  # Any other stage's weights are this run's own.
  return getattr(config, ROLES[row.require_role()].block).weights if row.is_base else ""


def collects(config: Config) -> bool:
  """Whether the run collects comparisons from simulated labelers (stage `collect`) instead of reading a user's."""
  return config.data.comparisons == "demo:"


def kinds_read(config: Config, stages: Collection[str]) -> list[str]:
  """Kinds of records that these stages read from a source that the config names, in order of name.

  Comparisons that the run collects itself have no such source.
  """
  kinds = {kind for stage in stages for kind in STAGES[stage].reads}
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


def stage_of(config: Config, policy: str) -> str:
  """The stage that trains a policy; for the larger base, `pretrain` if policy and reward model share a base."""
  stage = stage_of_policy(policy).name
  return base_stage(config, "reward") if stage == "reward_pretrain" else stage


def rl_stages(config: Config) -> list[str]:
  """The RL stages that the config asks for. Others that lie in the workdir from earlier runs are not judged."""
  asked = {config.stage, *config.evaluate.compare}
  asks = lambda field: field is not None and value(config, field)
  return [name for name in RL_STAGES if name in asked or asks(STAGES[name].asked_by)]


def variant(config: Config, stage: str) -> PPOConfig:
  """The PPO settings of an RL stage, which its row in the table changes.

  In the paper's terms, `ppo` is gamma = 0 (sec 3.5); `ppo_beta0` has no KL penalty either (E.7).
  """
  row = STAGES[stage]
  taken = {field: value(config, name) for field, name in row.takes.items()}
  return dataclasses.replace(config.ppo, **row.holds, **taken)


def is_adapted(config: Config) -> bool:
  """Whether the stages after pretraining train adapters in place of all weights."""
  return config.adapter.rank > 0


def optim(config: Config, cfg: OptimConfig) -> OptimConfig:
  """The optimiser of a stage after pretraining: adapters have a higher learning rate."""
  if not is_adapted(config):
    return cfg
  rate = cfg.learning_rate * config.adapter.rate_factor
  return dataclasses.replace(cfg, learning_rate=rate)


def parents(config: Config, stage: str) -> tuple[str, ...]:
  """The stages that `stage` starts from in this config, out of those that the table allows."""
  row = STAGES[stage]
  absent = set(RL_STAGES) - set(rl_stages(config))
  if not collects(config):
    absent.add(stage_of_kind("collect").name)
  # The table allows three networks for it to start from; rm.start_from picks one.
  if row.kind == "rm":
    start = "sft" if config.rm.start_from == "sft" else base_stage(config, "reward")
    absent |= {"pretrain", "reward_pretrain", "sft"} - {start}
  return tuple(parent for parent in row.parents if parent not in absent)


def line(config: Config, stage: str) -> list[str]:
  """A stage and all stages that it comes from, in the order they run; also bases whose weights the config gives."""
  needed = [stage]
  for name in needed:  # the list grows meanwhile, until it holds all ancestors
    needed += [parent for parent in parents(config, name) if parent not in needed]
  return [name for name in STAGES if name in needed]


def plan(config: Config) -> list[str]:
  """The stages to run for `config.stage`, in order: itself and all that it starts from.

  A base is left out if the config gives its weights. For an RL stage the plan goes on to `evaluate`.
  """
  last = "evaluate" if STAGES[config.stage].is_rl else config.stage
  return [stage for stage in line(config, last) if not given(config, stage)]
