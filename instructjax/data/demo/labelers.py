"""Simulated labelers of the default preset, who rank answers by a noisy reading of the gold score's components.

Each labeler has its own weights for the gold score's components, adds noise to every reading, and calls
answers with almost equal readings a tie. Held-out labelers rank no training data, and they differ more from each other.
Called by `instructjax.data.demo`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.data import labeling
from instructjax.data.demo import task
from instructjax.data.records import Ranking


@dataclasses.dataclass(frozen=True)
class Labeler:
  """One simulated labeler."""

  id: str
  weights: tuple[float, ...]  # weights of task.COMPONENTS
  noise: float  # standard deviation of the noise of a reading, in units of the gold score
  tie_width: float  # answers whose readings differ by less than this share a rank


@dataclasses.dataclass(frozen=True)
class _Group:
  """How the labelers of a group are drawn: log-normally around the gold weights, and around `noise` and `tie_width`."""

  size: int
  weight_spread: float
  noise: float
  tie_width: float
  habit_spread: float  # spread of noise and tie width


# Noise and tie width are chosen to match sec 3.4 of the paper: two training labelers agree on 72.6% of the pairs of SFT
# samples that neither calls a tie. 10 to 20% of the pairs are ties.
_GROUPS = {
  "train": _Group(size=10, weight_spread=0.25, noise=1.1, tie_width=0.6, habit_spread=0.15),
  "heldout": _Group(size=5, weight_spread=0.4, noise=1.05, tie_width=0.6, habit_spread=0.3),
}


@functools.lru_cache(maxsize=8)
def labelers(group: str, seed: int) -> tuple[Labeler, ...]:
  """The labelers of a group.

  Args:
    group: 'train' or 'heldout'.
    seed: any non-negative integer.
  Raises:
    UserError: there is no such group.
  """
  if group not in _GROUPS:
    raise UserError(f"group={group!r} of labelers must be one of {sorted(_GROUPS)}")
  spread = _GROUPS[group]
  rng = task.keyed_rng(seed, "labelers", group)
  # There is one column per component, one for noise and one for tie width. The columns are standardised so that the
  # spread within the group, and with it the agreement, hardly depends on the seed.
  draws = rng.normal(size=(spread.size, len(task.COMPONENTS) + 2))
  draws = (draws - draws.mean(0)) / draws.std(0)
  weights = task.GOLD_WEIGHTS * np.exp(spread.weight_spread * draws[:, :-2])
  # All labelers' weights get the same norm. Otherwise a labeler with larger weights would be less noisy.
  weights *= np.linalg.norm(task.GOLD_WEIGHTS) / np.linalg.norm(weights, axis=1, keepdims=True)
  noise = spread.noise * np.exp(spread.habit_spread * draws[:, -2])
  tie_width = spread.tie_width * np.exp(spread.habit_spread * draws[:, -1])
  return tuple(
    Labeler(f"{group}_{i}", tuple(weights[i].tolist()), float(noise[i]), float(tie_width[i]))
    for i in range(spread.size)
  )


def rank(
  labeler: Labeler, prompt: str, responses: Sequence[str], rng: np.random.Generator
) -> tuple[int, ...]:
  """Ranks responses. 1 is best, equal ranks are ties, and no rank is skipped.

  Raises:
    UserError: the prompt is not one of the task's.
  """
  return rank_components(labeler, task.gold_components(prompt, responses), rng)


def rank_components(
  labeler: Labeler, components: np.ndarray, rng: np.random.Generator
) -> tuple[int, ...]:
  """Ranks answers whose gold components, one row per answer, are already computed."""
  reading = components @ np.array(labeler.weights)
  reading = reading + rng.normal(0, labeler.noise, len(reading))
  return labeling.ranks_of(reading, labeler.tie_width)


def collect_rankings(
  prompts_and_responses: Sequence[tuple[str, Sequence[str]]],
  group: str = "train",
  seed: int = 0,
  first: int = 0,
) -> list[Ranking]:
  """Lets one labeler of the group rank each prompt's responses.

  Args:
    prompts_and_responses: prompts of the default task, each with 2 to 9 answers.
    group: 'train' or 'heldout'.
    seed: determines the labelers, who ranks which prompt, and the noise.
    first: number of the first ranking; by a ranking's number it is drawn who makes it, and the noise.
  Raises:
    UserError: there is no such group, a prompt is not one of the task's, or it has too few or too many answers.
  """
  group_labelers = labelers(group, seed)
  rankings = []
  for i, ((prompt, responses), components) in enumerate(
    zip(prompts_and_responses, _components_by_prompt(prompts_and_responses), strict=True), first
  ):
    # One generator per prompt, so that a ranking does not depend on the rankings before it.
    rng = task.keyed_rng(seed, "ranking", group, i)
    labeler = group_labelers[rng.integers(len(group_labelers))]
    ranks = rank_components(labeler, components, rng)
    rankings.append(Ranking(prompt, tuple(responses), ranks, labeler.id))
  return rankings


def agreement(
  prompts_and_responses: Sequence[tuple[str, Sequence[str]]], group: str = "train", seed: int = 0
) -> dict[str, float]:
  """Measures how often two labelers of a group who rank the same answers order a pair alike.

  Two randomly chosen labelers rank each set of answers.

  Args:
    prompts_and_responses: prompts of the default task, each with 2 to 9 answers.
    group: 'train' or 'heldout'.
    seed: determines the labelers, who ranks which prompt, and the noise.
  Returns:
    As `labeling.agreement`.
  Raises:
    UserError: as in `collect_rankings`, or there is no pair that both labelers order.
  """
  group_labelers = labelers(group, seed)
  ranked_twice = []
  for i, components in enumerate(_components_by_prompt(prompts_and_responses)):
    rng = task.keyed_rng(seed, "agreement", group, i)
    first, second = (
      rank_components(group_labelers[j], components, rng)
      for j in rng.choice(len(group_labelers), size=2, replace=False)
    )
    ranked_twice.append((first, second))
  return labeling.agreement([prompt for prompt, _ in prompts_and_responses], ranked_twice)


def _components_by_prompt(prompts_and_responses) -> list[np.ndarray]:
  """The gold components of each prompt's responses, computed in one call because the trigram model is vectorised."""
  labeling.require_counts(prompts_and_responses)
  prompts, responses, sizes = [], [], []
  for prompt, answers in prompts_and_responses:
    prompts += [prompt] * len(answers)
    responses += answers
    sizes.append(len(answers))
  components = task.gold_components(prompts, responses)
  return np.split(components, np.cumsum(sizes)[:-1]) if sizes else []
