"""The record of everything that evaluation measured in a run, from which findings, panels and page are made.

Made by `stages/evaluate.py`. Gold scores, agreement, best-of-n and any of the policies may be missing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.core.results import Judgement, LabelerGroups, RewardModel


@dataclasses.dataclass(frozen=True)
class Measured:
  """One policy's answers and their measurements, one entry per answer, in the order of the prompts.

  Attributes:
    answer: its text.
    reward: the reward model's score.
    ended: whether the answer ended by itself, not at the length limit.
    length: number of tokens.
    kl: log-probability under the policy minus that under the PPO initialisation, in nats; None for bases.
    gold: the demo's gold score; None for other prompts than the demo's.
    names_topic: whether the answer names the prompt's topic; None for other prompts than the demo's.
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
  """Mean scores of the answer that the reward model chooses as the best of n.

  Attributes:
    n: number of answers to choose from.
    kl: KL of the distribution of the chosen answer from the policy, in nats.
    gold, reward: expected scores of the chosen answer; gold is None if the answers have no gold score.
    by_prompt: the gold score, or without one the reward, of each prompt; the means above are over prompts.
  """

  n: int
  kl: float
  gold: float | None
  reward: float
  by_prompt: np.ndarray


@dataclasses.dataclass(frozen=True)
class Round:
  """The reward model of one round of comparisons, in a run that has several.

  Attributes:
    number: of the round, from 1.
    judgements: how it does on the held-out rankings of each round.
    reward: policy of a round -> its score of each of that policy's answers.
  """

  number: int
  judgements: tuple[Judgement, ...]
  reward: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Results:
  """Everything that was measured in a run.

  Attributes:
    samples_per_prompt: answers to each prompt, which stand in a row.
    measured: policy -> its answers and their measurements.
    pretraining: policy -> [rows, 2]: for each row of held-out pretraining text, the sum of negative log-likelihoods
      (nats) and the number of tokens.
    reward_model: what the stage `rm` measured.
    agreement: how often simulated labelers agree; None if the labelers are not simulated.
    best_of_n: best-of-n of the PPO initialisation, by growing n; empty if it was not asked for.
    curves: RL policy -> its log, one row per iteration.
    rounds: the reward models of all rounds of comparisons; empty if there was one round.
  """

  samples_per_prompt: int
  measured: Mapping[str, Measured]
  pretraining: Mapping[str, np.ndarray]
  reward_model: RewardModel
  agreement: LabelerGroups | None
  best_of_n: Sequence[BestOfN]
  curves: Mapping[str, Sequence[Mapping[str, Any]]]
  rounds: Sequence[Round]

  @property
  def has_gold(self) -> bool:
    """Whether the answers have gold scores, and so are judged by them."""
    return any(found.gold is not None for found in self.measured.values())
