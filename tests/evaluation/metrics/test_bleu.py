"""BLEU from counts of single items equals sacrebleu over the corpus."""

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation.metrics import bleu

ANSWERS = ["the cat sat on the mat", "he has a blue car", "yes"]
GOLDS = ["the cat sat on a mat", "he owns a blue car today", "no"]


def test_counts_add_up_to_the_corpus():
  sacrebleu = pytest.importorskip("sacrebleu")
  sums = [sum(column) for column in zip(*map(bleu.counts, ANSWERS, [[gold] for gold in GOLDS]))]
  expected = sacrebleu.corpus_bleu(ANSWERS, [GOLDS]).score
  assert bleu.corpus(sums) == pytest.approx(expected) and 0 < expected < 100
  # By hand: 6, 5 and 1 words; 5 + 4 of 12 words match; references of 6, 6 and 1 words.
  assert sums[:3] == [12, 13, 9]


def test_without_sacrebleu_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics.bleu", None)
  bleu._bleu.cache_clear()
  with pytest.raises(UserError, match=r"BLEU needs sacrebleu .* pip install 'instructjax\[eval\]'"):
    bleu.require()
