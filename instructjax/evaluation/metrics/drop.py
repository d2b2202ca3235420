"""F1 and exact match of DROP's official script (Dua et al. 2019): sets of words, numbers that must be right."""

import re
from collections.abc import Sequence

import numpy as np
from scipy import optimize  # pyrefly: ignore[untyped-import]  it has no types

from instructjax.evaluation.metrics.words import ARTICLES, PUNCTUATION


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def _word(token: str) -> str:
  token = token.lower()
  if not _is_number(token):
    token = token.translate(PUNCTUATION)
  if _is_number(token):
    token = str(float(token))
  return " ".join(ARTICLES.sub(" ", token).split())


def normalized(text: str) -> str:
  """The text in lower case without punctuation and articles, with numbers written one way, cut at hyphens too."""
  return " ".join(word for word in map(_word, re.split(" |-", text)) if word)


def _overlap(said: set[str], right: set[str]) -> float:
  """F1 of two sets of words; 0 if `right` has numbers, and none of them is said."""
  numbers = set(filter(_is_number, right))
  if numbers and not numbers & set(filter(_is_number, said)):
    return 0.0
  same = len(said & right)
  precision = same / len(said) if said else 1.0
  recall = same / len(right) if right else 1.0
  return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def scores(answer: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
  """(exact match, F1), both in [0, 1], the F1 rounded to two decimals as the script does.

  Args:
    answer: spans that are answered.
    gold: spans of a right answer. Both are aligned so that they overlap most, and the F1 of pairs is averaged over the
      larger number of spans.
  """
  said, right = [normalized(span) for span in answer], [normalized(span) for span in gold]
  exact = float(set(said) == set(right) and len(said) == len(right))
  table = [[_overlap(set(a.split()), set(g.split())) for a in said] for g in right]
  overlap = np.array(table)
  aligned = overlap[optimize.linear_sum_assignment(overlap, maximize=True)].sum()
  return exact, round(float(aligned) / max(len(said), len(right)), 2)


def best(answer: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
  """Exact match (of 1) and F1 (of 100) against the right answer that fits best, as (exact match, F1) are sorted."""
  exact, f1 = max(scores(answer, gold) for gold in golds)
  return {"f1": 100 * f1, "exact": exact}
