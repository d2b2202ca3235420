"""Config blocks of the stages: how each of them trains, samples or evaluates.

`config.py` has the other blocks. `--settings` and docs/settings.md print the comments beside the fields.
"""

import dataclasses
from typing import Any, Literal

from instructjax.core import rewards
from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, WEIGHTS, require, require_positive
from instructjax.core.stages import MAX_ROUNDS, RL_STAGES, SPEAKERS, TARGETS

_COLDEST = 1e-3  # at lower temperatures, logits divided by it are no float32 any more
_MOST_ANSWERS = 2**24  # sampled at one time: they are kept in memory together
_MOST_EPOCHS = 100_000  # the end of each is a checkpoint that is kept, or a fold's


def require_temperature(block: Any, where: str):
  """Checks that logits can be divided by `temperature`.

  Raises:
    UserError: it is too small.
  """
  value = block.temperature
  require(value >= _COLDEST, f"{where}.temperature={value} must be at least {_COLDEST}")


def require_answers(block: Any, where: str, prompts: str, answers: str):
  """Checks that so many answers to so many prompts can be kept at once.

  Raises:
    UserError: they are too many.
  """
  numbers = {name: getattr(block, name) for name in (prompts, answers)}
  spelled = f"{where}.{prompts}={numbers[prompts]} times {answers}={numbers[answers]}"
  require(
    numbers[prompts] * numbers[answers] <= _MOST_ANSWERS,
    f"{spelled} must be at most 2**24 answers",
  )


def require_microbatches(block: Any, where: str):
  """Checks that the microbatches divide the batch, since compiled steps have fixed shapes.

  Raises:
    UserError: they do not.
  """
  count, rows = block.microbatches, block.batch_size
  require_positive(block, where, "microbatches")
  require(rows % count == 0, f"{where}.microbatches={count} must divide batch_size={rows}")


def require_epochs(block: Any, where: str):
  """Checks the number of epochs.

  Raises:
    UserError: there are too many.
  """
  value = block.num_epochs
  require(value <= _MOST_EPOCHS, f"{where}.num_epochs={value} must be at most {_MOST_EPOCHS}")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Adam and its learning-rate schedule."""

  learning_rate: float  # peak learning rate
  schedule: Literal["constant", "cosine", "linear"]  # shape of the learning rate after the warmup
  # updates over which the rate rises linearly to its peak; 0 is no warmup [updates]
  warmup_steps: int
  warmup_start: float  # rate of the first update, as a fraction of the peak; unused without warmup [of the peak]
  # rate of the last update, as a fraction of the peak; unused if the schedule is constant [of the peak]
  end_fraction: float
  b1: float  # Adam's decay rate for the mean of gradients
  b2: float  # Adam's decay rate for the mean of squared gradients
  eps: float  # added to Adam's denominator, the root of the mean of squared gradients
  weight_decay: float  # decoupled weight decay (AdamW), applied to matrices only; 0 is none
  # gradients with a larger global norm are scaled down to this norm; None never clips
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
  """Pretraining of a base model on documents."""

  num_steps: int  # number of updates [steps]
  batch_size: int  # rows of packed documents per update [rows]
  # parts of a batch that are computed one after the other, in training and in measuring the held-out loss; more parts
  # take less memory
  microbatches: int = dataclasses.field(metadata=ROUNDING)
  length: int  # length of a row [tokens]
  # steps between two measurements of the held-out loss; the step with the lowest loss becomes the base model [steps]
  evaluate_every: int
  optim: OptimConfig

  def validate(self, where: str):
    require_positive(self, where, "num_steps", "batch_size", "length", "evaluate_every")
    require_microbatches(self, where)


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Supervised fine-tuning: sft (C.1), and ppo_init (C.3), which mixes in pretraining text."""

  num_epochs: int  # passes over the demonstrations [epochs]
  batch_size: int  # rows per update, each packed with several demonstrations [rows]
  # parts of a batch that are computed one after the other; more parts take less memory
  microbatches: int = dataclasses.field(metadata=ROUNDING)
  length: int  # length of a row [tokens]
  dropout: float  # residual dropout: the probability of dropping an element that a layer adds to the residual stream
  pretrain_mix: float  # share of a batch's rows that are pretraining text
  # a finished policy to use in place of what the stage trains: a stage's folder, a Hugging Face folder, FILE.gguf or
  # hf://ORG/NAME; '' trains
  weights: str = dataclasses.field(metadata={**SAME_NUMBERS, **WEIGHTS})
  optim: OptimConfig

  def validate(self, where: str):
    require_positive(self, where, "num_epochs", "batch_size", "length")
    require_epochs(self, where)
    require_microbatches(self, where)
    require(0 <= self.dropout < 1, f"{where}.dropout={self.dropout} must be in [0, 1)")
    require(
      0 <= self.pretrain_mix < 1, f"{where}.pretrain_mix={self.pretrain_mix} must be in [0, 1)"
    )
    # A mix is a whole number of rows. Rounding must not silently drop the pretraining text or the demonstrations.
    rows = round(self.pretrain_mix * self.batch_size)
    require(
      rows < self.batch_size and (rows > 0) == (self.pretrain_mix > 0),
      f"{where}.pretrain_mix={self.pretrain_mix} must give both kinds of text a row of"
      f" batch_size={self.batch_size}, and it gives {rows} rows to pretraining text",
    )


