"""The whole configuration as frozen dataclasses, with every rule it must obey.

`configs/` holds the values (each with its unit or source); this file, network.py and training.py hold names, types and
`validate()`. `main` converts the ml_collections config once with `from_config_dict`; below it nobody sees a ConfigDict
or a flag.

A run that goes on from a checkpoint has to have the settings that the checkpoint was made with, except for those whose
field is marked ROUNDING or SAME_NUMBERS (blocks.py). The marks are the only list of these.
"""

import dataclasses
import re
from typing import Any, Literal

from instructjax.core.blocks import build, require, require_positive, validate
from instructjax.core.network import (
  ExecutionConfig,
  ModelConfig,
  NetworkConfig,
  RopeScalingConfig,
)
from instructjax.core.stages import TARGETS
from instructjax.core.training import (
  CollectConfig,
  EvaluateConfig,
  OptimConfig,
  PPOConfig,
  PretrainConfig,
  RMConfig,
  RolloutConfig,
  SFTConfig,
)

__all__ = [
  "CheckpointConfig",
  "CollectConfig",
  "Config",
  "DataConfig",
  "EvaluateConfig",
  "ExecutionConfig",
  "LogConfig",
  "MeshConfig",
  "ModelConfig",
  "NetworkConfig",
  "OptimConfig",
  "PPOConfig",
  "PretrainConfig",
  "ProfileConfig",
  "RMConfig",
  "RolloutConfig",
  "RopeScalingConfig",
  "SFTConfig",
  "TokenizerConfig",
  "from_config_dict",
  "network_config",
]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  # a tokenizer.json, sentencepiece .model, .gguf or folder; '' takes that of the given weights, or trains one on
  # data.documents
  path: str
  # pieces of the tokenizer that is trained; must be the number of pieces of one that is given [pieces]
  vocab_size: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where records come from: `demo:`, `jsonl:PATH[.gz]` or another source of data/sources.py; '' is none."""

  # source of plain text for pretraining and the pretraining mix: SCHEME:PATH, see docs/data.md; '' is none
  documents: str
  demonstrations: str  # source of prompts with answers to imitate; '' is none
  # source of ranked answers for the reward model; '' is none, demo: has simulated labelers rank the policy's answers
  comparisons: str
  prompts: str  # source of prompts for RL and evaluation; '' is none
  max_prompt_length: int  # longer prompts are left out and counted [tokens]
  # longest response, its EOS included; longer ones in the data are left out and counted [tokens]
  max_response_length: int
  # share that a hash of the prompt or document holds out, of sources without a split of their own
  validation_fraction: float
  # whether the first bad record ends the run, or is skipped and counted
  on_bad_record: Literal["raise", "skip"]

  def validate(self, where: str):
    require(
      0 < self.validation_fraction < 1,
      f"{where}.validation_fraction={self.validation_fraction} must be in (0, 1)",
    )
    require_positive(self, where, "max_prompt_length", "max_response_length")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 (at most once) takes what is left."""

  # TPU slices of the job, between which there is only the data centre's network [slices]
  slice: int
  # devices that batches are split over, each with all weights; -1 takes what is left [devices]
  data: int
  fsdp: int  # devices that batches and weights are split over; -1 takes what is left [devices]
  tensor: int  # devices that each layer's products are split over; -1 takes what is left [devices]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  # steps between two checkpoints; epoch ends and the last step have one besides [steps]
  every_steps: int
  keep: int  # how many of the newest checkpoints stay, besides the best and those of epoch ends

  def validate(self, where: str):
    require_positive(self, where, "every_steps", "keep")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  every_steps: int  # steps between two lines of progress and two points of a curve [steps]
  # rows of the table of samples that RL stages show at each line of progress; 0 shows none [rows]
  samples: int
  tensorboard: bool  # whether curves are written for TensorBoard too

  def validate(self, where: str):
    require_positive(self, where, "every_steps")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  # 'A:B' traces steps A to B - 1 of each stage, for a profiler and for the table at the end; '' traces none
  steps: str

  def validate(self, where: str):
    match = re.fullmatch(r"(\d+):(\d+)", self.steps)
    require(
      not self.steps or (match is not None and 2 <= int(match[1]) < int(match[2])),
      f"{where}.steps={self.steps!r} must be '' or 'A:B' with 2 <= A < B, as '3:5' for steps 3 and 4:"
      " a stage's first step compiles",
    )


