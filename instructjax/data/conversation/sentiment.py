"""How kind a text reads, by VADER's rules and by the ratings of chosen people.

The package `vaderSentiment` (MIT) holds some 7,500 words, each with the ratings that ten people gave it, from -4 to 4.
VADER takes their mean; a labeler here takes a few of the ten, so that two of them differ as people did. The columns of
the table are ratings of people, not of one person throughout. Called by task.py and labelers.py.
"""

from __future__ import annotations

import functools
import importlib
import json
import statistics

from instructjax.core.errors import UserError
from instructjax.data.conversation import text

PACKAGE = "vaderSentiment"
ALL = tuple(range(10))


@functools.lru_cache(maxsize=1)
def _ratings() -> dict[str, tuple[int, ...]]:
  """The ten ratings of each word.

  Raises:
    UserError: the package is not installed, or its table has another form than expected.
  """
  path = text.require_package(PACKAGE, "the ratings of words") / "vader_lexicon.txt"
  try:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    found = {row[0]: tuple(json.loads(row[3])) for row in rows}
    if any(len(ratings) != len(ALL) for ratings in found.values()):
      raise ValueError("not ten ratings a word")
  except (OSError, ValueError, IndexError) as error:
    raise UserError(
      f"{path} must hold a word and its ten ratings a line ({type(error).__name__});"
      " reinstall with `pip install --force-reinstall vaderSentiment==3.3.2`"
    ) from None
  return found


@functools.lru_cache(maxsize=16)
def _analyzer(columns: tuple[int, ...]):
  """VADER with the mean of some columns as a word's rating."""
  ratings = _ratings()
  vader = importlib.import_module(f"{PACKAGE}.{PACKAGE}")
  analyzer = vader.SentimentIntensityAnalyzer()
  analyzer.lexicon = {
    word: statistics.fmean(values[column] for column in columns) for word, values in ratings.items()
  }
  return analyzer


def compound(response: str, columns: tuple[int, ...] = ALL) -> float:
  """VADER's compound score of a text, from -1 (harsh) to 1 (kind).

  Args:
    response: the text; the empty text scores 0.
    columns: which of the ten ratings of a word count.
  Raises:
    UserError: the package is not installed, or its table has another form than expected.
  """
  return float(_analyzer(columns).polarity_scores(response)["compound"])
