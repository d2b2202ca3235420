"""What each way of optimising gains at the same KL from the PPO initialisation: PPO, RLOO, GRPO and best-of-n.

A policy that may move further gains more, so methods are compared at equal KL. Called by panels.py, page.py and
stages/evaluate.py. Pure functions of what evaluation measured; draws nothing.

The curve of an RL run is that of the test prompts, if all runs have checkpoints that were measured
(`evaluate.checkpoints`): the PPO initialisation, the checkpoints and the finished policy. Else, for all runs alike, it
comes from the log: the KL and the score of each iteration's batch of training prompts, both as running means. Best-of-n
is measured on the test prompts; its KL has a closed form.

Between its points a curve is a line in sqrt(KL), as the figure draws it: gains grow about so (Gao et al. 2022,
arXiv:2210.10760), and checkpoints are few.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from instructjax.report import intervals
from instructjax.report.overoptimization import column, running_mean
from instructjax.report.results import Measured, Results

BEST_OF_N = "best_of_n"  # its name among the curves, beside those of RL policies
_LEVELS = 5  # KLs in the table
# An interval is shown if so many of the resampled curves reach the level at all.
_REACHED = 0.95


@dataclasses.dataclass(frozen=True)
class Curve:
  """One method's gain against KL, by iteration, by checkpoint or by n.

  Attributes:
    kl: nats from the PPO initialisation; smoothed if it comes from a log.
    gain: score above the PPO initialisation's mean, at the same place; smoothed too.
    noise: [2, N]: deviations of single iterations from the smoothed (KL, gain), as large as a single iteration's noise.
      Empty if there are too few iterations, and where prompts are resampled.
    window: iterations in a mean.
    by_prompt: [P, T]: the gain of each test prompt; None for a log.
    kl_by_prompt: [P, T]: the KL of each test prompt, of checkpoints; None if it does not depend on the prompts.
  """

  kl: np.ndarray
  gain: np.ndarray
  noise: np.ndarray
  window: int
  by_prompt: np.ndarray | None = None
  kl_by_prompt: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
  """A method's gain at a KL: a value, and its 95% interval if one can be told."""

  gain: float
  interval: tuple[float, float] | None


def _smoothed(kl, score) -> Curve:
  """The curve of single iterations; `score` is counted from the PPO initialisation.

  At a run's ends fewer iterations are at hand for a mean. Those noisy points are left out, all but the first.
  """
  single, reach = np.stack([kl, score]), len(kl) // 16
  if not reach:
    return Curve(single[0], single[1], np.zeros((2, 0)), 1)
  window = 2 * reach + 1
  smooth = running_mean(single, window)
  # A value is part of its own mean, so its distance from that is smaller than its noise.
  noise = (single - smooth)[:, reach:-reach] * np.sqrt(window / (window - 1))
  kept = np.concatenate([smooth[:, :1], smooth[:, reach:-reach]], axis=1)
  return Curve(kept[0], kept[1], noise, window)


def judge(results: Results) -> str:
  """The score that gains are counted in: `gold`, or `reward` if there are no gold scores."""
  return "gold" if results.has_gold else "reward"


def _logs(results: Results) -> dict[str, list[np.ndarray]]:
  """RL run -> KL and score of each of its iterations; without runs of one iteration, which are no curve."""
  runs = {name: column(rows, "kl", judge(results)) for name, rows in results.curves.items()}
  return {name: run for name, run in runs.items() if len(run[0]) > 1}


def are_of_test_prompts(results: Results) -> bool:
  """Whether the curves of RL runs are those of their checkpoints, as they are if all runs have some.

  A log and checkpoints are not put beside each other: they are of other prompts.
  """
  runs = _logs(results)
  return bool(runs) and "ppo_init" in results.measured and all(map(results.along, runs))


def _by_prompt(values, results: Results) -> np.ndarray:
  """[P]: the mean over the answers to each prompt."""
  return np.asarray(values, float).reshape(-1, results.samples_per_prompt).mean(axis=1)


