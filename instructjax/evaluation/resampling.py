"""Intervals by resampling prompts with all that belongs to them, and how tables show them. Pure functions.

Called by preference.py, reward_models.py and the two commands. The verdicts on one prompt are not independent of each
other, so that an interval over verdicts would be too narrow.
"""

from collections.abc import Iterable, Sequence

import numpy as np

Share = tuple[float, list[float]]  # a mean and its 95% interval


def numbers_of(prompts: Iterable[str]) -> np.ndarray:
  """The number of each prompt among the different ones."""
  known: dict[str, int] = {}
  return np.array([known.setdefault(prompt, len(known)) for prompt in prompts], int)


def share(value_N: np.ndarray, prompt_N: np.ndarray, bootstrap: int, rng) -> Share | None:
  """(mean over verdicts, 95% interval by resampling prompts with all their verdicts); None without any.

  Args:
    value_N: the verdicts.
    prompt_N: number of the prompt of each.
    bootstrap: resamples.
    rng: NumPy's generator.
  """
  if not len(value_N):
    return None
  _, place_N = np.unique(prompt_N, return_inverse=True)
  sum_P, count_P = np.bincount(place_N, value_N), np.bincount(place_N)
  index = rng.integers(len(sum_P), size=(bootstrap, len(sum_P)))
  means = sum_P[index].sum(axis=1) / count_P[index].sum(axis=1)
  low, high = np.percentile(means, [2.5, 97.5])
  return float(np.mean(value_N)), [float(low), float(high)]


def shown(found: tuple[float, Sequence[float]] | None) -> str:
  """A cell of a table; empty for None."""
  return f"{found[0]:.3f} [{found[1][0]:.3f}, {found[1][1]:.3f}]" if found else ""
