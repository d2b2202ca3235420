"""Over-optimisation: gold score and reward-model score against sqrt(KL) (Gao et al. 2022, arXiv:2210.10760).

As a policy is optimised against the reward model, the reward rises while the gold score rises and then falls. Here RL
is measured by its log, one point an iteration on that iteration's training prompts; overoptimization_points.py has
checkpoints on the test prompts. Called by these, panels.py, figures.py and page.py. Pure functions of what evaluation
measured; draws nothing.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from instructjax.report.intervals import Interval
from instructjax.report.results import Measured, Results


@dataclasses.dataclass(frozen=True)
class Point:
  """PPO with beta = 0 after some iterations, measured on the test prompts, with 95% intervals over prompts.

  Attributes:
    step: iterations that it has had; None for the finished policy.
    distance: sqrt(KL) from the PPO initialisation, and its interval.
    scores: `gold`, if there are gold scores, and `reward` -> what is gained over the PPO initialisation on the same
      prompts, in standard deviations over its answers, and the interval.
  """

  step: int | None
  distance: tuple[float, Interval]
  scores: Mapping[str, tuple[float, Interval]]


def column(rows: Iterable[Mapping[str, Any]], *keys: str) -> list[np.ndarray]:
  """The named metrics of a stage's log as arrays, over those rows that have all of them."""
  kept = [row for row in rows if all(row.get(key) is not None for key in keys)]
  return [np.array([row[key] for row in kept], float) for key in keys]


def running_mean(values, window: int) -> np.ndarray:
  """The mean over a centred window of odd width. At the ends it is narrower, so that it stays centred there too.

  Args:
    values: [..., T]; the mean is along the last axis.
    window: its width; an even one counts as one more.
  """
  values = np.asarray(values, float)
  index = np.arange(values.shape[-1])
  wide = np.minimum(np.minimum(index, index[::-1]), window // 2)
  sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), values.cumsum(axis=-1)], axis=-1)
  return (sums[..., index + wide + 1] - sums[..., index - wide]) / (2 * wide + 1)


def scores(results: Results) -> dict[str, dict[str, np.ndarray]]:
  """Both scores at growing distance sqrt(KL), for `best_of_n` and for `rl` (PPO with beta = 0), if they were measured.

  Gold and reward have different scales. To be comparable they are counted from the PPO initialisation's mean, in
  standard deviations over its answers. That mean is, for best-of-n, the score at n = 1 and, for PPO, the mean over the
  RL runs of their first iteration, which samples before any update.

  Returns:
    {'best_of_n' or 'rl': {'distance', 'gold', 'reward'}}, one number for each n or each iteration. Without 'gold' if
    the answers have no gold score.
  """
  init = results.measured.get("ppo_init")
  if init is None:
    return {}
  answers = deviation = deviations(init)
  found = {}
  if results.best_of_n:
    kl, *rows = column(map(vars, results.best_of_n), "kl", *answers)
    found["best_of_n"] = {"distance": np.sqrt(kl)} | {
      key: (row - row[0]) / deviation[key] for key, row in zip(answers, rows)
    }
  runs = {name: column(rows, "kl", *answers) for name, rows in results.curves.items()}
  runs = {name: run for name, run in runs.items() if len(run[0])}
  if "ppo_beta0" in runs:
    kl, *rows = runs["ppo_beta0"]
    # All RL runs begin with samples of the same policy, so the mean over runs is a better estimate than one run's.
    origins = [np.mean([run[i][0] for run in runs.values()]) for i in range(1, 1 + len(answers))]
    # A KL near 0, as at the start, may be estimated below 0.
    found["rl"] = {"distance": np.sqrt(np.maximum(kl, 0))} | {
      key: (row - origin) / deviation[key] for key, row, origin in zip(answers, rows, origins)
    }
  return found


def deviations(init: Measured) -> dict[str, float]:
  """`gold`, if there is one, and `reward` -> the standard deviation over the PPO initialisation's answers."""
  answers = {"gold": init.gold, "reward": init.reward}
  return {
    key: float(np.std(values)) or 1.0 for key, values in answers.items() if values is not None
  }


def _penalty(which: str, distance):
  """The term of `curve` that beta multiplies: d^2 for `best_of_n`, d log d for `rl` (0 at d = 0)."""
  distance = np.asarray(distance, float)
  if which == "best_of_n":
    return distance**2
  return distance * np.log(np.where(distance > 0, distance, 1.0))


def curve(which: str, distance, alpha: float, beta: float) -> np.ndarray:
  """Gao et al.'s form of the gold score R(d) at d = sqrt(KL).

  R(d) = d (alpha - beta d) for `best_of_n`, d (alpha - beta log d) for `rl`.
  """
  return alpha * np.asarray(distance, float) - beta * _penalty(which, distance)


def fit(which: str, distance, score) -> tuple[float, float] | None:
  """Fits (alpha, beta) of `curve` by least squares; None if there are too few different points."""
  distance = np.asarray(distance, float)
  design = np.stack([distance, -_penalty(which, distance)], axis=1)
  # Two unknowns pass through any two points, so a fit means something from three on.
  if len(design) < 3 or np.linalg.matrix_rank(design) < 2:
    return None
  alpha, beta = np.linalg.lstsq(design, np.asarray(score, float), rcond=None)[0]
  return float(alpha), float(beta)


def peak(which: str, alpha: float, beta: float) -> float | None:
  """The sqrt(KL) at which `curve` is highest; None for a curve that does not rise and then fall."""
  if beta <= 0 or (which == "best_of_n" and alpha <= 0):
    return None
  return alpha / (2 * beta) if which == "best_of_n" else float(np.exp(alpha / beta - 1))
