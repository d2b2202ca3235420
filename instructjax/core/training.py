"""The config blocks of the stages: how each trains, samples or evaluates. Part of `config.py`, which has the others."""

import dataclasses
from typing import Literal

from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, require, require_positive
from instructjax.core.stages import RL_STAGES, TARGETS


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Adam and its learning-rate schedule."""

  learning_rate: float
  schedule: Literal["constant", "cosine", "linear"]
  warmup_steps: int
  warmup_start: float  # fraction of learning_rate at step 0
  end_fraction: float  # fraction of learning_rate at the last step (cosine, linear)
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float | None

  def validate(self, where: str):
    require(self.learning_rate > 0, f"{where}.learning_rate={self.learning_rate} must be > 0")
    require(
      0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"{where}.b1={self.b1}, b2={self.b2} must be in [0, 1)"
    )
    require(self.eps > 0, f"{where}.eps={self.eps} must be > 0")
    require(self.warmup_steps >= 0, f"{where}.warmup_steps={self.warmup_steps} must be >= 0")
    require(
      0 <= self.warmup_start <= 1, f"{where}.warmup_start={self.warmup_start} must be in [0, 1]"
    )
    require(
      0 <= self.end_fraction <= 1, f"{where}.end_fraction={self.end_fraction} must be in [0, 1]"
    )
    require(self.weight_decay >= 0, f"{where}.weight_decay={self.weight_decay} must be >= 0")
    require(
      self.clip_norm is None or self.clip_norm > 0,
      f"{where}.clip_norm={self.clip_norm} must be None or > 0",
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  num_steps: int
  batch_size: int  # packed rows
  length: int  # tokens a row
  evaluate_every: int  # steps between held-out losses; the step with the lowest is the base
  optim: OptimConfig

  def validate(self, where: str):
    require_positive(self, where, "num_steps", "batch_size", "length", "evaluate_every")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Also ppo_init (C.3): the same stage with pretrain_mix > 0."""

  num_epochs: int
  batch_size: int  # packed rows
  length: int  # tokens a row
  dropout: float  # residual dropout
  pretrain_mix: float  # share of rows that are pretraining text
  optim: OptimConfig

  def validate(self, where: str):
    require_positive(self, where, "num_epochs", "batch_size", "length")
    require(0 <= self.dropout < 1, f"{where}.dropout={self.dropout} must be in [0, 1)")
    require(
      0 <= self.pretrain_mix < 1, f"{where}.pretrain_mix={self.pretrain_mix} must be in [0, 1)"
    )
    rows = round(self.pretrain_mix * self.batch_size)
    require(
      rows < self.batch_size and (rows > 0) == (self.pretrain_mix > 0),
      f"{where}.pretrain_mix={self.pretrain_mix} must give both kinds of text a row of"
      f" batch_size={self.batch_size}, and it gives {rows} rows to pretraining text",
    )


@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """Collecting comparisons from simulated labelers (only for `data.comparisons='demo:'`)."""

  num_prompts: int  # ranked prompts (draws of training prompts)
  num_heldout_prompts: int  # ranked by held-out labelers, for evaluation only
  min_responses: int  # K is uniform in [min, max]
  max_responses: int
  temperature: float

  def validate(self, where: str):
    require_positive(self, where, "num_prompts", "num_heldout_prompts", "temperature")
    require(
      2 <= self.min_responses <= self.max_responses,
      f"{where}.min_responses={self.min_responses} must be from 2 to max_responses={self.max_responses}",
    )


