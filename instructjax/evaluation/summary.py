"""Means, 95% intervals and paired differences of what models scored. Called by the command; pure but for `write`.

All models answer the same items, so that a difference is tested item by item: whether an item is hard drops out of it.
Items of one group (questions about one passage) are alike and are resampled together, as `resampling` does for prompts.
"""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.core.errors import writing
from instructjax.evaluation import resampling
from instructjax.evaluation.runner import Planned, Skipped
from instructjax.evaluation.task import Metric
from instructjax.report import intervals, public_findings, table14

BOOTSTRAP = 2000  # resamples of the groups of items
FEWEST = 10  # groups from which on a difference is told; with fewer, resampling them shows too little of the spread
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
  group_N = resampling.numbers_of(map(planned.task.group, planned.asked.items))
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
          "models": {
            name: measured(metric, values, group_N, seed) for name, values in found.items()
          },
          "differences": [
            difference(metric, a, b, found[a], found[b], group_N, seed)
            for a, b in itertools.combinations(found, 2)
            # Two models may have no item in common: each could be asked only what was too long for the other.
            if (_is_part(found[a]) & _is_part(found[b])).any()
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


def measured(metric: Metric, values: np.ndarray, group_N: np.ndarray, seed: int) -> dict[str, Any]:
  """The value of a metric, its 95% interval, and the number of items and of groups that it is of."""
  is_part_N = _is_part(values)
  values, group_N = values[is_part_N], group_N[is_part_N]
  value, interval = _resampled(metric, (values,), group_N, seed)
  return {
    "value": value,
    "interval": interval,
    "num_items": len(values),
    "num_groups": len(np.unique(group_N)),
  }


def difference(
  metric: Metric,
  a: str,
  b: str,
  values_a: np.ndarray,
  values_b: np.ndarray,
  group_N: np.ndarray,
  seed: int,
) -> dict[str, Any]:
  """The difference of b minus a over the items that both have, and what can be told of it.

  Args:
    metric: the metric.
    a, b: names of the models.
    values_a, values_b: their scores of the same items.
    group_N: number of each item's group.
    seed: of the resampling.
  """
  both = _is_part(values_a) & _is_part(values_b)
  values_a, values_b, group_N = values_a[both], values_b[both], group_N[both]
  value, interval = _resampled(metric, (values_a, values_b), group_N, seed)
  num_groups = len(np.unique(group_N))
  return {
    "a": a,
    "b": b,
    "difference": value,
    "interval": interval,
    "num_groups": num_groups,
    "verdict": verdict(interval, num_groups),
  }


def _resampled(
  metric: Metric, values: tuple[np.ndarray, ...], group_N: np.ndarray, seed: int
) -> tuple[float, list[float]]:
  """A metric of a model's scores, or its difference of two (the second minus the first): (value, 95% interval)."""
  rng = np.random.default_rng(seed)
  corpus = metric.corpus
  if corpus is None:
    of_items = values[0] if len(values) == 1 else values[1] - values[0]
    found = resampling.share(of_items, group_N, BOOTSTRAP, rng)
    if found is None:
      raise ValueError(f"no item has {metric.key}")
    return found
  groups, place_N = np.unique(group_N, return_inverse=True)
  signs, by_group = (1,) if len(values) == 1 else (-1, 1), []
  for of_items in values:
    sums = np.zeros((len(groups), of_items.shape[1]))
    np.add.at(sums, place_N, of_items)
    by_group.append(sums)

  totals = [of_items.sum(axis=0) for of_items in values]
  value = sum(sign * corpus(total) for sign, total in zip(signs, totals))
  resampled = [
    sum(sign * corpus(sums[index].sum(axis=0)) for sign, sums in zip(signs, by_group))
    for block in resampling.resamples(len(groups), BOOTSTRAP, rng)
    for index in block
  ]
  low, high = np.percentile(resampled, [2.5, 97.5])
  return float(value), [float(low), float(high)]


def verdict(interval: Sequence[float], num_groups: int) -> str:
  """ "higher" or "lower" if the interval leaves out 0, else "cannot be told"."""
  if num_groups < FEWEST:
    return CANNOT_BE_TOLD
  if intervals.above(interval, 0.0):
    return "higher"
  return "lower" if intervals.below(interval, 0.0) else CANNOT_BE_TOLD


def _is_part(values: np.ndarray) -> np.ndarray:
  return np.isfinite(values).reshape(len(values), -1).min(axis=1)


def whole(
  models: Mapping[str, str],
  parts: Sequence[Mapping[str, Any]],
  skipped: Sequence[Skipped],
  settings: Mapping[str, Any],
  memory: Mapping[str, int | None],
) -> dict[str, Any]:
  """The summary of an evaluation.

  Args:
    models: name -> what was given for it.
    parts: of `part`.
    skipped: tasks that were not asked.
    settings: how it was asked, to be shown.
    memory: the most that the process has had.
  """
  return {
    "models": dict(models),
    "settings": dict(settings) | {"bootstrap": BOOTSTRAP, "fewest_items": FEWEST},
    "memory": dict(memory),
    "skipped": [{"task": one.name, "reason": one.reason} for one in skipped],
    "parts": list(parts),
    "findings": public_findings.find(parts, FEWEST),
  }


def write(path: pathlib.Path, summary: Mapping[str, Any]):
  """Writes summary.json.

  Raises:
    UserError: it cannot be written.
  """
  with writing(path):
    path.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
