"""What further rounds of comparisons bought (sec 3.1): how far each reward model is to be trusted where policies went.

Called by page.py and stages/evaluate.py. Pure functions of what evaluation measured.
"""

from typing import Any

import numpy as np

from instructjax.core.stages import RANKED, of_round
from instructjax.report import intervals
from instructjax.report.results import Results, Round


def correlation(
  reward_N: np.ndarray, gold_N: np.ndarray, samples_per_prompt: int, bootstrap: int, rng
) -> tuple[float, list[float]]:
  """Pearson's correlation of two scores of the same answers, as (value, 95% interval); 0 if a score never varies.

  A policy's own answers are the hard case: it has already won what the reward model can tell.

  Args:
    reward_N, gold_N: the scores; answers to one prompt stand in a row.
    samples_per_prompt: answers to each prompt.
    bootstrap: number of resamples of the prompts.
    rng: NumPy generator for the resampling.
  """
  both = np.stack([reward_N, gold_N]).astype(float)
  both = both - both.mean(axis=1, keepdims=True)  # for precision: sums of squares follow
  x_PS, y_PS = both.reshape(2, -1, samples_per_prompt)
  # Each prompt's sums of x, y, xx, yy, xy, from which a resample's correlation follows.
  parts = [value.sum(axis=1) for value in (x_PS, y_PS, x_PS**2, y_PS**2, x_PS * y_PS)]
  sums_P = np.stack(parts, axis=1)

  def pearson(sums, count):
    x, y, xx, yy, xy = np.moveaxis(sums, -1, 0) / count
    spread = np.sqrt(np.maximum(xx - x**2, 0) * np.maximum(yy - y**2, 0))
    return np.where(spread > 1e-12, (xy - x * y) / np.where(spread > 1e-12, spread, 1), 0.0)

  index = rng.integers(len(sums_P), size=(bootstrap, len(sums_P)))
  low, high = np.percentile(pearson(sums_P[index].sum(axis=1), x_PS.size), [2.5, 97.5])
  return float(pearson(sums_P.sum(axis=0), x_PS.size)), [float(low), float(high)]


def table(results: Results, *, bootstrap: int, seed: int) -> dict[str, Any]:
  """What each round's reward model and policy are; {} if there was one round.

  Returns:
    {'reward_models': one for each round: {'round', 'accuracy': (value, interval) on the held-out rankings of each
    round, 'heldout': the same on those of held-out labelers, None for a round without, 'correlation': policy ->
    (value, interval), by its scores and the gold scores of that policy's answers; None without gold scores},
    'policies': one for each round: {'round', 'policy', 'gold': mean or None, 'over_previous': win rate over the policy
    of the round before, as (value, interval); None for the first}}.
  """
  if not results.rounds:
    return {}
  rng, samples = np.random.default_rng(seed), results.samples_per_prompt
  names = [of_round(RANKED, row.number) for row in results.rounds]

  def agreement(row: Round, name: str):
    gold = results.measured[name].gold
    if gold is None:
      return None
    return correlation(row.reward[name], gold, samples, bootstrap, rng)

  def accuracy(judgement):
    value, reach = judgement.accuracy, 1.96 * judgement.accuracy_stderr
    return value, [value - reach, value + reach]

  def mean_gold(name: str) -> float | None:
    gold = results.measured[name].gold
    return None if gold is None else float(np.mean(gold))

  def over_previous(place: int):
    if not place:
      return None
    new, old = (results.measured[names[at]] for at in (place, place - 1))
    return intervals.win_rate(new, old, samples, bootstrap, rng)

  return {
    "reward_models": [
      {
        "round": row.number,
        "accuracy": [accuracy(judgement) for judgement in row.judgements],
        "heldout": [judgement and accuracy(judgement) for judgement in row.heldout],
        "correlation": {name: agreement(row, name) for name in names},
      }
      for row in results.rounds
    ],
    "policies": [
      {
        "round": row.number,
        "policy": name,
        "gold": mean_gold(name),
        "over_previous": over_previous(place),
      }
      for place, (row, name) in enumerate(zip(results.rounds, names, strict=True))
    ],
  }
