"""Simulated labelers of the conversations, who differ as the people did that rated VADER's words.

A labeler reads the tone of an answer with one of the ten ratings of a word, weighs the gold score's other components in
a way of its own, adds noise, and calls answers with almost equal readings a tie. Seven columns of ratings are the
training labelers', three those of held-out labelers, who rank no training data. Called by
`instructjax.data.conversation`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from instructjax.core.errors import UserError
from instructjax.data import labeling
from instructjax.data.conversation import task
from instructjax.data.records import Ranking

_COLUMNS = {"train": (0, 1, 2, 3, 4, 5, 6), "heldout": (7, 8, 9)}
# Departs from paper: two labelers agree on about 81% of the pairs, where the paper's agree on 72.6% (sec 3.4). There
# are only 275 training prompts, and of noisier labelers a reward model learns little from so few.
_WEIGHT_SPREAD, _NOISE, _TIE_WIDTH = 0.25, 0.7, 0.3

# (prompts, responses) -> mean log-probability of each response under the frozen base [nats]
Logprob = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Labeler:
  """One simulated labeler."""

  id: str
  column: int  # of VADER's ratings
  weights: tuple[float, ...]  # of task.COMPONENTS


@functools.lru_cache(maxsize=8)
def labelers(group: str, seed: int) -> tuple[Labeler, ...]:
  """The labelers of a group, `train` or `heldout`.

  Raises:
    UserError: there is no such group.
  """
  if group not in _COLUMNS:
    raise UserError(f"group={group!r} of labelers must be one of {sorted(_COLUMNS)}")
  found = []
  for i, column in enumerate(_COLUMNS[group]):
    draws = task.keyed_rng(seed, "labelers", group, i).normal(size=len(task.COMPONENTS))
    weights = task.GOLD_WEIGHTS * np.exp(_WEIGHT_SPREAD * draws)
    # All labelers' weights get the same norm. Otherwise a labeler with larger weights would be less noisy.
    weights *= np.linalg.norm(task.GOLD_WEIGHTS) / np.linalg.norm(weights)
    found.append(Labeler(f"{group}_{i}", column, tuple(weights.tolist())))
  return tuple(found)


def rank(
  labeler: Labeler,
  prompt: str,
  responses: Sequence[str],
  logprob_N: np.ndarray,
  rng: np.random.Generator,
) -> tuple[int, ...]:
  """Ranks responses. 1 is best, equal ranks are ties, and no rank is skipped.

  Raises:
    UserError: as `task.gold_components`.
  """
  components = task.gold_components(prompt, responses, logprob_N, (labeler.column,))
  reading = components @ np.array(labeler.weights) + rng.normal(0, _NOISE, len(responses))
  return labeling.ranks_of(reading, _TIE_WIDTH)


def collect_rankings(
  prompts_and_responses: Sequence[tuple[str, Sequence[str]]],
  logprob: Logprob,
  group: str = "train",
  seed: int = 0,
  first: int = 0,
) -> list[Ranking]:
  """Lets one labeler of the group rank each prompt's responses.

  Args:
    prompts_and_responses: prompts of the task, each with 2 to 9 answers.
    logprob: the base's judgement of the answers.
    group: 'train' or 'heldout'.
    seed: determines the labelers, who ranks which prompt, and the noise.
    first: number of the first ranking; by a ranking's number it is drawn who makes it, and the noise.
  Raises:
    UserError: there is no such group, a prompt is not one of the task's, or it has too few or too many answers.
  """
  group_labelers, rankings = labelers(group, seed), []
  judged = _with_logprob(prompts_and_responses, logprob)
  for i, (prompt, answers, logprob_N) in enumerate(judged, first):
    # One generator per prompt, so that a ranking does not depend on the rankings before it.
    rng = task.keyed_rng(seed, "ranking", group, i)
    labeler = group_labelers[rng.integers(len(group_labelers))]
    ranks = rank(labeler, prompt, answers, logprob_N, rng)
    rankings.append(Ranking(prompt, tuple(answers), ranks, labeler.id))
  return rankings


def agreement(
  prompts_and_responses: Sequence[tuple[str, Sequence[str]]],
  logprob: Logprob,
  group: str = "train",
  seed: int = 0,
) -> dict[str, float]:
  """Measures how often two labelers of a group, drawn for each set of answers, order a pair alike.

  Args: as `collect_rankings`.
  Returns:
    As `labeling.agreement`.
  Raises:
    UserError: as in `collect_rankings`, or there is no pair that both labelers order.
  """
  group_labelers, ranked_twice = labelers(group, seed), []
  for i, (prompt, answers, logprob_N) in enumerate(_with_logprob(prompts_and_responses, logprob)):
    rng = task.keyed_rng(seed, "agreement", group, i)
    first, second = (
      rank(group_labelers[j], prompt, answers, logprob_N, rng)
      for j in rng.choice(len(group_labelers), size=2, replace=False)
    )
    ranked_twice.append((first, second))
  return labeling.agreement([prompt for prompt, _ in prompts_and_responses], ranked_twice)


def _with_logprob(prompts_and_responses, logprob: Logprob):
  """(prompt, answers, their log-probabilities) of each set, which the base reads in one call."""
  labeling.require_counts(prompts_and_responses)
  prompts = [prompt for prompt, answers in prompts_and_responses for _ in answers]
  responses = [answer for _, answers in prompts_and_responses for answer in answers]
  ends = np.cumsum([len(answers) for _, answers in prompts_and_responses])
  parts = np.split(np.asarray(logprob(prompts, responses)), ends[:-1])
  return [(*pair, part) for pair, part in zip(prompts_and_responses, parts, strict=True)]