def _of_checkpoints(results: Results, name: str) -> Curve:
  """The curve of a run on the test prompts. It begins with the PPO initialisation, whose gain and KL are 0."""
  init, points = results.measured["ppo_init"], results.along(name)
  gains = [
    _by_prompt(intervals.judged(point) - intervals.judged(init), results) for point in points
  ]
  kls = [_by_prompt(point.kl, results) for point in points]
  start = np.zeros(len(gains[0]))
  gain_PT, kl_PT = (np.stack([start, *columns], axis=1) for columns in (gains, kls))
  return Curve(kl_PT.mean(axis=0), gain_PT.mean(axis=0), np.zeros((2, 0)), 1, gain_PT, kl_PT)


def curves(results: Results) -> dict[str, Curve]:
  """The curve of each RL run with a log, and of best-of-n if it was measured.

  Gains of checkpoints are counted from the PPO initialisation on the same prompts, and those of best-of-n from n = 1.
  In a log all RL runs begin with samples of the PPO initialisation, before any update; there gains are counted from
  their mean over runs.
  """
  key, runs = judge(results), _logs(results)
  if not runs:
    return {}
  if are_of_test_prompts(results):
    found = {name: _of_checkpoints(results, name) for name in runs}
  else:
    origin = np.mean([score[0] for _, score in runs.values()])
    found = {name: _smoothed(kl, score - origin) for name, (kl, score) in runs.items()}
  if len(results.best_of_n) > 1:
    kl, score = column(map(vars, results.best_of_n), "kl", key)
    by_prompt = np.stack([row.by_prompt for row in results.best_of_n], axis=1)
    gain_PN = by_prompt - by_prompt[:, :1]
    found[BEST_OF_N] = Curve(kl, score - score[0], np.zeros((2, 0)), 1, gain_PN)
  return found


def crossing(kl: np.ndarray, gain: np.ndarray, at: float) -> np.ndarray:
  """The gain where a curve last passes a KL, on the line between its neighbours in sqrt(KL); NaN if it never does.

  A run may stay about one KL, held there by its penalty, and go on learning. So of several passes the last one counts.

  Args:
    kl, gain: [..., T] curves of T points. A KL near 0 may be estimated below 0.
    at: the KL, in nats.
  Returns:
    [...]
  """
  distance = kl - at
  passes = distance[..., :-1] * distance[..., 1:] <= 0
  before = passes.shape[-1] - 1 - passes[..., ::-1].argmax(axis=-1)[..., None]
  take = lambda x, place: np.take_along_axis(x, place, axis=-1)[..., 0]
  root = lambda x: np.sqrt(np.maximum(x, 0))
  low, high = root(take(kl, before)), root(take(kl, before + 1))
  share = np.where(high == low, 1.0, (root(at) - low) / np.where(high == low, 1.0, high - low))
  value = take(gain, before) + share * (take(gain, before + 1) - take(gain, before))
  return np.where(passes.any(axis=-1), value, np.nan)


def read(curve: Curve, at: float, *, bootstrap: int, seed: int) -> Reading | None:
  """The gain of a curve at a KL; None if it cannot be told, because the run never went so far.

  The interval of best-of-n and of checkpoints resamples the test prompts: KL, gain and what the gain is counted from
  are of the same prompts. That of a log resamples the noise of iterations, whose batches are of different prompts, and
  smooths again. No interval says how another seed of the training would differ.
  """
  value = float(crossing(curve.kl, curve.gain, at))
  if np.isnan(value):
    return None
  rng = np.random.default_rng(seed)
  if curve.by_prompt is not None:
    count = len(curve.by_prompt)
    index = rng.integers(count, size=(bootstrap, count))
    gain = _means(curve.by_prompt, index)
    kl = np.broadcast_to(curve.kl, gain.shape)
    if curve.kl_by_prompt is not None:
      kl = _means(curve.kl_by_prompt, index)
  elif curve.noise.size:
    reach, count = curve.window // 2, len(curve.kl)
    index = rng.integers(curve.noise.shape[1], size=(bootstrap, count + 2 * reach))
    noise = running_mean(curve.noise[:, index], curve.window)[..., reach : reach + count]
    kl, gain = curve.kl + noise[0], curve.gain + noise[1]
  else:
    return Reading(value, None)
  again = crossing(kl, gain, at)
  again = again[~np.isnan(again)]
  if len(again) < _REACHED * bootstrap:
    return Reading(value, None)
  low, high = np.percentile(again, [2.5, 97.5])
  return Reading(value, (float(low), float(high)))


