"""Means, 95% intervals and paired differences of what models scored. Called by the command; pure but for `write`.

All models answer the same items, so that a difference is tested item by item: whether an item is hard drops out of it.
"""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.core.errors import writing
from instructjax.evaluation.runner import Planned, Skipped
from instructjax.evaluation.task import Metric
from instructjax.report import intervals, table14

BOOTSTRAP = 2000  # resamples of the items
FEWEST = 10  # items from which on a difference is told; with fewer, resampling them shows too little of the spread
CANNOT_BE_TOLD = "cannot be told"


def part(
  planned: Planned,
  scores: Mapping[str, Mapping[str, np.ndarray]],
  fits: Mapping[str, Mapping[str, int]],
  seed: int,
) -> dict[str, Any]:
  """The results of one prompt of a task.

  Args:
    planned: what was asked.
    scores: model -> metric -> score of each item; NaN where an item is no part of the metric.
    fits: model -> the number of items whose prompt was "cut", and of those that were "too long".
    seed: of the resampling.
  Returns:
    A JSON object; docs/evaluation.md describes it.
  """
  how = planned.task.prompts[planned.prompt]
  metrics = []
  for metric in planned.task.metrics:
    found = {name: of[metric.key] for name, of in scores.items() if metric.key in of}
    if found:
      metrics.append(
        {
          "key": metric.key,
          "title": metric.title,
          "show": metric.show,
          "better": metric.better,
          "is_shown": metric.key in how.metrics,
          "paper": table14.cells(planned.name, planned.prompt, metric.key),
          "models": {name: measured(metric, values, seed) for name, values in found.items()},
          "differences": [
            difference(metric, a, b, found[a], found[b], seed)
            for a, b in itertools.combinations(found, 2)
          ],
        }
      )
  return {
    "task": planned.name,
    "title": planned.task.title,
    "prompt": planned.prompt,
    "prompt_title": how.title,
    "data": planned.spec,
    "num_items": len(planned.asked.items),
    "shots": planned.asked.shots_from,
    "fits": {name: dict(counts) for name, counts in fits.items()},
    "missing": _missing(planned, scores, fits),
    "metrics": metrics,
  }


def _missing(
  planned: Planned,
  scores: Mapping[str, Mapping[str, np.ndarray]],
  fits: Mapping[str, Mapping[str, int]],
) -> dict[str, str]:
  """Metric of the prompt -> which models have no number for it, and why; arguments as for `part`."""
  result = {}
  for key in planned.task.prompts[planned.prompt].metrics:
    without = [name for name, of in scores.items() if key not in of]
    if not without:
      continue
    whose = "" if len(without) == len(scores) else f"{', '.join(without)}: "
    if all(fits[name]["too long"] == len(planned.asked.items) for name in without):
      result[key] = f"{whose}every item is too long to be asked"
    else:
      result[key] = whose + ("no scorer (--scorers)" if planned.task.judges else "no item has it")
  return result


def measured(metric: Metric, values: np.ndarray, seed: int) -> dict[str, Any]:
  """The value of a metric, its 95% interval, and the number of items that it is of."""
  values = values[_is_part(values)]
  rng = np.random.default_rng(seed)
  if metric.corpus is None:
    value, interval = intervals.mean_interval(values, BOOTSTRAP, rng)
  else:
    sums = values[rng.integers(len(values), size=(BOOTSTRAP, len(values)))].sum(axis=1)
    value, interval = metric.corpus(values.sum(axis=0)), _percentiles(map(metric.corpus, sums))
  return {"value": float(value), "interval": interval, "num_items": len(values)}


def difference(
  metric: Metric, a: str, b: str, values_a: np.ndarray, values_b: np.ndarray, seed: int
) -> dict[str, Any]:
  """The difference of b minus a over the items that both have, and what can be told of it.

  Args:
    metric: the metric.
    a, b: names of the models.
    values_a, values_b: their scores of the same items.
    seed: of the resampling.
  """
  both = _is_part(values_a) & _is_part(values_b)
  values_a, values_b = values_a[both], values_b[both]
  rng = np.random.default_rng(seed)
  if metric.corpus is None:
    value, interval = intervals.mean_interval(values_b - values_a, BOOTSTRAP, rng)
  else:
    index = rng.integers(len(values_a), size=(BOOTSTRAP, len(values_a)))
    pairs = zip(values_a[index].sum(axis=1), values_b[index].sum(axis=1))
    value = metric.corpus(values_b.sum(axis=0)) - metric.corpus(values_a.sum(axis=0))
    interval = _percentiles(metric.corpus(of_b) - metric.corpus(of_a) for of_a, of_b in pairs)
  return {
    "a": a,
    "b": b,
    "difference": float(value),
    "interval": interval,
    "verdict": verdict(interval, len(values_a)),
  }


def verdict(interval: Sequence[float], num_items: int) -> str:
  """ "higher" or "lower" if the interval leaves out 0, else "cannot be told"."""
  if num_items < FEWEST:
    return CANNOT_BE_TOLD
  if intervals.above(interval, 0.0):
    return "higher"
  return "lower" if intervals.below(interval, 0.0) else CANNOT_BE_TOLD


def _is_part(values: np.ndarray) -> np.ndarray:
  return np.isfinite(values).reshape(len(values), -1).min(axis=1)


def _percentiles(values) -> list[float]:
  low, high = np.percentile(list(values), [2.5, 97.5])
  return [float(low), float(high)]


def whole(
  models: Mapping[str, str],
  parts: Sequence[Mapping[str, Any]],
  skipped: Sequence[Skipped],
  settings: Mapping[str, Any],
) -> dict[str, Any]:
  """The summary of an evaluation.

  Args:
    models: name -> what was given for it.
    parts: of `part`.
    skipped: tasks that were not asked.
    settings: how it was asked, to be shown.
  """
  return {
    "models": dict(models),
    "settings": dict(settings) | {"bootstrap": BOOTSTRAP, "fewest_items": FEWEST},
    "skipped": [{"task": one.name, "reason": one.reason} for one in skipped],
    "parts": list(parts),
  }


def write(path: pathlib.Path, summary: Mapping[str, Any]):
  """Writes summary.json.

  Raises:
    UserError: it cannot be written.
  """
  with writing(path):
    path.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
