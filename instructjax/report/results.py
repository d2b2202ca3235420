"""What evaluation measured of a run: the record that findings, panels and page read.

Made by `stages/evaluate.py`. Gold scores, agreement, best-of-n and any policy may be absent.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.core.results import LabelerGroups, RewardModel


@dataclasses.dataclass(frozen=True)
class Measured:
  """One policy's answers and what is said of each: one entry an answer, in the order of the prompts.

  Attributes:
    answer: text.
    reward: the reward model's score.
    ended: whether it ended by itself, rather than at the length limit.
    length: tokens.
    kl: log-probability under the policy minus that under the PPO initialisation, nats; None for bases.
    gold, names_topic: the demo's gold score and whether the prompt's topic is named; None for other prompts.
  """

  answer: Sequence[str]
  reward: np.ndarray
  ended: np.ndarray
  length: np.ndarray
  kl: np.ndarray | None
  gold: np.ndarray | None
  names_topic: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class BestOfN:
  """Mean scores of the best of n answers by reward.

  Attributes:
    n: answers chosen from.
    kl: of the best of n from the policy, nats.
    gold, reward: expected scores of the chosen answer.
  """

  n: int
  kl: float
  gold: float
  reward: float


@dataclasses.dataclass(frozen=True)
class Results:
  """All that was measured of a run.

  Attributes:
    samples_per_prompt: answers to each prompt, which stand in a row.
    measured: by policy.
    pretraining: policy -> [rows, 2] (sum of negative log-likelihoods, tokens) of held-out pretraining text.
    reward_model: what its stage measured.
    agreement: of labelers who are simulated; None where they are not.
    best_of_n: of the PPO initialisation, by growing n; empty where it was not asked for.
    curves: RL policy -> its log, a row an iteration.
  """

  samples_per_prompt: int
  measured: Mapping[str, Measured]
  pretraining: Mapping[str, np.ndarray]
  reward_model: RewardModel
  agreement: LabelerGroups | None
  best_of_n: Sequence[BestOfN]
  curves: Mapping[str, Sequence[Mapping[str, Any]]]

  @property
  def has_gold(self) -> bool:
    """Whether the answers have gold scores, and so are judged by them."""
    return any(found.gold is not None for found in self.measured.values())
