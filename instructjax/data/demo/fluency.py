"""How much an answer reads like the text: an interpolated trigram model on words.

Called by task.py for the gold score.  The reward model never sees this file or its numbers.
"""

from __future__ import annotations

import functools

import numpy as np

from instructjax.data.demo import text

# Shares of the trigram, bigram, unigram and uniform estimates.
_MIX = (0.45, 0.35, 0.19, 0.01)
# Log-probabilities of single words are clipped to this range before they are averaged, so that
# neither one rare word decides nor a run of very predictable ones pays.
_CLIP = (-9.0, -2.0)


class TrigramModel:
  """p(w|u,v) = .45 c(uvw)/c(uv) + .35 c(vw)/c(v) + .19 c(w)/N + .01/V, over words and marks."""

  def __init__(self, sentences: list[str]):
    tokens = [text.tokenize(sentence) for sentence in sentences]
    names = sorted({token for row in tokens for token in row})
    self._id = {name: i + 2 for i, name in enumerate(names)}  # 0 is the start, 1 the unknown word.
    self._base = len(names) + 2
    u, v, w, _ = self._trigrams(tokens)
    self._tri = np.unique((u * self._base + v) * self._base + w, return_counts=True)
    self._tri_context = np.unique(u * self._base + v, return_counts=True)
    self._bi = np.unique(v * self._base + w, return_counts=True)
    self._bi_context = np.unique(v, return_counts=True)
    self._uni = np.unique(w, return_counts=True)
    self._total = len(w)

  def _trigrams(self, token_rows):
    """Every trigram as three id vectors, and the row that each belongs to."""
    lengths = np.array([len(row) for row in token_rows], np.int64)
    starts = np.cumsum(lengths + 2) - (lengths + 2)
    flat = np.zeros(int(np.sum(lengths + 2)), np.int64)
    row = np.repeat(np.arange(len(token_rows)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = starts[row] + 2 + offset
    get = self._id.get
    flat[at] = [get(token, 1) for tokens in token_rows for token in tokens]
    return flat[at - 2], flat[at - 1], flat[at], row

  def mean_logprob(self, token_rows: list[list[str]]) -> np.ndarray:
    """Mean clipped natural-log probability of each row's tokens; the lower clip for no tokens."""
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
  keys, counts = table
  at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
  return np.where(keys[at] == key, counts[at], 0)


@functools.lru_cache(maxsize=1)
def model() -> TrigramModel:
  """The model of the training clauses (a second or two); the result is kept."""
  return TrigramModel(text.clauses("train"))
