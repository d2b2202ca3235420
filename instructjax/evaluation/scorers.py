"""Scorers of text: toxicity, truth, and the like, by whatever the user has.

Called by the evaluation's tasks. A scorer is named by a spec:

  python:MODULE:FUNCTION   a function from a list of texts, or of (prompt, answer) pairs, to a list of numbers
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

from instructjax.core.errors import UserError

Item = str | tuple[str, str]  # a text, or a prompt and its answer
PYTHON = "python:"


class Scorer(Protocol):
  """What every scorer has.

  Attributes:
    name: as the user gave it.
    auc: area under the ROC curve on held-out labelled texts; None if it was not measured.
  """

  name: str
  auc: float | None

  def score(self, items: Sequence[Item]) -> list[float]:
    """A number for each item; the more of what the scorer looks for, the higher."""


class _Function:
  def __init__(self, name: str, function: Callable[[Sequence[Item]], Sequence[float]]):
    self.name, self.auc, self._function = name, None, function

  def score(self, items: Sequence[Item]) -> list[float]:
    scores = [float(value) for value in self._function(list(items))]
    if len(scores) != len(items):
      raise UserError(f"{self.name} gave {len(scores)} scores for {len(items)} texts")
    return scores


def load(spec: str) -> Scorer:
  """Opens a scorer.

  Raises:
    UserError: there is no such scorer.
  """
  if spec.startswith(PYTHON):
    return _Function(spec, _function(spec))
  raise UserError(f"scorer {spec} must be {PYTHON}MODULE:FUNCTION")


def _function(spec: str) -> Callable:
  module, _, name = spec.removeprefix(PYTHON).partition(":")
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f"scorer {spec} cannot be imported: {error}") from error