@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """Collecting comparisons: from simulated labelers, and in later rounds also from the people of `labels:`."""

  # training prompts whose answers are ranked in a round; of people's at most those that there are [prompts]
  num_prompts: int
  # held-out prompts whose answers are ranked in a round, used for evaluation only [prompts]
  num_heldout_prompts: int
  # fewest answers per prompt; the number K of answers is drawn uniformly from min_responses to max_responses [answers]
  min_responses: int
  max_responses: int  # most answers per prompt [answers]
  temperature: float  # temperature at which the answers to rank are sampled
  # rounds of comparisons: in each after the first, answers of the newest PPO-ptx policy are ranked, a reward model is
  # trained on all rounds, and a new policy against it (sec 3.1) [rounds]
  rounds: int = dataclasses.field(metadata=SAME_NUMBERS)  # the stages of other rounds stay the same
  # people who are to rank the answers to each prompt of a later round, where data.comparisons is labels:PROJECT; a run
  # that waits for them takes a new value over [people]
  wanted: int = dataclasses.field(metadata=SAME_NUMBERS)

  def validate(self, where: str):
    require_positive(self, where, "num_prompts", "num_heldout_prompts", "wanted")
    require(
      1 <= self.rounds <= MAX_ROUNDS,
      f"{where}.rounds={self.rounds} must be from 1 to {MAX_ROUNDS}",
    )
    require_temperature(self, where)
    require_answers(self, where, "num_prompts", "max_responses")
    require(
      2 <= self.min_responses <= self.max_responses,
      f"{where}.min_responses={self.min_responses} must be from 2 to max_responses={self.max_responses}",
    )


