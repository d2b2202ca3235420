"""Config blocks of the stages: how each of them trains, samples or evaluates.

rl_training.py has those of the RL stages, running.py and config.py the other blocks. `--settings` and docs/settings.md
print the comments beside the fields.
"""

import dataclasses
from typing import Any, Literal

from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, WEIGHTS, require, require_positive
from instructjax.core.stages import MAX_ROUNDS, RL_STAGES, SPEAKERS, TARGETS

_COLDEST = 1e-3  # at lower temperatures, logits divided by it are no float32 any more
_MOST_ANSWERS = 2**24  # sampled at one time: they are kept in memory together
_MOST_COMPARISONS = 2**26  # of a win rate, of about 16 bytes each
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
  # whether training reads a prompt once for the answers that share a row with it; needs row_length. Where attention
  # takes segments only, as splash does, each answer keeps a prompt of its own
  share_prompts: bool = dataclasses.field(metadata=ROUNDING)
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
      self.row_length > 0 or not self.share_prompts,
      f"{where}.share_prompts needs {where}.row_length > 0, since answers in rows of their own share nothing",
    )
    require(
      self.cross_validation_folds == 0 or self.cross_validation_folds >= 2,
      f"{where}.cross_validation_folds={self.cross_validation_folds} must be 0 or >= 2",
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
  # checkpoints of each RL run, evenly between its start and its end, that stay on disk and whose answers to the test
  # prompts are measured; 0 is none [checkpoints]
  checkpoints: int

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
    require(
      self.num_prompts * self.samples_per_prompt**2 <= _MOST_COMPARISONS,
      f"{where}.samples_per_prompt={self.samples_per_prompt} for {where}.num_prompts={self.num_prompts} must be so few"
      " that there are at most 2**26 comparisons of two policies: each answer to a prompt with each of the other's",
    )
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
    require(
      self.checkpoints >= 0, f"{where}.checkpoints={self.checkpoints} must be >= 0; 0 is none"
    )
    # The run without KL penalty is no target. `overoptimization` switches it on.
    known = [name for name in RL_STAGES if name in TARGETS]
    require(
      set(self.compare) <= set(known),
      f"{where}.compare={self.compare} must hold only {', '.join(map(repr, known))}",
    )
