"""Simulated labelers of the default preset: noisy readers of the gold score's components.

Each labeler weighs topic, tone, form, repetition and fluency in its own way, misreads every answer
a little, and calls near-equal answers a tie.  Held-out labelers, who label nothing that is trained
on, are drawn from wider spreads.  Called by `instructjax.data.demo`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.data.demo import task
from instructjax.data.records import Ranking

MIN_RESPONSES, MAX_RESPONSES = 2, 9


@dataclasses.dataclass(frozen=True)
class Labeler:
  """One simulated labeler."""

  id: str
  weights: tuple[float, ...]  # Over task.COMPONENTS.
  noise: float  # Standard deviation of one reading, in gold-score units.
  tie_width: float  # Answers that read closer than this share a rank.


@dataclasses.dataclass(frozen=True)
class _Group:
  """How a group of labelers is drawn; log-normal spreads around the gold weights and the means."""

  size: int
  weight_spread: float
  noise: float
  tie_width: float
  habit_spread: float  # Of noise and tie width.


# Noise and tie width are set so that two training labelers agree on 72.6% of the pairs of SFT
# samples that neither calls a tie (sec 3.4 of the paper), with 10 to 20% of pairs tied.
_GROUPS = {
  "train": _Group(size=10, weight_spread=0.25, noise=0.8, tie_width=0.4, habit_spread=0.15),
  "heldout": _Group(size=5, weight_spread=0.4, noise=0.75, tie_width=0.4, habit_spread=0.3),
}


@functools.lru_cache(maxsize=8)
def labelers(group: str, seed: int) -> tuple[Labeler, ...]:
  """The labelers of a group, 'train' or 'heldout'."""
  if group not in _GROUPS:
    raise UserError(f"group={group!r} of labelers must be one of {sorted(_GROUPS)}")
  spread = _GROUPS[group]
  rng = task.keyed_rng(seed, "labelers", group)
  # One column a component, then noise and tie width.  Columns are standardised, so that the spread
  # within the group, and with it the agreement, hardly depends on the seed.
  draws = rng.normal(size=(spread.size, len(task.COMPONENTS) + 2))
  draws = (draws - draws.mean(0)) / draws.std(0)
  weights = task.GOLD_WEIGHTS * np.exp(spread.weight_spread * draws[:, :-2])
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
  """Ranks the responses: 1 is best, equal ranks are ties, no rank is skipped."""
  return rank_components(labeler, task.gold_components(prompt, responses), rng)


def rank_components(
  labeler: Labeler, components: np.ndarray, rng: np.random.Generator
) -> tuple[int, ...]:
  """`rank` for answers whose gold components are known, one row an answer."""
  reading = components @ np.array(labeler.weights)
  reading = reading + rng.normal(0, labeler.noise, len(reading))
  ranks = np.zeros(len(reading), int)
  current, best_of_rank = 0, np.inf
  for i in np.argsort(-reading, kind="stable"):
    if best_of_rank - reading[i] >= labeler.tie_width:
      current, best_of_rank = current + 1, reading[i]
    ranks[i] = current
  return tuple(ranks.tolist())


def collect_rankings(
  prompts_and_responses: Sequence[tuple[str, Sequence[str]]], group: str = "train", seed: int = 0
) -> list[Ranking]:
  """Has each prompt's responses ranked by one labeler of the group.

  Args:
    prompts_and_responses: prompts of the default task, each with 2 to 9 answers.
    group: 'train' or 'heldout'.
    seed: draws the labelers, who ranks what, and every misreading.
  """
  group_labelers = labelers(group, seed)
  rankings = []
  for i, ((prompt, responses), components) in enumerate(
    zip(prompts_and_responses, _components_by_prompt(prompts_and_responses), strict=True)
  ):
    rng = task.keyed_rng(seed, "ranking", group, i)
    labeler = group_labelers[rng.integers(len(group_labelers))]
    ranks = rank_components(labeler, components, rng)
    rankings.append(Ranking(prompt, tuple(responses), ranks, labeler.id))
  return rankings


def agreement(
  prompts_and_responses: Sequence[tuple[str, Sequence[str]]], group: str = "train", seed: int = 0
) -> dict[str, float]:
  """How often two labelers of a group who rank the same answers order a pair alike.

  Every set of answers is ranked by two labelers.  Returns `agreement` (over the pairs that neither
  calls a tie), `agreement_stderr` (over distinct prompts, as what is said of one hangs together) and
  `tie_rate` (share of pairs that one labeler ties).
  """
  group_labelers = labelers(group, seed)
  same, decided, ties, pairs = [], [], 0, 0
  for i, components in enumerate(_components_by_prompt(prompts_and_responses)):
    rng = task.keyed_rng(seed, "agreement", group, i)
    first, second = (
      rank_components(group_labelers[j], components, rng)
      for j in rng.choice(len(group_labelers), size=2, replace=False)
    )
    signs = [
      (np.sign(first[a] - first[b]), np.sign(second[a] - second[b]))
      for a, b in itertools.combinations(range(len(first)), 2)
    ]
    same.append(sum(x == y != 0 for x, y in signs))
    decided.append(sum(x * y != 0 for x, y in signs))
    ties += sum((x == 0) + (y == 0) for x, y in signs)
    pairs += len(signs)
  if not sum(decided):
    raise UserError(f"no pair of answers in {len(same)} prompts was ordered by two labelers")
  prompts = [prompt for prompt, _ in prompts_and_responses]
  _, which = np.unique(prompts, return_inverse=True)
  same, decided = np.bincount(which, same), np.bincount(which, decided)
  mean = same.sum() / decided.sum()
  stderr = np.sqrt(np.sum((same - mean * decided) ** 2)) / decided.sum()
  return {
    "agreement": float(mean),
    "agreement_stderr": float(stderr),
    "tie_rate": float(ties / (2 * pairs)),
  }


def _components_by_prompt(prompts_and_responses) -> list[np.ndarray]:
  """Gold components of each prompt's responses, scored in one go."""
  prompts, responses, sizes = [], [], []
  for prompt, answers in prompts_and_responses:
    if not MIN_RESPONSES <= len(answers) <= MAX_RESPONSES:
      raise UserError(
        f"prompt={prompt!r} has {len(answers)} responses to rank; "
        f"must be {MIN_RESPONSES} to {MAX_RESPONSES}"
      )
    prompts += [prompt] * len(answers)
    responses += answers
    sizes.append(len(answers))
  components = task.gold_components(prompts, responses)
  return np.split(components, np.cumsum(sizes)[:-1]) if sizes else []
