"""Intervals by resampling prompts with all that belongs to them, and how tables show them. Pure functions.

Called by preference.py, reward_models.py and the two commands. The verdicts on one prompt are not independent of each
other, so that an interval over verdicts would be too narrow.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_BLOCK = 1 << 22  # places drawn at a time: 32 MiB
Share = tuple[float, list[float]]  # a mean and its 95% interval


def numbers_of(prompts: Iterable[str]) -> np.ndarray:
  """The number of each prompt among the different ones."""
  known: dict[str, int] = {}
  return np.array([known.setdefault(prompt, len(known)) for prompt in prompts], int)


def resamples(number: int, bootstrap: int, rng) -> Iterator[np.ndarray]:
  """Draws `number` places of as many, `bootstrap` times, in blocks [some, number] that fit in memory.

  The draws are those of one call of the generator, however many there are in a block.
  """
  rows = max(1, _BLOCK // max(number, 1))
  for start in range(0, bootstrap, rows):
    yield rng.integers(number, size=(min(rows, bootstrap - start), number))


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
  means = np.concatenate(
    [
      sum_P[index].sum(axis=1) / count_P[index].sum(axis=1)
      for index in resamples(len(sum_P), bootstrap, rng)
    ]
  )
  low, high = np.percentile(means, [2.5, 97.5])
  return float(np.mean(value_N)), [float(low), float(high)]


def shown(found: tuple[float, Sequence[float]] | None) -> str:
  """A cell of a table; empty for None."""
  return f"{found[0]:.3f} [{found[1][0]:.3f}, {found[1][1]:.3f}]" if found else ""
