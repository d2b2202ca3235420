"""What a finished stage measured, as done.json keeps it: one record type a kind of stage. Pure data.

`core/stages.py` says which stage has which; `train/finished.py` writes and reads them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Nothing:
  """A stage that leaves weights or files, and nothing to report besides."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
  validation_loss: float  # of the step kept, nats a token of held-out text


@dataclasses.dataclass(frozen=True)
class Epoch:
  """One pass over the demonstrations. Losses are held out, in nats a token."""

  step: int
  validation_loss: float  # of demonstrations
  pretrain_loss: float  # of pretraining text


@dataclasses.dataclass(frozen=True)
class Tuned:
  epochs: tuple[Epoch, ...]


@dataclasses.dataclass(frozen=True)
class ScoredEpoch:
  """An epoch, and the reward model's mean score of its answers to validation prompts."""

  step: int
  validation_loss: float
  pretrain_loss: float
  reward: float


@dataclasses.dataclass(frozen=True)
class Selected:
  epochs: tuple[ScoredEpoch, ...]


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How two labelers of one group rank the same answers."""

  agreement: float  # share of pairs that both order alike, of those that neither calls a tie
  agreement_stderr: float  # over prompts
  tie_rate: float  # share of pairs that a labeler calls a tie


@dataclasses.dataclass(frozen=True)
class LabelerGroups:
  train: Agreement  # whose rankings the reward model is trained on
  heldout: Agreement  # whom it never saw


@dataclasses.dataclass(frozen=True)
class Collected:
  agreement: LabelerGroups


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Confidence against accuracy by bin, as in `ops.preference.Calibration`; NaN in an empty bin."""

  confidence: tuple[float, ...]
  accuracy: tuple[float, ...]
  count: tuple[int, ...]
  expected_error: float


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A reward model on held-out rankings."""

  accuracy: float  # share of untied pairs ordered as the labeler did
  accuracy_stderr: float  # over prompts
  pairs: int
  prompts: int
  score_std: float  # of all answers' scores
  calibration: Calibration


@dataclasses.dataclass(frozen=True)
class Fold:
  """Accuracy of a reward model trained without one fold of the labelers (sec 4.1)."""

  heldout: float  # on the labelers left out
  train: float  # on the others, on held-out prompts


@dataclasses.dataclass(frozen=True)
class RewardModel:
  demonstration_mean: float  # mean score of demonstrations, which the bias takes away (C.2)
  validation: Judgement  # on held-out prompts
  heldout_labelers: Judgement | None  # None where nobody was held out
  cross_validation: tuple[Fold, ...]  # empty where it is off


@dataclasses.dataclass(frozen=True)
class Evaluated:
  summary: dict[str, dict[str, float]]  # policy -> name of a measurement -> mean
