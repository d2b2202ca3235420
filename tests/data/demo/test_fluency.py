"""The fluency of the gold score: a trigram model of the text."""

import numpy as np

from instructjax.data.demo import fluency


def test_trigram_model_by_hand():
  model = fluency.TrigramModel(["the king", "the city"])
  # Ids: start, unknown, city, king, the -> base 5.  "the": c=2 of 2 in tri- and bigrams, 2 of 4.
  the = 0.45 * 1 + 0.35 * 1 + 0.19 * 0.5 + 0.01 / 5
  king = 0.45 * 0.5 + 0.35 * 0.5 + 0.19 * 0.25 + 0.01 / 5
  unseen = 0.01 / 5
  low, high = -9.0, -2.0
  expected = np.mean(np.clip(np.log([the, king, unseen]), low, high))
  rows = [["the", "king", "sea"], []]
  np.testing.assert_allclose(model.mean_logprob(rows), [expected, low], rtol=1e-12)
