"""The config blocks of the stages: how each trains, samples or evaluates. Part of `config.py`, which has the others."""

import dataclasses
from typing import Literal

from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, require, require_positive
from instructjax.core.stages import RL_STAGES, TARGETS


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Adam and its learning-rate schedule."""

  learning_rate: float  # peak learning rate
  schedule: Literal["constant", "cosine", "linear"]  # how the rate goes on after the warmup
  warmup_steps: int  # updates over which the rate rises linearly to its peak; 0 is none [updates]
  warmup_start: float  # rate of the first update [of the peak]
  # rate of the last update; unused where the schedule is constant [of the peak]
  end_fraction: float
  b1: float  # Adam's decay of the mean of gradients
  b2: float  # Adam's decay of the mean of squared gradients
  eps: float  # added to the root of the squared gradients' mean, which Adam divides by
  weight_decay: float  # decoupled weight decay of matrices (AdamW); 0 is none
  # gradients with a larger global norm are scaled down to it; None never clips
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
  num_steps: int  # updates [steps]
  batch_size: int  # rows of packed documents an update [rows]
  length: int  # length of a row [tokens]
  # steps between two measurements of the held-out loss; the step with the lowest becomes the base [steps]
  evaluate_every: int
  optim: OptimConfig

  def validate(self, where: str):
    require_positive(self, where, "num_steps", "batch_size", "length", "evaluate_every")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Also ppo_init (C.3): the same stage with pretrain_mix > 0."""

  num_epochs: int  # passes over the demonstrations [epochs]
  batch_size: int  # rows an update, each packed with several demonstrations [rows]
  length: int  # length of a row [tokens]
  dropout: float  # probability that a layer's addition to the residual stream is dropped
  pretrain_mix: float  # share of the rows of a batch that are pretraining text
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

  # prompts that training labelers rank answers of, drawn from the training prompts [prompts]
  num_prompts: int
  # prompts that held-out labelers rank answers of, for evaluation only [prompts]
  num_heldout_prompts: int
  # least answers of a prompt; their number K is uniform between least and most [answers]
  min_responses: int
  max_responses: int  # most answers of a prompt [answers]
  temperature: float  # of sampling the answers that are ranked

  def validate(self, where: str):
    require_positive(self, where, "num_prompts", "num_heldout_prompts", "temperature")
    require(
      2 <= self.min_responses <= self.max_responses,
      f"{where}.min_responses={self.min_responses} must be from 2 to max_responses={self.max_responses}",
    )