def _means(values_PT: np.ndarray, index_BP: np.ndarray) -> np.ndarray:
  """[B, T]: means over each sample of prompts; point by point, since [B, P, T] values may not fit into memory."""
  return np.stack([values_P[index_BP].mean(axis=1) for values_P in values_PT.T], axis=1)


def levels(found: Mapping[str, Curve]) -> list[float]:
  """The KLs at which to compare: a few round numbers (1, 2, 5, 10 ..), the lowest of which all RL runs reached.

  [] if some run never left its start.
  """
  tops = [float(curve.kl.max()) for name, curve in found.items() if name != BEST_OF_N]
  if not tops or min(tops) <= 0:
    return []
  low, high = min(tops) / 5, max(tops)
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  steps = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
  steps = [step for step in steps if low <= step <= high]
  chosen = np.linspace(0, len(steps) - 1, min(len(steps), _LEVELS)).round().astype(int)
  return [steps[i] for i in chosen]


def table(results: Results, *, bootstrap: int, seed: int) -> dict[str, Any]:
  """Each method's gain at each level of KL, and where its policy was on the test prompts, in types that JSON has.

  Returns:
    {} if there is nothing to compare; else {'score': gold or reward, 'curves': checkpoints or log, what those of RL
    runs are made of, 'kl': levels, 'methods': name -> {'at': one entry a level, None where the run never went so far,
    'checkpoints': step, KL and gain of each, [] if curves are made of logs, 'end': KL and gain of the finished policy,
    None for best-of-n}}.
  """
  found = curves(results)
  at = levels(found)
  if not at:
    return {}
  is_of_test = are_of_test_prompts(results)
  rows = {}
  for name, curve in found.items():
    readings = [read(curve, level, bootstrap=bootstrap, seed=seed) for level in at]
    kept = results.checkpoints.get(name, {}) if is_of_test else {}
    rows[name] = {
      "at": [reading and dataclasses.asdict(reading) for reading in readings],
      "checkpoints": [
        {"step": step} | _place(results, policy, bootstrap, seed) for step, policy in kept.items()
      ],
      "end": _end(results, name, bootstrap, seed),
    }
  what = "checkpoints" if is_of_test else "log"
  return {"score": judge(results), "curves": what, "kl": at, "methods": rows}


def _end(results: Results, name: str, bootstrap: int, seed: int) -> dict[str, Any] | None:
  """Where a policy ended; None for best-of-n, and if its KL was not measured."""
  policy = results.measured.get(name)
  if policy is None or policy.kl is None or "ppo_init" not in results.measured:
    return None
  return _place(results, policy, bootstrap, seed)


def _place(results: Results, policy: Measured, bootstrap: int, seed: int) -> dict[str, Any]:
  """Where a policy is: KL and gain over the PPO initialisation on the test prompts, with intervals over prompts."""
  init = results.measured["ppo_init"]
  rng, samples = np.random.default_rng(seed), results.samples_per_prompt
  mean = lambda values: intervals.mean_of(values, samples, bootstrap, rng)
  gain, gain_interval = mean(intervals.judged(policy) - intervals.judged(init))
  kl, kl_interval = mean(policy.kl)
  return {"kl": kl, "kl_interval": kl_interval, "gain": gain, "interval": gain_interval}