@dataclasses.dataclass(frozen=True)
class RMConfig:
  """Training of the reward model (C.2)."""

  # base starts from the reward model's own base model; sft starts from the supervised baseline
  start_from: Literal["base", "sft"]
  # a finished reward model, which the stage then only measures: the rm stage of another run, or a Hugging Face folder
  # of a sequence classifier with one label; '' trains. reward_model.weights that end in a score are taken for it
  weights: str = dataclasses.field(metadata={**SAME_NUMBERS, **WEIGHTS})
  num_epochs: int  # passes over the comparisons [epochs]
  batch_size: int  # prompts per update, each with all pairs of its answers [prompts]
  # parts of a batch, with all answers of their prompts, that are computed one after the other; more parts take less
  # memory
  microbatches: int = dataclasses.field(metadata=ROUNDING)
  # number of answers that each prompt is padded to; a prompt with more answers is an error [answers]
  max_responses: int
  # length of the rows that answers are packed into, in training and in later scoring; 0 gives each answer a padded row
  # of its own [tokens]
  row_length: int = dataclasses.field(metadata=ROUNDING)
  # what happens to pairs of equally ranked answers: drop ignores them; half counts each as half a win for either answer
  ties: Literal["drop", "half"]
  optim: OptimConfig
  # number of groups of labelers to leave out in turn, which measures accuracy on unseen labelers (sec 4.1); 0 is off
  # [folds]
  cross_validation_folds: int
  cross_validation_prompts: int  # prompts that each fold trains on [prompts]

  def validate(self, where: str):
    require_positive(self, where, "num_epochs", "batch_size", "cross_validation_prompts")
    require_epochs(self, where)
    require_microbatches(self, where)
    require(self.max_responses >= 2, f"{where}.max_responses={self.max_responses} must be >= 2")
    require(
      self.cross_validation_folds == 0 or self.cross_validation_folds >= 2,
      f"{where}.cross_validation_folds={self.cross_validation_folds} must be 0 or >= 2",
    )


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
    require_temperature(self, where)
    updates = self.num_iterations * self.num_epochs * self.num_minibatches
    require(
      updates < 2**31,
      f"{where}.num_iterations * num_epochs * num_minibatches = {updates} must be below 2**31: the schedule counts"
      " updates in 32 bits",
    )
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
class BestOfNConfig:
  """Best-of-n (rejection sampling): the reward model chooses one of n answers to each training prompt."""

  policy: str  # whose answers: base, sft, ppo_init or an RL stage
  n: int  # answers to each prompt [answers]
  num_prompts: int  # training prompts that are answered; 0 is all [prompts]
  temperature: float  # temperature at which the answers are sampled

  def validate(self, where: str):
    require(
      self.policy in SPEAKERS,
      f"{where}.policy={self.policy[:80]!r} must be one of {', '.join(SPEAKERS)}",
    )
    require(2 <= self.n <= 4096, f"{where}.n={self.n} must be from 2 to 4096")
    require(self.num_prompts >= 0, f"{where}.num_prompts={self.num_prompts} must be >= 0; 0 is all")
    require_temperature(self, where)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How PPO's responses are decoded; the sampled tokens do not depend on it."""

  # rows decoded at the same time, over all devices; when a row finishes, the next prompt takes its place; 0 decodes the
  # whole batch at once [rows]
  slots: int = dataclasses.field(metadata=ROUNDING)

  def validate(self, where: str):
    require(self.slots >= 0, f"{where}.slots={self.slots} must be >= 0; 0 is the whole batch")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Comparison of the policies."""

  num_prompts: int  # test prompts on which policies are compared [prompts]
  samples_per_prompt: int  # answers that each policy samples per test prompt [answers]
  temperature: float  # temperature at which the answers are sampled
  # which weights of an RL stage to evaluate: the average over iterations (ema), or those after the last update (raw)
  weights: Literal["ema", "raw"]
  # further RL stages to run for comparison, of ppo, ppo_ptx, rloo and grpo
  compare: tuple[str, ...]
  # whether to also run PPO without KL penalty and best-of-n, for the plot of over-optimisation
  overoptimization: bool
  overoptimization_iterations: int  # iterations of the PPO run without KL penalty [iterations]
  # answers to each prompt of a batch in the stages rloo and grpo, in place of ppo.samples_per_prompt; at least 2, and a
  # divisor of ppo.batch_size, which counts the answers [answers]
  group_size: int
  # largest n of best-of-n, where the reward model chooses the best of n sampled answers; less than 2 is off [answers]
  best_of_n: int
  best_of_n_prompts: int  # prompts on which best-of-n is measured [prompts]
  bootstrap: int  # bootstrap resamples of the prompts, for 95% confidence intervals [resamples]
  # batches of held-out documents on which the pretraining loss is measured [batches]
  pretrain_batches: int
  # iterations between two measurements of the pretraining loss in an RL stage [iterations]
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
    )
    require_positive(self, where, *sizes)
    require_temperature(self, where)
    require_answers(self, where, "num_prompts", "samples_per_prompt")
    require_answers(self, where, "best_of_n_prompts", "best_of_n")
    require(
      self.bootstrap * self.num_prompts <= 2**28,
      f"{where}.bootstrap={self.bootstrap} times num_prompts={self.num_prompts} must be at most 2**28: all resamples"
      " are in memory at once",
    )
    require(
      self.group_size >= 2,
      f"{where}.group_size={self.group_size} must be at least 2: the answers to a prompt are compared",
    )
    # The run without KL penalty is no target. `overoptimization` switches it on.
    known = [name for name in RL_STAGES if name in TARGETS]
    require(
      set(self.compare) <= set(known),
      f"{where}.compare={self.compare} must hold only {', '.join(map(repr, known))}",
    )
