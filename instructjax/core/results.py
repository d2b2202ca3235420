"""Record types for what a finished stage has measured. There is one type per kind of stage.

The table in `core/stages.py` says which stage has which type. `train/finished.py` writes the records to done.json and
reads them back. Pure data.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Nothing:
  """The result of a stage that produces weights or files and measures nothing."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """The result of pretraining."""

  validation_loss: float  # held-out loss of the step that was kept, in nats per token


@dataclasses.dataclass(frozen=True)
class Epoch:
  """One pass over the demonstrations. Losses are on held-out data, in nats per token."""

  step: int
  validation_loss: float  # loss on demonstrations
  pretrain_loss: float  # loss on pretraining text


@dataclasses.dataclass(frozen=True)
class Tuned:
  """The result of supervised fine-tuning, which has one entry per epoch."""

  epochs: tuple[Epoch, ...]


@dataclasses.dataclass(frozen=True)
class ScoredEpoch:
  """An epoch with the mean reward-model score of its answers to validation prompts."""

  step: int
  validation_loss: float
  pretrain_loss: float
  reward: float


@dataclasses.dataclass(frozen=True)
class Selected:
  """The result of choosing an epoch of the supervised baseline by its reward-model score (C.1)."""

  epochs: tuple[ScoredEpoch, ...]


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How well two labelers of the same group agree when they rank the same answers."""

  # share of pairs that both labelers order alike, among the pairs that neither calls a tie
  agreement: float
  agreement_stderr: float  # standard error of the agreement, computed over prompts
  tie_rate: float  # share of pairs that a labeler calls a tie


@dataclasses.dataclass(frozen=True)
class LabelerGroups:
  """The agreement inside each group of labelers."""

  train: Agreement  # labelers whose rankings the reward model is trained on
  heldout: Agreement  # labelers whose rankings it never sees


@dataclasses.dataclass(frozen=True)
class Collected:
  """The result of collecting comparisons."""

  agreement: LabelerGroups | None  # None if people ranked
  files: dict[str, str]  # split -> SHA-256 of the file with its rankings, in hex


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Accuracy per bin of confidence, as in `ops.preference.Calibration`. Empty bins hold NaN."""

  confidence: tuple[float, ...]
  accuracy: tuple[float, ...]
  count: tuple[int, ...]
  expected_error: float


@dataclasses.dataclass(frozen=True)
class Judgement:
  """How a reward model does on held-out rankings."""

  accuracy: float  # share of untied pairs that the model orders as the labeler did
  accuracy_stderr: float  # standard error of the accuracy, computed over prompts
  pairs: int
  prompts: int
  score_std: float  # standard deviation of the scores of all answers
  calibration: Calibration


@dataclasses.dataclass(frozen=True)
class Fold:
  """Accuracy of a reward model that was trained without one fold of the labelers (sec 4.1)."""

  heldout: float  # accuracy on rankings by the labelers left out
  train: float  # accuracy on held-out prompts ranked by the other labelers


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """The result of training a reward model, or of measuring one that was given."""

  # mean score of demonstrations before the bias subtracts it (C.2); None if there are none, and nothing is subtracted
  demonstration_mean: float | None
  validation: Judgement | None  # on held-out prompts; None if there are no rankings
  heldout_labelers: Judgement | None  # None if no labelers were held out
  cross_validation: tuple[Fold, ...]  # empty if cross-validation is off

  @property
  def shift(self) -> float:
    """What the bias takes away from every score."""
    return 0.0 if self.demonstration_mean is None else self.demonstration_mean


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The result of choosing the best of n answers to each prompt."""

  prompts: int  # prompts with a chosen answer
  left_out: int  # prompts of whose answers none ended by itself
  reward: float  # mean reward-model score of the chosen answers
  mean_reward: float  # mean score of all answers, chosen or not
  kl: float  # KL of the best of n from the policy, log n - (n - 1) / n, in nats; a bound if some answers never ended
  file: str  # SHA-256 of answers.jsonl, in hex


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """The result of the evaluation."""

  summary: dict[str, dict[str, float]]  # policy -> name of a measurement -> mean
