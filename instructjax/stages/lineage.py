"""What a config makes of the table of stages: which of them run, what each starts from. Pure functions of the config.

Called by the stages, pipeline.py and launch/. Imports no JAX: a plan needs no devices.
"""

import dataclasses
from typing import Any

from instructjax.core.config import Config, PPOConfig
from instructjax.core.stages import RL_STAGES, ROLES, STAGES, stage_of_policy


def value(config: Config, name: str) -> Any:
  """The field of a dotted name, as `ppo.batch_size`."""
  result: Any = config
  for part in name.split("."):
    result = getattr(result, part)
  return result


def given(config: Config, stage: str) -> str:
  """What the config gives in place of a stage that trains a base: a path, or ''."""
  row = STAGES[stage]
  # A base starts from nothing. Any other stage's weights are this run's own.
  return "" if row.parents else getattr(config, ROLES[row.require_role()].block).weights


def collects(config: Config) -> bool:
  """Whether comparisons are collected from simulated labelers (stage `collect`) instead of read."""
  return config.data.comparisons == "demo:"


def base_stage(config: Config, role: str) -> str:
  """Stage that pretrains the base of `policy` or of `reward`; one for both when the networks are the same."""
  shared = config.same_network and config.reward_model.weights == config.model.weights
  return "pretrain" if role == "policy" or shared else "reward_pretrain"


def bases(config: Config) -> tuple[str, ...]:
  """The stages that train bases: one or two."""
  return tuple(dict.fromkeys(base_stage(config, role) for role in ("policy", "reward")))


def stage_of(config: Config, policy: str) -> str:
  """The stage whose weights a policy's name stands for; the larger base may be the policy's own."""
  stage = stage_of_policy(policy).name
  return base_stage(config, "reward") if stage == "reward_pretrain" else stage


def rl_stages(config: Config) -> list[str]:
  """RL stages that the config asks for, to be trained and judged: what else lies in the workdir has no say."""
  asked = {config.stage, *config.evaluate.compare}
  asked |= {"ppo_beta0"} if config.evaluate.overoptimization else set()
  return [name for name in RL_STAGES if name in asked]


def variant(config: Config, stage: str) -> PPOConfig:
  """The PPO block as an RL stage runs it: `ppo` is gamma = 0 (sec 3.5), `ppo_beta0` has no KL penalty either."""
  row = STAGES[stage]
  taken = {field: value(config, name) for field, name in row.takes.items()}
  return dataclasses.replace(config.ppo, **row.holds, **taken)


def parents(config: Config, stage: str) -> tuple[str, ...]:
  """The stages that one starts from, of those that the table allows."""
  row = STAGES[stage]
  absent = set(RL_STAGES) - set(rl_stages(config))
  if not collects(config):
    absent.add("collect")
  if row.role == "reward":  # it starts from one network
    start = "sft" if config.rm.start_from == "sft" else base_stage(config, "reward")
    absent |= {"pretrain", "reward_pretrain", "sft"} - {start}
  return tuple(parent for parent in row.parents if parent not in absent)


def line(config: Config, stage: str) -> list[str]:
  """A stage and all that it comes from, in the order they run; bases that the config gives are among them."""
  needed = [stage]
  for name in needed:  # which grows
    needed += [parent for parent in parents(config, name) if parent not in needed]
  return [name for name in STAGES if name in needed]


def plan(config: Config) -> list[str]:
  """Stages in the order they run, so that the one asked for has all it starts from.

  A base is not trained where the config gives its weights. What an RL stage trains is evaluated at once.
  """
  last = "evaluate" if STAGES[config.stage].is_rl else config.stage
  return [stage for stage in line(config, last) if not given(config, stage)]
