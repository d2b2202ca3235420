"""Gao et al.'s forms of over-optimisation fitted to gold and reward against sqrt(KL), with bootstrap intervals.

The forms are R(d) = d (alpha - beta d) for best-of-n and d (alpha - beta log d) for RL, with d = sqrt(KL)
(arXiv:2210.10760, sec 3.1); overoptimization.py has them. Called by page.py for one run and by comparison_page.py for
several. Pure functions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from instructjax.report import overoptimization, tables
from instructjax.report.intervals import Interval
from instructjax.report.results import Results

_FEWEST = 3  # runs of best-of-n from which an interval over runs is given
_TOLD = 0.95  # share of the resamples that must have a peak for its interval


Points = tuple[np.ndarray, np.ndarray]  # (distance, score), one of each an iteration or an n


@dataclasses.dataclass(frozen=True)
class Fit:
  """One form fitted to one score.

  Attributes:
    alpha, beta: its coefficients, in units of the score.
    alpha_interval, beta_interval: 95% percentile intervals; None if there is nothing to resample.
    peak: the d at which the fitted curve is highest; None if it does not rise and then fall.
    peak_interval: its 95% interval; None unless nearly all resamples have a peak.
    r_squared: share of the scores' variance that the form explains.
    top: the d at which the measured scores, as running means over iterations, are highest.
    reach: the largest d that was measured.
  """

  alpha: float
  beta: float
  alpha_interval: Interval | None
  beta_interval: Interval | None
  peak: float | None
  peak_interval: Interval | None
  r_squared: float
  top: float
  reach: float


def in_words(which: str, score: str, fit: Fit) -> str:
  """A fit in a sentence: the form with its intervals, how well it fits, and where it and the measured scores peak.

  The fitted peak is named only if it lies within what was measured.
  """
  number = tables.number
  between = lambda bounds: f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else ""
  label, term = (
    ("Best of n", "d") if which == "best_of_n" else ("PPO without a KL penalty", "log d")
  )
  words = (
    f"{label}: {score} ≈ d (α − β {term}) with α = {number(fit.alpha)}{between(fit.alpha_interval)},"
    f" β = {number(fit.beta)}{between(fit.beta_interval)}, R² = {number(fit.r_squared)}"
  )
  if fit.peak is not None and fit.peak <= fit.reach:
    words += f"; the form is highest at d = {number(fit.peak)}{between(fit.peak_interval)}"
  return f"{words}; the measured {score} is highest at d = {number(fit.top)}. "


def _design(which: str, distance: np.ndarray) -> np.ndarray:
  """[..., 2]: what alpha and beta multiply."""
  alone = lambda alpha, beta: overoptimization.curve(which, distance, alpha, beta)
  return np.stack([alone(1.0, 0.0), alone(0.0, 1.0)], axis=-1)


def _solve(design_N2: np.ndarray, score_N: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
  """[B, 2]: least squares with weights, by the normal equations; NaN where the points do not tell two unknowns."""
  products = design_N2[:, :, None] * design_N2[:, None, :]
  left_B22 = np.tensordot(weight_BN, products, axes=1)
  right_B2 = weight_BN @ (design_N2 * score_N[:, None])
  determinant = np.linalg.det(left_B22)
  scale = np.prod(np.diagonal(left_B22, axis1=1, axis2=2), axis=1)
  is_told = determinant > 1e-9 * scale
  left_B22 = np.where(is_told[:, None, None], left_B22, np.eye(2))
  solved = np.linalg.solve(left_B22, right_B2[:, :, None])[:, :, 0]
  return np.where(is_told[:, None], solved, np.nan)


def fit_runs(which: str, runs: Sequence[Points], *, bootstrap: int, seed: int) -> Fit | None:
  """Fits one curve to the points of all runs; None if there are too few different points.

  The interval resamples whole runs and, of RL, the iterations within each, whose batches are of different prompts. The
  points of one best-of-n curve come from the same answers, so that they are not resampled: it takes three runs.

  Args:
    which: `best_of_n` or `rl`.
    runs: for each, the distances and the scores, counted from the PPO initialisation.
    bootstrap: number of resamples.
    seed: of the resampling.
  """
  if not runs:
    return None
  distance, score = (np.concatenate(part) for part in zip(*runs))
  fitted = overoptimization.fit(which, distance, score)
  if fitted is None:
    return None
  rng = np.random.default_rng(seed)
  resampled = which == "rl" or len(runs) >= _FEWEST
  weights = _weights([len(d) for d, _ in runs], which == "rl", bootstrap if resampled else 0, rng)
  again = _solve(_design(which, distance), score, weights)
  return _made(which, fitted, again, runs)


def _weights(sizes: Sequence[int], inside: bool, bootstrap: int, rng) -> np.ndarray:
  """[B, N]: how often each point is drawn, if runs are drawn with replacement, and points within a run if `inside`."""
  drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=bootstrap)
  parts = []
  for number, size in enumerate(sizes):
    times = drawn[:, number]
    within = (
      rng.multinomial(times * size, np.full(size, 1 / size))
      if inside
      else times[:, None].repeat(size, 1)
    )
    parts.append(within)
  return np.concatenate(parts, axis=1).astype(float)


def fit_prompts(
  distance_N: np.ndarray, score_PN: np.ndarray, *, bootstrap: int, seed: int
) -> Fit | None:
  """Fits the form of best-of-n to one run; the interval resamples the prompts.

  Args:
    distance_N: sqrt(KL) of each n.
    score_PN: expected score of each prompt's chosen answer, counted from the mean at n = 1.
    bootstrap: number of resamples.
    seed: of the resampling.
  """
  fitted = overoptimization.fit("best_of_n", distance_N, score_PN.mean(axis=0))
  if fitted is None:
    return None
  count = len(score_PN)
  rng = np.random.default_rng(seed)
  mean_BN = score_PN[rng.integers(count, size=(bootstrap, count))].mean(axis=1)
  # Each resample is counted from its own mean at n = 1.
  mean_BN = mean_BN - mean_BN[:, :1]
  design = _design("best_of_n", distance_N)
  again = np.linalg.lstsq(design, mean_BN.T, rcond=None)[0].T
  return _made("best_of_n", fitted, again, [(distance_N, score_PN.mean(axis=0))])


def _made(
  which: str, fitted: tuple[float, float], again_B2: np.ndarray, runs: Sequence[Points]
) -> Fit:
  alpha, beta = fitted
  distance, score = (np.concatenate(part) for part in zip(*runs))
  rest = score - overoptimization.curve(which, distance, alpha, beta)
  variance = float(np.sum((score - score.mean()) ** 2))
  kept = again_B2[np.isfinite(again_B2).all(axis=1)]
  peaks = [overoptimization.peak(which, *pair) for pair in kept]
  peaks = [peak for peak in peaks if peak is not None]
  has_peaks = bool(peaks) and len(peaks) >= _TOLD * len(again_B2)
  return Fit(
    alpha=alpha,
    beta=beta,
    alpha_interval=_interval(kept[:, 0]) if len(kept) else None,
    beta_interval=_interval(kept[:, 1]) if len(kept) else None,
    peak=overoptimization.peak(which, alpha, beta),
    peak_interval=_interval(peaks) if has_peaks else None,
    r_squared=1 - float(np.sum(rest**2)) / variance if variance else 0.0,
    top=_top(which, runs),
    reach=float(distance.max()),
  )


def _interval(values) -> Interval:
  low, high = np.percentile(values, [2.5, 97.5])
  return float(low), float(high)


def _top(which: str, runs: Sequence[Points]) -> float:
  """The d of the highest score: of best-of-n of the mean over runs, of RL of the mean over runs of running means."""
  size = min(len(d) for d, _ in runs)
  window = max(1, size // 12) if which == "rl" else 1
  smooth = lambda values: overoptimization.running_mean(values[:size], window)
  distance, score = (np.mean([smooth(run[i]) for run in runs], axis=0) for i in (0, 1))
  return float(distance[int(np.argmax(score))])


def of_results(results: Results, *, bootstrap: int, seed: int) -> dict[str, dict[str, Fit]]:
  """The fits of one run's report, in the units of `overoptimization.scores`.

  Returns:
    `best_of_n` or `rl` -> `gold` or `reward` -> the fit; without those that the points do not tell. Best-of-n of the
    score that judges has an interval over prompts; of the other only the means are kept, so it has none.
  """
  judge = "gold" if results.has_gold else "reward"
  found: dict[str, dict[str, Fit]] = {}
  for which, scores in overoptimization.scores(results).items():
    for key in ("gold", "reward"):
      if key not in scores:
        continue
      settings: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
      if which == "best_of_n" and key == judge:
        init = getattr(results.measured["ppo_init"], key)
        by_prompt = np.stack([row.by_prompt for row in results.best_of_n], axis=1)
        gain_PN = (by_prompt - by_prompt[:, 0].mean()) / (float(np.std(init)) or 1.0)
        fit = fit_prompts(scores["distance"], gain_PN, **settings)
      else:
        fit = fit_runs(which, [(scores["distance"], scores[key])], **settings)
      if fit:
        found.setdefault(which, {})[key] = fit
  return found
