"""ROUGE-L of a summary, by `rouge-score` (extra `eval`)."""

import functools
from collections.abc import Sequence

from instructjax.core.errors import UserError


@functools.cache
def _scorer():
  try:
    from rouge_score import rouge_scorer
  except ImportError as error:
    raise UserError(
      f"ROUGE needs rouge-score ({error}): pip install 'instructjax[eval]'"
    ) from error
  return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def require():
  """Raises UserError if `rouge-score` is not installed."""
  _scorer()


def rouge_l(answer: str, golds: Sequence[str]) -> float:
  """The best F-measure of the longest common run of words over the reference summaries, with stems, in [0, 1]."""
  return max(_scorer().score(gold, answer)["rougeL"].fmeasure for gold in golds)
