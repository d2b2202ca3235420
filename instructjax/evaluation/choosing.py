"""Scores of multiple-choice answers: the paper's rule, and lm-evaluation-harness's two.

Called by the tasks. Pure functions of what the model gives each choice.
"""

import itertools
import math
from collections.abc import Sequence

from instructjax.evaluation.task import Choice, Metric

ACCURACY = Metric("accuracy", "Accuracy", "share", 1)
ACC = Metric("acc", "acc", "share", 1)
ACC_NORM = Metric("acc_norm", "acc_norm", "share", 1)
METRICS = (ACCURACY, ACC, ACC_NORM)
ENTROPY = Metric("entropy", "Entropy", "bits", 0)


def per_token(choice: Choice) -> float:
  """Mean log-prob of a choice's own tokens [nats].

  Line breaks at its beginning are the context's, as at the end of a chat template: see `encoding.pair_ids`. In the mean
  they would favour short choices.
  """
  own = list(
    itertools.dropwhile(
      lambda pair: not pair[1].strip("\r\n"), zip(choice.log_probs, choice.tokens, strict=True)
    )
  )
  log_probs = [value for value, _ in own] or choice.log_probs
  return sum(log_probs) / max(len(log_probs), 1)


def highest(values: Sequence[float]) -> int:
  """The place of the highest value; the first of equals, as NumPy's argmax."""
  return max(range(len(values)), key=lambda i: (values[i], -i))


def scores(gold: int, choices: Sequence[Choice], lengths: Sequence[int]) -> dict[str, float]:
  """1 or 0 by each of three rules.

  Args:
    gold: number of the right choice.
    choices: what the model gives each.
    lengths: characters of each choice, without the space before it.
  Returns:
    accuracy: the highest log-prob a token wins (the paper, App. D, which writes "lowest").
    acc: the highest sum wins.
    acc_norm: the highest sum over characters wins.
  """
  sums = [choice.log_prob for choice in choices]
  by_length = [total / max(length, 1) for total, length in zip(sums, lengths, strict=True)]
  return {
    "accuracy": float(highest([per_token(choice) for choice in choices]) == gold),
    "acc": float(highest(sums) == gold),
    "acc_norm": float(highest(by_length) == gold),
  }


def probabilities(log_probs: Sequence[float]) -> list[float]:
  """Probabilities that are proportional to exp(log_probs)."""
  top = max(log_probs)
  weights = [math.exp(value - top) for value in log_probs]
  return [weight / sum(weights) for weight in weights]


def entropy_bits(log_probs: Sequence[float]) -> float:
  """Entropy of the choice in bits: 0 if the model is certain, 1 if two choices are equally likely (App. D.1)."""
  return -sum(p * math.log2(p) for p in probabilities(log_probs) if p > 0) + 0.0
