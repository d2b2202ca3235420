"""Means and differences with 95% intervals, and what an interval says about a threshold.

Called by the other modules of the report, and by stages/evaluate.py and measuring.py. Pure functions of what evaluation
measured.
"""

from collections.abc import Sequence

import numpy as np

from instructjax.report.results import Measured

Interval = Sequence[float]  # (low, high)


def mean_interval(values_P: np.ndarray, bootstrap: int, rng) -> tuple[float, list[float]]:
  """(mean, 95% percentile interval) of per-prompt values by bootstrap, which resamples prompts.

  Answers to one prompt are alike, so they are not independent samples. Callers first average over a prompt's answers,
  and the interval says how the mean would vary with other prompts.
  """
  # scipy.stats.bootstrap gives the same digits from the same seed (the tests compare with it). Here and below it would
  # replace two lines, take 1.2 to 1.5 times as long (256 and 512 prompts, scipy 1.17), cost over a second to import,
  # and refuse a run with a single prompt.
  index = rng.integers(len(values_P), size=(bootstrap, len(values_P)))
  low, high = np.percentile(values_P[index].mean(axis=1), [2.5, 97.5])
  return float(values_P.mean()), [float(low), float(high)]


def mean_of(values, samples_per_prompt: int, bootstrap: int, rng) -> tuple[float, list[float]]:
  """(mean, 95% interval) of a measurement of all answers, those to a prompt in a row, by bootstrap over prompts."""
  per_prompt = np.asarray(values, float).reshape(-1, samples_per_prompt).mean(axis=1)
  return mean_interval(per_prompt, bootstrap, rng)


def judged(measured: Measured) -> np.ndarray:
  """The scores that decide between two answers: the gold score if there is one, else the reward model's."""
  return measured.reward if measured.gold is None else measured.gold


def win_rate(
  a: Measured, b: Measured, samples_per_prompt: int, bootstrap: int, rng
) -> tuple[float, list[float]]:
  """How often policy a's answer to a prompt is judged better than b's, as (rate, 95% interval).

  Each answer of a is compared with each of b to the same prompt. Comparing the first with the first and so on would
  estimate the same rate from fewer comparisons, and so less exactly.

  Args:
    a, b: answers of two policies to the same prompts, in the same order.
    samples_per_prompt: answers to each prompt, which stand in a row.
    bootstrap: number of resamples of the prompts.
    rng: NumPy generator for the resampling.
  """
  a_PS, b_PS = (judged(one).reshape(-1, samples_per_prompt) for one in (a, b))
  difference_PSS = a_PS[:, :, None] - b_PS[:, None, :]
  # A tie is half a win for each: the rates of a over b and of b over a add up to 1, and equal policies get 0.5.
  wins_PSS = (difference_PSS > 0) + 0.5 * (difference_PSS == 0)
  return mean_interval(wins_PSS.mean(axis=(1, 2)), bootstrap, rng)


def loss_difference(rows_a, rows_b, bootstrap: int, rng) -> tuple[float, list[float]]:
  """The difference of two policies' mean loss per token, a minus b, as (nats, 95% interval).

  Rows are resampled together for both: they are the same rows of text, so whether a row is hard drops out of the
  difference.

  Args:
    rows_a, rows_b: [rows, 2] as `Results.pretraining` holds them.
    bootstrap: number of resamples of the rows.
    rng: NumPy generator for the resampling.
  """
  rows_a, rows_b = np.asarray(rows_a, float), np.asarray(rows_b, float)
  index = rng.integers(len(rows_a), size=(bootstrap, len(rows_a)))

  def mean(rows, index=slice(None)):
    return rows[index, 0].sum(axis=-1) / rows[index, 1].sum(axis=-1)

  low, high = np.percentile(mean(rows_a, index) - mean(rows_b, index), [2.5, 97.5])
  return float(mean(rows_a) - mean(rows_b)), [float(low), float(high)]


def above(interval: Interval, threshold: float) -> bool | None:
  """Whether the number is above the threshold; None, which is "cannot be told", if the interval has it inside."""
  low, high = interval
  if low > threshold:
    return True
  return False if high <= threshold else None


def below(interval: Interval, threshold: float) -> bool | None:
  """As `above`, from the other side."""
  return above((-interval[1], -interval[0]), -threshold)


def at_least(interval: Interval, threshold: float) -> bool | None:
  """As `above`, if the threshold itself will do."""
  low, high = interval
  if low >= threshold:
    return True
  return False if high < threshold else None


def at_most(interval: Interval, threshold: float) -> bool | None:
  """As `below`, if the threshold itself will do."""
  return at_least((-interval[1], -interval[0]), -threshold)


def all_of(*answers: bool | None) -> bool | None:
  """Whether all are true: one that is false decides, and else one that cannot be told."""
  if any(answer is False for answer in answers):
    return False
  return None if any(answer is None for answer in answers) else True
