"""The word overlap of SQuAD's official script, on which QuAC's is built too (Rajpurkar et al. 2016, 2018)."""

import collections
import re
import string
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
  """The text in lower case, without ASCII punctuation and articles, and with single spaces."""
  return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1(answer: str, gold: str) -> float:
  """F1 of the words that both texts have, each as often as in both; two empty texts agree, in [0, 1]."""
  said, right = normalized(answer).split(), normalized(gold).split()
  if not said or not right:
    return float(said == right)
  same = sum((collections.Counter(said) & collections.Counter(right)).values())
  if not same:
    return 0.0
  precision, recall = same / len(said), same / len(right)
  return 2 * precision * recall / (precision + recall)


def exact(answer: str, gold: str) -> float:
  """1 if both texts are the same but for what `normalized` takes away, else 0."""
  return float(normalized(answer) == normalized(gold))


def best(measure, answer: str, golds: Sequence[str]) -> float:
  """The highest value of `measure` over the right answers; without one, the right answer is the empty text."""
  golds = [gold for gold in golds if normalized(gold)] or [""]
  return max(measure(answer, gold) for gold in golds)
