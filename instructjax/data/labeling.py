"""What simulated labelers of any task share: ranks from readings, and how often two labelers agree.

Called by the labelers of `data/demo` and `data/conversation`. Knows nothing of what is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from instructjax.core.errors import UserError

MIN_RESPONSES, MAX_RESPONSES = 2, 9


def ranks_of(reading: np.ndarray, tie_width: float) -> tuple[int, ...]:
  """Ranks answers by a labeler's readings of them. 1 is best, equal ranks are ties, and no rank is skipped.

  Args:
    reading: one number per answer; higher is better.
    tie_width: answers whose readings differ by less than this share a rank.
  """
  ranks = np.zeros(len(reading), int)
  current, best_of_rank = 0, np.inf
  for i in np.argsort(-reading, kind="stable"):
    # Compared with the best answer of the rank, not with the previous one: a chain of small steps is not a tie.
    if best_of_rank - reading[i] >= tie_width:
      current, best_of_rank = current + 1, reading[i]
    ranks[i] = current
  return tuple(ranks.tolist())


def require_counts(prompts_and_responses: Sequence[tuple[str, Sequence[str]]]):
  """Checks that each prompt has as many answers as a labeler can rank.

  Raises:
    UserError: one has fewer or more.
  """
  for prompt, answers in prompts_and_responses:
    if not MIN_RESPONSES <= len(answers) <= MAX_RESPONSES:
      raise UserError(
        f"prompt={prompt!r} has {len(answers)} responses to rank; "
        f"must be {MIN_RESPONSES} to {MAX_RESPONSES}"
      )


def agreement(
  prompts: Sequence[str], ranked_twice: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, float]:
  """Measures how often two labelers who rank the same answers order a pair alike.

  Args:
    prompts: the prompt of each set of answers.
    ranked_twice: the ranks of each set by two labelers.
  Returns:
    agreement: share of pairs ordered alike, among the pairs that neither labeler calls a tie.
    agreement_stderr: its standard error. It is computed over distinct prompts, because judgements of the same prompt
      are not independent.
    tie_rate: share of pairs that a labeler calls a tie.
  Raises:
    UserError: there is no pair that both labelers order.
  """
  same, decided, ties, pairs = [], [], 0, 0
  for first, second in ranked_twice:
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
  _, which = np.unique(prompts, return_inverse=True)
  same, decided = np.bincount(which, same), np.bincount(which, decided)
  mean = same.sum() / decided.sum()
  # Standard error of a ratio of two sums over prompts (linearised).
  stderr = np.sqrt(np.sum((same - mean * decided) ** 2)) / decided.sum()
  return {
    "agreement": float(mean),
    "agreement_stderr": float(stderr),
    "tie_rate": float(ties / (2 * pairs)),
  }
