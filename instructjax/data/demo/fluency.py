"""Measures how fluent an answer is, with an interpolated trigram model on words.

Called by task.py for the gold score. The reward model never sees these numbers.
"""

from __future__ import annotations

import functools

import numpy as np

from instructjax.data.demo import text

# Weights of the trigram, bigram, unigram and uniform estimates.
_MIX = (0.45, 0.35, 0.19, 0.01)
# Log-probabilities of single words are clipped to this range before averaging. One rare word should not decide the
# score, and a sequence of very predictable words should not gain from it.
_CLIP = (-9.0, -2.0)


class TrigramModel:
  """A trigram model over words and punctuation marks, interpolated with shorter contexts.

  p(w|u,v) = .45 c(uvw)/c(uv) + .35 c(vw)/c(v) + .19 c(w)/N + .01/V, where c counts occurrences in the training text.
  """

  def __init__(self, sentences: list[str]):
    tokens = [text.tokenize(sentence) for sentence in sentences]
    names = sorted({token for row in tokens for token in row})
    self._id = {name: i + 2 for i, name in enumerate(names)}  # 0 is the start, 1 an unknown word
    # A trigram is stored as one integer with the digits u, v, w in base V. With sorted arrays of such keys, trigrams
    # are counted and looked up in a few numpy calls.
    self._base = len(names) + 2
    u, v, w, _ = self._trigrams(tokens)
    self._tri = np.unique((u * self._base + v) * self._base + w, return_counts=True)
    self._tri_context = np.unique(u * self._base + v, return_counts=True)
    self._bi = np.unique(v * self._base + w, return_counts=True)
    self._bi_context = np.unique(v, return_counts=True)
    self._uni = np.unique(w, return_counts=True)
    self._total = len(w)

  def _trigrams(self, token_rows):
    """All trigrams as three vectors of ids, and the row that each trigram belongs to."""
    lengths = np.array([len(row) for row in token_rows], np.int64)
    starts = np.cumsum(lengths + 2) - (lengths + 2)
    # Two start tokens (0) precede each row, so that its first word has a full context.
    flat = np.zeros(int(np.sum(lengths + 2)), np.int64)
    row = np.repeat(np.arange(len(token_rows)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = starts[row] + 2 + offset
    get = self._id.get
    flat[at] = [get(token, 1) for tokens in token_rows for token in tokens]
    return flat[at - 2], flat[at - 1], flat[at], row

  def mean_logprob(self, token_rows: list[list[str]]) -> np.ndarray:
    """The mean clipped log-probability of each row's tokens, in nats. A row without tokens gets the lower clip."""
    u, v, w, row = self._trigrams(token_rows)
    uv, vw = u * self._base + v, v * self._base + w
    tri = _count(self._tri, uv * self._base + w) / np.maximum(_count(self._tri_context, uv), 1)
    bi = _count(self._bi, vw) / np.maximum(_count(self._bi_context, v), 1)
    uni = _count(self._uni, w) / self._total
    prob = _MIX[0] * tri + _MIX[1] * bi + _MIX[2] * uni + _MIX[3] / self._base
    logprob = np.clip(np.log(prob), *_CLIP)
    size = np.bincount(row, minlength=len(token_rows))
    total = np.bincount(row, weights=logprob, minlength=len(token_rows))
    return np.where(size > 0, total / np.maximum(size, 1), _CLIP[0])


def _count(table: tuple[np.ndarray, np.ndarray], key: np.ndarray) -> np.ndarray:
  """Looks up the counts of keys in a table of (sorted keys, counts); 0 for keys that are not in it."""
  keys, counts = table
  at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
  return np.where(keys[at] == key, counts[at], 0)


@functools.lru_cache(maxsize=1)
def model() -> TrigramModel:
  """The model trained on the training clauses. The first call takes a second or two; the result is cached."""
  return TrigramModel(text.clauses("train"))