@dataclasses.dataclass(frozen=True)
class RMConfig:
  start_from: Literal["base", "sft"]  # base: the reward model's own pretrained weights
  num_epochs: int
  batch_size: int  # prompts
  max_responses: int  # C: answers a prompt is padded to; a prompt with more is refused
  # tokens of a row that answers share, here and where they are scored later; 0 = one a row, padded
  row_length: int = dataclasses.field(metadata=ROUNDING)
  ties: Literal["drop", "half"]
  optim: OptimConfig
  cross_validation_folds: int  # over labelers (sec 4.1); 0 = off
  cross_validation_prompts: int  # prompts used by each fold's training

  def validate(self, where: str):
    require_positive(self, where, "num_epochs", "batch_size", "cross_validation_prompts")
    require(self.max_responses >= 2, f"{where}.max_responses={self.max_responses} must be >= 2")
    require(
      self.cross_validation_folds == 0 or self.cross_validation_folds >= 2,
      f"{where}.cross_validation_folds={self.cross_validation_folds} must be 0 or >= 2",
    )


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  num_iterations: int
  batch_size: int  # episodes an iteration
  num_minibatches: int
  num_epochs: int  # inner epochs
  # rows, of several episodes each, scored or trained on at a time; 0 = one episode a row, padded
  packed_rows: int = dataclasses.field(metadata=ROUNDING)
  temperature: float
  behaviour_logprob: Literal["rollout", "rescore"]
  beta: float  # KL coefficient (eq. 2)
  kl_controller: Literal["fixed", "adaptive"]
  kl_target: float  # nats a sample, adaptive only
  kl_horizon: int  # episodes, adaptive only
  gamma: float  # pretraining-loss coefficient (eq. 2); 0 = PPO
  ptx_rows: int  # pretraining rows an episode
  # parts that a minibatch's pretraining rows are taken in: fewer are faster on a mesh, and larger
  ptx_chunks: int = dataclasses.field(metadata=ROUNDING)
  ptx_length: int  # tokens of a pretraining row
  ptx_reduction: Literal[
    "mean", "sum"
  ]  # over tokens of a minibatch's rows, or sum over tokens and mean over rows
  discount: float
  gae_lambda: float
  clip: float
  value_clip: float | None
  whiten_advantages: bool
  whiten_rewards: bool
  missing_eos: Literal["as_is", "fixed", "exclude"]
  missing_eos_score: float  # the score when missing_eos='fixed'
  ema_decay: float  # per iteration; 0 keeps no average
  # nats a sample: above it the run stops with a message; 0 = no limit
  max_kl: float = dataclasses.field(metadata=SAME_NUMBERS)
  policy_optim: OptimConfig
  value_optim: OptimConfig

  def validate(self, where: str):
    sizes = (
      "num_iterations",
      "batch_size",
      "num_minibatches",
      "num_epochs",
      "ptx_rows",
      "ptx_chunks",
      "ptx_length",
    )
    require_positive(self, where, *sizes)
    require(self.clip > 0, f"{where}.clip={self.clip} must be > 0")
    require(
      self.value_clip is None or self.value_clip > 0,
      f"{where}.value_clip={self.value_clip} must be None or > 0",
    )
    require(
      self.batch_size % self.num_minibatches == 0,
      f"{where}.batch_size={self.batch_size} must be divisible by num_minibatches={self.num_minibatches}",
    )
    minibatch = self.batch_size // self.num_minibatches
    rows = minibatch * self.ptx_rows
    require(
      rows % self.ptx_chunks == 0,
      f"{where}.ptx_chunks={self.ptx_chunks} must divide the {rows} pretraining rows of a minibatch",
    )
    require(
      self.packed_rows == 0 or (self.packed_rows > 0 and minibatch % self.packed_rows == 0),
      f"{where}.packed_rows={self.packed_rows} must be 0 or divide batch_size / num_minibatches={minibatch}",
    )
    # As lm-human-preferences asserts: the mean of fewer rewards is mostly noise.
    require(
      not self.whiten_rewards or minibatch >= 8,
      f"{where}.whiten_rewards=True must have batch_size / num_minibatches >= 8, got {minibatch}",
    )
    require(self.temperature > 0, f"{where}.temperature={self.temperature} must be > 0")
    require(self.beta >= 0, f"{where}.beta={self.beta} must be >= 0")
    require(self.gamma >= 0, f"{where}.gamma={self.gamma} must be >= 0")
    for name in ("discount", "gae_lambda"):
      value = getattr(self, name)
      require(0 <= value <= 1, f"{where}.{name}={value} must be in [0, 1]")
    require(self.max_kl >= 0, f"{where}.max_kl={self.max_kl} must be >= 0; 0 is no limit")
    require(0 <= self.ema_decay < 1, f"{where}.ema_decay={self.ema_decay} must be in [0, 1)")
    require(
      self.kl_controller == "fixed" or (self.kl_target > 0 and self.kl_horizon > 0),
      f"{where}.kl_target={self.kl_target} and kl_horizon={self.kl_horizon} must be > 0 for the adaptive controller",
    )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How PPO's responses are decoded; the tokens do not depend on it."""

  # rows decoded at once, over all data shards; 0 = all of ppo.batch_size
  slots: int = dataclasses.field(metadata=ROUNDING)

  def validate(self, where: str):
    require(self.slots >= 0, f"{where}.slots={self.slots} must be >= 0; 0 is the whole batch")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  num_prompts: int  # test prompts
  samples_per_prompt: int
  temperature: float
  weights: Literal["ema", "raw"]  # which RL weights are judged
  compare: tuple[
    str, ...
  ]  # RL stages run for comparison besides the one asked for: of ppo, ppo_ptx
  overoptimization: bool  # also run PPO with beta=0 and best-of-n, for the over-optimisation plot
  overoptimization_iterations: int
  best_of_n: int  # N samples a prompt for best-of-n; below 2 = off
  best_of_n_prompts: int
  bootstrap: int  # resamples over prompts for the 95% intervals
  pretrain_batches: int  # validation rows for the pretraining loss, in batches
  pretrain_every: int  # RL iterations between two measurements of it

  def validate(self, where: str):
    sizes = (
      "num_prompts",
      "samples_per_prompt",
      "overoptimization_iterations",
      "bootstrap",
      "pretrain_batches",
      "pretrain_every",
      "best_of_n_prompts",
      "temperature",
    )
    require_positive(self, where, *sizes)
    known = [name for name in RL_STAGES if name in TARGETS]
    require(
      set(self.compare) <= set(known),
      f"{where}.compare={self.compare} must hold only {' and '.join(map(repr, known))}",
    )
