"""BLEU of a set of translations, by `sacrebleu` (extra `eval`): counts an item, from which any sample is scored."""

import functools
from collections.abc import Sequence

from instructjax.core.errors import UserError


@functools.cache
def _bleu():
  try:
    from sacrebleu.metrics.bleu import BLEU
  except ImportError as error:
    raise UserError(f"BLEU needs sacrebleu ({error}): pip install 'instructjax[eval]'") from error
  return BLEU()  # 13a tokens, exponential smoothing, case matters: sacrebleu's own defaults


def require():
  """Raises UserError if `sacrebleu` is not installed."""
  _bleu()


def counts(answer: str, golds: Sequence[str]) -> list[float]:
  """Lengths and n-gram counts of one translation: what sacrebleu sums over a corpus.

  Args:
    answer: the translation.
    golds: reference translations.
  Returns:
    [length, length of the reference, matches of 1 to 4 words, all of 1 to 4 words].
  """
  score = _bleu().corpus_score([answer], [[gold] for gold in golds])
  return [float(value) for value in (score.sys_len, score.ref_len, *score.counts, *score.totals)]


def corpus(sums: Sequence[float]) -> float:
  """BLEU in [0, 100] of translations whose `counts` add up to `sums`."""
  sizes = [int(value) for value in sums]
  found = _bleu().compute_bleu(
    correct=sizes[2:6], total=sizes[6:], sys_len=sizes[0], ref_len=sizes[1], smooth_method="exp"
  )
  return float(found.score)
