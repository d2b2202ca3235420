"""Config blocks of the RL stages. training.py has those of the others.

`--settings` and docs/settings.md print the comments beside the fields.
"""

import dataclasses
from typing import Literal

from instructjax.core import rewards
from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, require, require_positive
from instructjax.core.training import OptimConfig, require_temperature


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """Reinforcement learning with PPO (C.4)."""

  num_iterations: int  # rounds of sampling a batch of episodes and training on it [iterations]
  # episodes per iteration; an episode is a prompt and a sampled response [episodes]
  batch_size: int
  num_minibatches: int  # minibatches per batch, with one update each [minibatches]
  # parts of a minibatch whose gradients are computed one after the other, for the policy and the value network; more
  # parts take less memory; 1 if packed_rows is not 0
  microbatches: int = dataclasses.field(metadata=ROUNDING)
  # parts of a batch of episodes that the networks score one after the other; more parts take less memory; 1 if
  # packed_rows is not 0
  score_microbatches: int = dataclasses.field(metadata=ROUNDING)
  num_epochs: int  # passes over each batch of episodes [epochs]
  # number of rows, each packed with several episodes, to score or train on at a time; 0 gives each episode a padded row
  # of its own [rows]
  packed_rows: int = dataclasses.field(metadata=ROUNDING)
  # whether the samples_per_prompt answers to a prompt stay in one minibatch, and are scored and trained on after a
  # single copy of it, where packed_rows leave a row with room for all of them and attention is not splash, which takes
  # segments only
  share_prompts: bool
  temperature: float  # temperature at which responses are sampled
  # rewards that are summed (docs/rewards.md), each with an optional weight before it: rm is the run's reward model,
  # python:MODULE:FUNCTION a function of yours, length:MIN-MAX and format:REGEX are rules, model:PATH is a reward model
  # with another tokenizer, and ensemble:mean, ensemble:worst and ensemble:uncertainty join several reward models
  rewards: tuple[str, ...]
  # further reward models of the ensemble, beside the run's own: rm stages of other runs, or Hugging Face folders; () is
  # none
  ensemble: tuple[str, ...] = dataclasses.field(metadata=SAME_NUMBERS)
  # ensemble:uncertainty is the mean score minus so many times the variance between the models [per score]
  ensemble_penalty: float
  # iterations in a row, from the stage's beginning, in which a reward may give all answers the same score before the
  # stage stops; 0 never stops it [iterations]
  constant_iterations: int = dataclasses.field(metadata=SAME_NUMBERS)
  # answers to each prompt of a batch; it divides batch_size, which counts the answers [answers]
  samples_per_prompt: int
  # what an answer is compared with: gae with what a value network expects at each token (C.4); rloo with the other
  # answers to its prompt (Ahmadian et al. 2024); grpo too, in standard deviations of them, with the KL in the loss
  # (DeepSeekMath). Only gae has a value network
  advantage: Literal["gae", "rloo", "grpo"]
  # where the old log-probabilities of the sampled tokens come from: the rollout itself, or the scoring pass (rescore)
  behaviour_logprob: Literal["rollout", "rescore"]
  beta: float  # coefficient of the KL penalty in the reward (eq. 2) [score per nat]
  # fixed keeps beta constant; adaptive adjusts it to steer the KL to kl_target (Ziegler et al. 2019)
  kl_controller: Literal["fixed", "adaptive"]
  kl_target: float  # adaptive controller: the KL that it steers to [nats a response]
  kl_horizon: int  # adaptive controller: number of episodes over which it corrects beta [episodes]
  gamma: float  # coefficient of the pretraining gradient (eq. 2); 0 is PPO without pretraining mix
  ptx_rows: int  # rows of pretraining text per episode [rows]
  # parts of a minibatch's pretraining rows that are computed one after the other; more parts take less memory, and are
  # slower on a mesh
  ptx_microbatches: int = dataclasses.field(metadata=ROUNDING)
  ptx_length: int  # length of a row of pretraining text [tokens]
  # mean averages the pretraining loss over all tokens of a minibatch's rows; sum adds up each row's tokens and averages
  # over rows
  ptx_reduction: Literal["mean", "sum"]
  discount: float  # discount factor of later rewards, per token
  # lambda of generalised advantage estimation: 1 has no bias, 0 the least variance
  gae_lambda: float
  # PPO clips the ratio of new to old probability to the range from 1 - clip to 1 + clip
  clip: float
  # the value loss clips new values to within this distance of the rollout's values; None does not clip [score]
  value_clip: float | None
  # whether advantages are shifted and scaled to mean 0 and variance 1 over a batch
  whiten_advantages: bool
  # whether rewards are scaled to variance 1 over a batch; their mean is kept
  whiten_rewards: bool
  # how to treat a response without EOS: as_is keeps its reward-model score; fixed gives it missing_eos_score; exclude
  # leaves it out of the policy's loss
  missing_eos: Literal["as_is", "fixed", "exclude"]
  # score of a response without EOS if missing_eos is fixed [score]
  missing_eos_score: float
  # decay of the moving average of the policy's weights, per iteration; 0 keeps no average
  ema_decay: float
  # above this KL from the reference the run stops with an error; 0 is no limit [nats a response]
  max_kl: float = dataclasses.field(metadata=SAME_NUMBERS)
  # what the value network starts from: reward_model is the reward model (C.4); policy is the trunk of PPO's start under
  # a head of zeros, for which both networks must be of one shape
  value_init: Literal["reward_model", "policy"]
  # iterations at the beginning in which only the value network learns; the policy, its average and beta stay as they
  # are [iterations]
  value_warmup: int
  policy_optim: OptimConfig
  value_optim: OptimConfig

  @property
  def has_value_network(self) -> bool:
    """Whether advantages need what a value network expects."""
    return self.advantage == "gae"

  def _validate_advantage(self, where: str):
    """Checks what goes with `advantage`."""
    require(
      self.batch_size % self.samples_per_prompt == 0,
      f"{where}.samples_per_prompt={self.samples_per_prompt} must divide batch_size={self.batch_size}",
    )
    if self.has_value_network:
      return
    kind = f"advantage={self.advantage!r}"
    require(
      self.samples_per_prompt >= 2,
      f"{where}.samples_per_prompt={self.samples_per_prompt} must be at least 2 with {kind}, which compares the answers"
      " to a prompt",
    )
    # An answer is one action, so there are no tokens to discount between, and no rewards of tokens to scale.
    require(self.discount == 1, f"{where}.discount={self.discount} must be 1 with {kind}")
    require(not self.whiten_rewards, f"{where}.whiten_rewards=True must be False with {kind}")
    require(
      self.value_warmup == 0 and self.value_init == "reward_model",
      f"{where}.value_warmup={self.value_warmup} and value_init={self.value_init!r} must be 0 and 'reward_model' with"
      f" {kind}, which has no value network",
    )
    require(
      self.advantage == "rloo" or self.kl_controller == "fixed",
      f"{where}.kl_controller={self.kl_controller!r} must be 'fixed' with {kind}, whose loss holds the KL",
    )

  def _validate_sharing(self, where: str):
    """Checks what goes with `share_prompts`."""
    require(
      not self.share_prompts
      or self.batch_size // self.num_minibatches % self.samples_per_prompt == 0,
      f"{where}.share_prompts needs whole groups of samples_per_prompt={self.samples_per_prompt} answers in each of the"
      f" num_minibatches={self.num_minibatches} of {where}.batch_size={self.batch_size}",
    )

  def _validate_parts(self, where: str):
    """Checks that a batch can be divided as it is computed."""
    # The compiled step has fixed shapes, so minibatches, microbatches and packed rows must divide their batches evenly.
    minibatch = self.batch_size // self.num_minibatches
    rows = minibatch * self.ptx_rows
    require(
      rows % self.ptx_microbatches == 0,
      f"{where}.ptx_microbatches={self.ptx_microbatches} must divide the {rows} pretraining rows of a minibatch",
    )
    require(
      self.packed_rows == 0 or (self.packed_rows > 0 and minibatch % self.packed_rows == 0),
      f"{where}.packed_rows={self.packed_rows} must be 0 or divide batch_size / num_minibatches={minibatch}",
    )
    require(
      minibatch % self.microbatches == 0,
      f"{where}.microbatches={self.microbatches} must divide batch_size / num_minibatches={minibatch}",
    )
    require(
      self.batch_size % self.score_microbatches == 0,
      f"{where}.score_microbatches={self.score_microbatches} must divide batch_size={self.batch_size}",
    )
    for name in ("microbatches", "score_microbatches"):
      count = getattr(self, name)
      require(
        self.packed_rows == 0 or count == 1,
        f"{where}.{name}={count} must be 1 with packed_rows={self.packed_rows}, which are the rows computed at a time",
      )
    # lm-human-preferences asserts the same. The statistics of fewer rewards are mostly noise.
    require(
      not self.whiten_rewards or minibatch >= 8,
      f"{where}.whiten_rewards=True must have batch_size / num_minibatches >= 8, got {minibatch}",
    )

  def _validate_rewards(self, where: str):
    """Checks the rewards and the models behind them."""
    listed = rewards.parse(self.rewards, f"{where}.rewards")
    require(
      rewards.has_ensemble(listed) == bool(self.ensemble),
      f"{where}.ensemble={self.ensemble} and rewards={self.rewards} must come together: name further reward models in"
      " ensemble, as '(\"runs/other/rm\",)', and an ensemble:HOW in rewards",
    )
    require(
      len({*self.ensemble}) == len(self.ensemble),
      f"{where}.ensemble={self.ensemble} must not name a reward model twice",
    )
    require(
      self.ensemble_penalty >= 0,
      f"{where}.ensemble_penalty={self.ensemble_penalty} must be >= 0",
    )
    require(
      self.constant_iterations >= 0,
      f"{where}.constant_iterations={self.constant_iterations} must be >= 0; 0 never stops",
    )

  def validate(self, where: str):
    sizes = (
      "num_iterations",
      "batch_size",
      "num_minibatches",
      "microbatches",
      "score_microbatches",
      "samples_per_prompt",
      "num_epochs",
      "ptx_rows",
      "ptx_microbatches",
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
    self._validate_advantage(where)
    self._validate_sharing(where)
    self._validate_parts(where)
    self._validate_rewards(where)
    require_temperature(self, where)
    updates = self.num_iterations * self.num_epochs * self.num_minibatches
    require(
      updates < 2**31,
      f"{where}.num_iterations * num_epochs * num_minibatches = {updates} must be below 2**31: the schedule counts"
      " updates in 32 bits",
    )
    require(
      0 <= self.value_warmup < self.num_iterations,
      f"{where}.value_warmup={self.value_warmup} must be >= 0 and below num_iterations={self.num_iterations}: after it"
      " the policy learns too",
    )
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
  """How PPO's responses are decoded; the sampled tokens do not depend on it."""

  # rows decoded at the same time, over all devices; when a row finishes, the next prompt takes its place; 0 decodes the
  # whole batch at once [rows]
  slots: int = dataclasses.field(metadata=ROUNDING)

  def validate(self, where: str):
    require(self.slots >= 0, f"{where}.slots={self.slots} must be >= 0; 0 is the whole batch")