@dataclasses.dataclass(frozen=True)
class RMConfig:
  # base starts from the reward model's own pretrained weights, sft from the supervised baseline
  start_from: Literal["base", "sft"]
  num_epochs: int  # passes over the comparisons [epochs]
  batch_size: int  # prompts an update, each with all pairs of its answers [prompts]
  # answers that each prompt is padded to; a prompt with more is refused [answers]
  max_responses: int
  # length of a row that several answers share, in training and in later scoring; 0 pads each to a row of its own
  # [tokens]
  row_length: int = dataclasses.field(metadata=ROUNDING)
  # whether a pair of equally ranked answers is left out, or counts half for either
  ties: Literal["drop", "half"]
  optim: OptimConfig
  # groups of labelers that are left out in turn, to measure accuracy on labelers never seen (sec 4.1); 0 is off
  # [folds]
  cross_validation_folds: int
  cross_validation_prompts: int  # prompts that each fold trains on [prompts]

  def validate(self, where: str):
    require_positive(self, where, "num_epochs", "batch_size", "cross_validation_prompts")
    require(self.max_responses >= 2, f"{where}.max_responses={self.max_responses} must be >= 2")
    require(
      self.cross_validation_folds == 0 or self.cross_validation_folds >= 2,
      f"{where}.cross_validation_folds={self.cross_validation_folds} must be 0 or >= 2",
    )


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  num_iterations: int  # rounds of sampling a batch of episodes and training on it [iterations]
  batch_size: int  # episodes an iteration, each a prompt and a sampled response [episodes]
  num_minibatches: int  # parts that a batch is split into, with an update on each [minibatches]
  num_epochs: int  # passes over a batch of episodes [epochs]
  # rows, of several episodes each, that are scored or trained on at a time; 0 pads each episode to a row of its own
  # [rows]
  packed_rows: int = dataclasses.field(metadata=ROUNDING)
  temperature: float  # of sampling the responses
  # log-probabilities of the sampled tokens: those of the rollout, or computed anew by the scoring pass
  behaviour_logprob: Literal["rollout", "rescore"]
  beta: float  # coefficient of the KL penalty in the reward (eq. 2) [score per nat]
  # whether beta stays, or follows the measured KL (Ziegler et al. 2019)
  kl_controller: Literal["fixed", "adaptive"]
  kl_target: float  # adaptive controller: the KL that it steers to [nats a response]
  kl_horizon: int  # adaptive controller: episodes over which it corrects beta [episodes]
  gamma: float  # coefficient of the pretraining gradient (eq. 2); 0 is PPO without it
  ptx_rows: int  # rows of pretraining text for each episode [rows]
  # parts that a minibatch's pretraining rows are taken in: fewer are faster on a mesh, and take more memory
  ptx_chunks: int = dataclasses.field(metadata=ROUNDING)
  ptx_length: int  # length of a row of pretraining text [tokens]
  # the pretraining loss is the mean over all tokens of a minibatch's rows, or each row's sum of tokens and the mean
  # over rows
  ptx_reduction: Literal["mean", "sum"]
  discount: float  # of later rewards, a token
  # lambda of generalised advantage estimation: 1 has no bias, 0 the least variance
  gae_lambda: float
  clip: float  # how far the ratio of new to old probability counts: from 1 - clip to 1 + clip
  # how far a value may move from the rollout's and still count as better; None does not clip [score]
  value_clip: float | None
  # whether advantages are shifted and scaled to mean 0 and variance 1 over a batch
  whiten_advantages: bool
  # whether rewards are scaled to variance 1 over a batch, with their mean kept
  whiten_rewards: bool
  # a response that was cut off has the reward model's score (as_is), missing_eos_score (fixed), or no part in the
  # policy's loss (exclude)
  missing_eos: Literal["as_is", "fixed", "exclude"]
  # score of a response that was cut off, where missing_eos is fixed [score]
  missing_eos_score: float
  ema_decay: float  # decay of the policy's average over iterations; 0 keeps no average
  # above this KL from the reference the run stops with a message; 0 is no limit [nats a response]
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

  # rows decoded at once over all data shards: a finished row makes room for the next prompt; 0 takes the whole batch
  # [rows]
  slots: int = dataclasses.field(metadata=ROUNDING)

  def validate(self, where: str):
    require(self.slots >= 0, f"{where}.slots={self.slots} must be >= 0; 0 is the whole batch")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  num_prompts: int  # test prompts that policies are compared on [prompts]
  samples_per_prompt: int  # answers sampled for each of them [answers]
  temperature: float  # of sampling those answers
  # which weights of an RL stage are judged: their average over iterations (ema), or the last (raw)
  weights: Literal["ema", "raw"]
  compare: tuple[str, ...]  # RL stages that are run for comparison besides the one asked for
  # whether PPO without KL penalty and best-of-n are run too, for the plot of over-optimisation
  overoptimization: bool
  overoptimization_iterations: int  # iterations of that PPO [iterations]
  # largest n of best-of-n: answers sampled a prompt, of which the reward model takes the best; below 2 is off
  # [answers]
  best_of_n: int
  best_of_n_prompts: int  # prompts of best-of-n [prompts]
  bootstrap: int  # resamples of prompts for the 95% intervals [resamples]
  # batches of held-out documents that the pretraining loss is measured on [batches]
  pretrain_batches: int
  # iterations between two measurements of that loss in an RL stage [iterations]
  pretrain_every: int

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
