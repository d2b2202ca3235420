"""Scorers of text: toxicity, truth, and the like, by whatever the user has.

Called by the evaluation's tasks. A scorer is named by a spec:

  python:MODULE:FUNCTION   a function from a list of texts, or of (prompt, answer) pairs, to a list of numbers
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence

from instructjax.core.errors import UserError

Item = str | tuple[str, str]  # a text, or a prompt and its answer
PYTHON = "python:"


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
  """What gives every text a number.

  Attributes:
    name: as the user gave it.
    auc: area under the ROC curve on held-out labelled texts; None if it was not measured.
    call: items -> numbers; the more of what the scorer looks for, the higher.
  """

  name: str
  auc: float | None
  call: Callable[[Sequence[Item]], Sequence[float]]

  def score(self, items: Sequence[Item]) -> list[float]:
    """A number for each text, or (prompt, answer).

    Raises:
      UserError: the scorer gives another number of scores, or one that is not finite.
    """
    scores = [float(value) for value in self.call(list(items))]
    if len(scores) != len(items) or not all(map(math.isfinite, scores)):
      raise UserError(
        f"scorer {self.name} must give one finite number for each of {len(items)} texts, got {len(scores)} numbers"
      )
    return scores


def load(spec: str) -> Scorer:
  """Opens a scorer.

  Raises:
    UserError: there is no such scorer.
  """
  if spec.startswith(PYTHON):
    return Scorer(spec, None, _function(spec))
  raise UserError(f"scorer {spec} must be {PYTHON}MODULE:FUNCTION")


def _function(spec: str) -> Callable[[Sequence[Item]], Sequence[float]]:
  module, _, name = spec.removeprefix(PYTHON).partition(":")
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f"scorer {spec} cannot be imported: {error}") from error
