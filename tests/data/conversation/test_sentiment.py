"""VADER by chosen columns of its ratings."""

import math

import pytest

from instructjax.core.errors import UserError
from instructjax.data.conversation import sentiment


def test_all_ratings_are_vaders_own_score(packages):
  from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

  theirs = SentimentIntensityAnalyzer().polarity_scores
  for line in ("I love you, and I am happy!", "You are NOT kind.", "The table.", ""):
    assert sentiment.compound(line) == pytest.approx(theirs(line)["compound"], abs=2e-3)


def test_one_column_by_hand(packages):
  """A lone word's compound is x / sqrt(x^2 + 15), rounded to four places, with x its rating."""
  ratings = sentiment._ratings()["happy"]
  for column, rating in enumerate(ratings):
    expected = rating / math.sqrt(rating**2 + 15)
    assert sentiment.compound("happy", (column,)) == pytest.approx(expected, abs=1e-4)
  assert len({*ratings}) > 1


def test_a_missing_package_names_the_extra(monkeypatch):
  monkeypatch.setattr(sentiment, "PACKAGE", "no_such_lexicon")
  sentiment._ratings.cache_clear()
  with pytest.raises(UserError, match="no_such_lexicon, which is not installed"):
    sentiment._ratings()


def test_a_damaged_table_is_one_line(monkeypatch, tmp_path):
  (tmp_path / "vader_lexicon.txt").write_text("happy\t2.7\t0.78\t[2, 2]\n")
  monkeypatch.setattr(sentiment.text, "require_package", lambda name, what: tmp_path)
  sentiment._ratings.cache_clear()
  with pytest.raises(UserError, match="a word and its ten ratings a line"):
    sentiment._ratings()