@dataclasses.dataclass(frozen=True)
class Config:
  stage: str  # the stage to run, with those that it starts from; a config file has its own
  preset: str  # name of the size preset, for reports; chosen with --config=FILE:PRESET
  seed: int  # of everything random; the same seed on the same machine gives the same numbers
  model: ModelConfig  # the policy's network, and the base it starts from
  # the reward model's network, which is the value network too, and the larger base that evaluate compares with
  reward_model: ModelConfig
  execution: ExecutionConfig
  tokenizer: TokenizerConfig  # how text becomes tokens
  data: DataConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig  # when a run is saved, and what is kept
  log: LogConfig  # what a run shows of itself while it goes on
  profile: ProfileConfig  # which steps are traced for a profiler
  pretrain: PretrainConfig  # pretraining of the policy's base, where no weights are given
  reward_pretrain: PretrainConfig  # pretraining of the reward model's base
  sft: SFTConfig  # the supervised baseline (C.1)
  ppo_init: SFTConfig  # the supervised start of RL and its KL reference (C.3)
  collect: CollectConfig
  rm: RMConfig  # training of the reward model (C.2)
  ppo: PPOConfig  # reinforcement learning, with or without the pretraining gradient (C.4)
  rollout: RolloutConfig
  evaluate: EvaluateConfig  # what policies are compared by

  @property
  def same_network(self) -> bool:
    """Whether policy and reward model differ in their head only."""
    return self.model.network == self.reward_model.network

  def validate(self, where: str = "config"):
    require(0 <= self.seed < 2**63, f"{where}.seed={self.seed} must be >= 0 and below 2**63")
    require(
      self.stage in TARGETS, f"{where}.stage={self.stage!r} must be one of {', '.join(TARGETS)}"
    )
    total = self.data.max_prompt_length + self.data.max_response_length
    for name in ("model", "reward_model"):
      limit = getattr(self, name).max_length
      require(
        total <= limit,
        f"data.max_prompt_length + max_response_length = {total} must not exceed {where}.{name}.max_length={limit}",
      )
    require(
      self.rm.start_from == "base" or self.same_network,
      f"{where}.rm.start_from='sft' must have reward_model equal to model, and they differ; use 'base'",
    )
    require(
      self.rm.start_from == "base" or self.reward_model.weights in ("", self.model.weights),
      f"{where}.rm.start_from='sft' must come without {where}.reward_model.weights="
      f"{self.reward_model.weights!r}, from which nothing would start; use 'base'",
    )
    require(
      self.data.comparisons != "demo:" or self.collect.max_responses <= self.rm.max_responses,
      f"{where}.collect.max_responses={self.collect.max_responses} must not exceed"
      f" rm.max_responses={self.rm.max_responses}",
    )
    require(
      self.rm.row_length == 0 or self.rm.row_length >= total,
      f"{where}.rm.row_length={self.rm.row_length} must be 0 or at least data.max_prompt_length"
      f" + max_response_length = {total}: an answer fits in one row",
    )
    require(
      self.rollout.slots <= self.ppo.batch_size,
      f"{where}.rollout.slots={self.rollout.slots} must not exceed ppo.batch_size={self.ppo.batch_size}",
    )
    for name in ("sft", "ppo_init"):
      length = getattr(self, name).length
      require(
        total <= length,
        f"data.max_prompt_length + max_response_length = {total} must not exceed {where}.{name}.length={length}:"
        " a demonstration fits in one row",
      )
    rows = (
      ("pretrain.length", "model"),
      ("reward_pretrain.length", "reward_model"),
      ("ppo.ptx_length", "model"),
    )
    for name, model in rows:
      block, field = name.split(".")
      length, limit = getattr(getattr(self, block), field), getattr(self, model).max_length
      require(
        length <= limit,
        f"{where}.{name}={length} must not exceed {where}.{model}.max_length={limit}",
      )


def from_config_dict(config: Any) -> Config:
  """Frozen, validated Config from an ml_collections ConfigDict (or plain nested dict).

  A reward model of the policy's network starts from the policy's weights unless it names its own.

  Raises:
    UserError: a field is unknown (with the nearest known one), missing, of the wrong type, or breaks a rule.
  """
  plain = config.to_dict() if hasattr(config, "to_dict") else config
  result = build(Config, plain, "config")
  validate(result, "config")
  if result.same_network and not result.reward_model.weights:
    reward_model = dataclasses.replace(result.reward_model, weights=result.model.weights)
    result = dataclasses.replace(result, reward_model=reward_model)
  return result


def network_config(values: dict, where: str) -> NetworkConfig:
  """Validated NetworkConfig from a plain dict, as a finished stage keeps it.

  Raises:
    UserError: as from_config_dict.
  """
  result = build(NetworkConfig, values, where)
  validate(result, where)
  return result
