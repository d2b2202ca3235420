"""The ranks of a prompt's answers, made of ranks, of scores or of pairwise judgements.

Called by records.py; formats.py asks what a score is. In all ranks 1 is best, equal ones are ties, and gaps mean
nothing. What makes ranks raises BadRecord.
"""

import bisect
import itertools
import math
from typing import Any

from instructjax.data.messages import BadRecord

_LARGEST_RANK = 2**31 - 1  # ranks are int32 in batches


def from_ranks(ranks: Any, where: str) -> tuple[int, ...]:
  """Ranks as they are. Only those too large for a batch are replaced by their places, since gaps mean nothing."""
  if not isinstance(ranks, list) or not all(_is_whole(rank) and rank >= 1 for rank in ranks):
    raise BadRecord(f"{where}: 'ranks' must be a list of integers >= 1")
  if max(ranks, default=0) > _LARGEST_RANK:
    order = sorted(set(ranks))
    return tuple(1 + bisect.bisect_left(order, rank) for rank in ranks)
  return tuple(int(rank) for rank in ranks)


def from_scores(scores: Any, where: str) -> tuple[int, ...]:
  """The ranks of scores, of which more is better."""
  if not isinstance(scores, list) or not all(map(is_score, scores)):
    raise BadRecord(f"{where}: 'scores' must be a list of finite numbers")
  order = sorted(-score for score in scores)
  return tuple(1 + bisect.bisect_left(order, -score) for score in scores)


def from_pairs(num_responses: int, pairs: Any, where: str) -> tuple[int, ...]:
  """Computes ranks from pairwise judgements.

  An answer's rank is 1 + the number of answers with more wins, where a tie counts as half a win. Every pair must be
  judged exactly once, because win counts are only comparable between answers with the same number of opponents.

  Judgements may contradict any ranking. The win count then smooths them: a cycle a > b > c > a becomes a three-way tie,
  and a tied pair becomes a preference if its answers have different results against the others.

  Args:
    num_responses: K, the number of answers.
    pairs: K(K-1)/2 objects {"a": index, "b": index, "winner": one of the two, or null for a tie}.
    where: `file:line`, for messages.
  Raises:
    BadRecord: pairs has another form, or does not contain every pair exactly once.
  """
  if not isinstance(pairs, list):
    raise BadRecord(f"{where}: 'comparisons' must be a list, got {type(pairs).__name__}")
  twice_wins = [0] * num_responses  # twice the number of wins, so that half a win is an integer
  judged = set()
  for pair in pairs:
    if not isinstance(pair, dict) or not {"a", "b", "winner"} <= pair.keys():
      raise BadRecord(f"{where}: each of 'comparisons' must be an object with a, b and winner")
    a, b, winner = pair["a"], pair["b"], pair["winner"]
    if not (
      _is_whole(a) and _is_whole(b) and 0 <= min(a, b) <= max(a, b) < num_responses and a != b
    ):
      raise BadRecord(
        f"{where}: a and b of a comparison must be two different indices below {num_responses}"
      )
    if winner is not None and not (_is_whole(winner) and winner in (a, b)):
      raise BadRecord(f"{where}: winner of a comparison must be its a={a}, its b={b} or null")
    if frozenset((a, b)) in judged:
      raise BadRecord(f"{where}: responses {min(a, b)} and {max(a, b)} are compared twice")
    judged.add(frozenset((a, b)))
    for index in (a, b):
      twice_wins[int(index)] += 1 if winner is None else 2 * (winner == index)
  for a, b in itertools.combinations(range(num_responses), 2):
    if frozenset((a, b)) not in judged:
      raise BadRecord(f"{where}: responses {a} and {b} are not compared; every pair must be")
  return tuple(1 + sum(other > wins for other in twice_wins) for wins in twice_wins)


def is_score(value: Any) -> bool:
  """Whether a value is a finite number that can be compared with others."""
  return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)  # JSON's true is an int in Python


def _is_whole(value: Any) -> bool:
  return _is_int(value) or (isinstance(value, float) and value.is_integer())
