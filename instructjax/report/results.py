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
    gold: the gold score; None for prompts that are no simulated task's.
    repeats: whether the answer repeats a pair of words.
    copied: share of the answer's words that are copied from the prompt, see `wording.copied`.
    names_topic: whether the answer names the prompt's topic; None where `gold` is.
    topic_again: whether it names the topic more than once; None where `names_topic` is.
  """

  answer: Sequence[str]
  reward: np.ndarray
  ended: np.ndarray
  length: np.ndarray
  kl: np.ndarray | None
  gold: np.ndarray | None
  repeats: np.ndarray
  copied: np.ndarray
  names_topic: np.ndarray | None
  topic_again: np.ndarray | None

  def take(self, index: np.ndarray) -> "Measured":
    """The answers at these places."""
    arrays = {
      field.name: np.asarray(found)[index]
      for field in dataclasses.fields(self)
      if field.name != "answer" and (found := getattr(self, field.name)) is not None
    }
    return dataclasses.replace(self, answer=[self.answer[i] for i in index], **arrays)


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
    heldout: the same on those of held-out labelers; None for a round in which none of them decided.
    reward: policy of a round -> its score of each of that policy's answers.
  """

  number: int
  judgements: tuple[Judgement, ...]
  heldout: tuple[Judgement | None, ...]
  reward: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BestAtKL:
  """A policy beside best-of-n of the PPO initialisation at the policy's own KL.

  Attributes:
    n: number of answers to choose from.
    kl: KL of best-of-n from the PPO initialisation, in nats: near the policy's, or less if all samples do not reach it.
    reaches: whether best-of-n comes as far as the policy.
    gold, reward: expected scores of the chosen answer; gold is None if the answers have no gold score.
    wins_P: for each prompt, how often the policy's answer is judged better than the chosen one (a tie is half a win).
  """

  n: int
  kl: float
  reaches: bool
  gold: float | None
  reward: float
  wins_P: np.ndarray


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
    best_at_kl: RL policy -> best-of-n at its KL; empty if best-of-n was not asked for.
    untrained: answers that need no training of their own (`core.stages.UNTRAINED`), measured as the policies' are.
    new_topics: policy -> its answers to prompts on topics that no training prompt is about; empty for other prompts
      than a simulated task's. `measured` does not hold them.
    gold_words: what the gold score rewards, in a sentence; '' if there is none.
    shots: number of worked examples -> mean score of the larger base's answers with so many, by what judges; the best
      of them is the policy `few_shot`.
    curves: RL policy -> its log, one row per iteration.
    rounds: the reward models of all rounds of comparisons; empty if there was one round.
    checkpoints: RL policy -> step of a checkpoint between its start and its end, growing -> its answers to the prompts
      of `measured`, measured as the finished policy's are. Without policies of which none was kept.
  """

  samples_per_prompt: int
  measured: Mapping[str, Measured]
  pretraining: Mapping[str, np.ndarray]
  reward_model: RewardModel
  agreement: LabelerGroups | None
  best_of_n: Sequence[BestOfN]
  best_at_kl: Mapping[str, BestAtKL]
  untrained: Mapping[str, Measured]
  new_topics: Mapping[str, Measured]
  gold_words: str
  shots: Mapping[int, float]
  curves: Mapping[str, Sequence[Mapping[str, Any]]]
  rounds: Sequence[Round]
  checkpoints: Mapping[str, Mapping[int, Measured]]

  @property
  def has_gold(self) -> bool:
    """Whether the answers have gold scores, and so are judged by them."""
    return any(found.gold is not None for found in self.measured.values())

  def along(self, policy: str) -> list[Measured]:
    """An RL policy's answers to the test prompts at each of its checkpoints and at its end; [] without checkpoints."""
    kept = list(self.checkpoints.get(policy, {}).values())
    return [*kept, self.measured[policy]] if kept else []
