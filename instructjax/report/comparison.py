"""The numbers of several finished runs beside each other, by groups, with seeds as error bars.

Called by comparison_page.py and instructjax/compare.py. Pure functions of what the runs have written; draws nothing.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special  # pyrefly: ignore[untyped-import]  it has no types

from instructjax.core.stages import RL_STAGES
from instructjax.report.comparison_groups import Group, Run
from instructjax.report.overoptimization import column, running_mean
from instructjax.report.overoptimization_fits import Fit, fit_runs

# Findings whose measured values are win rates, and of what over what.
WIN_RATES = {
  ("rl_over_sft", "ppo"): "PPO over SFT",
  ("rl_over_sft", "ppo_ptx"): "PPO-ptx over SFT",
  ("preferred_over_base", "zero_shot"): "PPO-ptx over the larger base",
  ("preferred_over_base", "few_shot"): "PPO-ptx over the larger base, few-shot",
  ("over_untrained", "best_line"): "PPO-ptx over one training line for all",
  ("over_untrained", "demonstrations"): "PPO-ptx over test demonstrations",
  ("over_best_of_n", "ppo_ptx"): "PPO-ptx over best of n at its KL",
  ("new_topics", "ppo_ptx_over_sft"): "PPO-ptx over SFT, new topics",
}
_FEWEST = 3  # seeds of an interval: with two, Student's t is twelve times the standard error and tells nothing


@dataclasses.dataclass(frozen=True)
class Spread:
  """A number over the seeds of a group.

  Attributes:
    values: that of each seed.
    mean: their mean.
    std: their standard deviation, with n - 1; NaN for a single seed.
    interval: 95% interval of the mean by Student's t, which takes seeds for independent draws; None for fewer
      than three seeds.
  """

  values: tuple[float, ...]
  mean: float
  std: float
  interval: tuple[float, float] | None


def spread(values: Sequence[float]) -> Spread | None:
  """The spread of a number over seeds; None if no run has it."""
  kept = [float(value) for value in values if value is not None and math.isfinite(value)]
  if not kept:
    return None
  count, mean = len(kept), float(np.mean(kept))
  if count == 1:
    return Spread(tuple(kept), mean, math.nan, None)
  std = float(np.std(kept, ddof=1))
  if count < _FEWEST:
    return Spread(tuple(kept), mean, std, None)
  half = float(special.stdtrit(count - 1, 0.975)) * std / math.sqrt(count)
  return Spread(tuple(kept), mean, std, (mean - half, mean + half))


def finding_rows(found: Sequence[Group]) -> list[dict[str, Any]]:
  """Each finding over the groups.

  Returns:
    One for each finding, in the order of the first run that has it: {'id', 'claim', 'rule', 'measured': name -> a
    Spread or None for each group, 'holds': for each group how many of its runs say (yes, no, cannot be told)}.
  """
  firsts: dict[str, Mapping] = {}
  for group in found:
    for run in group.runs:
      for finding in run.findings:
        firsts.setdefault(finding["id"], finding)
  result = []
  for name, first in firsts.items():
    by_group = [
      [f for run in group.runs for f in run.findings if f["id"] == name] for group in found
    ]
    keys = dict.fromkeys(key for rows in by_group for row in rows for key in row["measured"])
    result.append(
      {
        "id": name,
        # What it says of one run, in brackets or as the n of best of n, is not said of all.
        "claim": re.sub(r" \([^()]*\d[^()]*\)|(?<=\bn) = \d+", "", first["claim"]),
        "rule": first["rule"],
        "measured": {
          key: [spread([row["measured"].get(key) for row in rows]) for rows in by_group]
          for key in keys
        },
        "holds": [
          tuple(sum(row["holds"] is answer for row in rows) for answer in (True, False, None))
          for rows in by_group
        ],
      }
    )
  return result


def win_rates(found: Sequence[Group]) -> dict[str, list[Spread | None]]:
  """What is preferred to what -> the rate over the seeds of each group; only rates that some run has."""
  rows = {row["id"]: row for row in finding_rows(found)}
  result = {}
  for (name, key), title in WIN_RATES.items():
    if name in rows and key in rows[name]["measured"]:
      result[title] = rows[name]["measured"][key]
  return result


def policy_rows(found: Sequence[Group]) -> dict[str, dict[str, list[Spread | None]]]:
  """Policy -> name of a measurement -> its spread in each group."""
  every = [run.policies for group in found for run in group.runs]
  result: dict[str, dict[str, list[Spread | None]]] = {}
  for policy in dict.fromkeys(name for row in every for name in row):
    keys = dict.fromkeys(key for row in every for key in row.get(policy, {}))
    value = lambda run, key, policy=policy: run.policies.get(policy, {}).get(key)
    result[policy] = {
      key: [spread([value(run, key) for run in group.runs]) for group in found] for key in keys
    }
  return result


def gains(run: Run, policy: str) -> dict[str, np.ndarray] | None:
  """One RL policy's way through a run: the KL of each iteration and what it has gained by then, as running means.

  Gains are counted from the mean of the first iterations of all RL policies, which sample before any update; those of
  the reward model in standard deviations of its scores, because each run's reward model has a scale of its own.

  Returns:
    {'kl', 'reward', and 'gold' if there are gold scores}; None without a log.
  """
  keys = [
    key for key in ("gold", "reward") if column(run.curves.get(policy, ()), "kl", key)[0].size > 1
  ]
  if "reward" not in keys:
    return None
  kl, *rows = column(run.curves[policy], "kl", *keys)
  window = max(1, len(kl) // 12)
  result = {"kl": np.maximum(running_mean(kl, window), 0)}
  for key, row in zip(keys, rows):
    scale = (run.reward_std or 1.0) if key == "reward" else 1.0
    result[key] = (running_mean(row, window) - _origin(run, key)) / scale
  return result


def _origin(run: Run, key: str) -> float:
  """The mean score of the first iterations of all RL policies, which sample before any update."""
  starts = [column(log, "kl", key)[1] for log in run.curves.values()]
  return float(np.mean([values[0] for values in starts if len(values)]))


def fits(group: Group, *, bootstrap: int = 1000) -> dict[tuple[str, str], Fit]:
  """Gao et al.'s forms fitted to the runs of a group, in the units of `gains`.

  Returns:
    (`best_of_n` or `rl`, `gold` or `reward`) -> fit. `rl` is PPO with beta = 0, the least bounded.
  """
  result = {}
  for key in ("gold", "reward"):
    scale = lambda run, key=key: (run.reward_std or 1.0) if key == "reward" else 1.0
    points = {"best_of_n": [], "rl": []}
    for run in group.runs:
      kl, score = column(run.best_of_n, "kl", key)
      if len(kl):
        points["best_of_n"].append((np.sqrt(kl), (score - score[0]) / scale(run)))
      kl, score = column(run.curves.get("ppo_beta0", ()), "kl", key)
      if len(kl):
        points["rl"].append((np.sqrt(np.maximum(kl, 0)), (score - _origin(run, key)) / scale(run)))
    for which, rows in points.items():
      fit = fit_runs(which, rows, bootstrap=bootstrap, seed=0)
      if fit:
        result[which, key] = fit
  return result


def ends(group: Group, policy: str) -> dict[str, Spread] | None:
  """Where a policy of a group ended on the test prompts: gold and reward gained over the PPO initialisation, KL, and
  the loss on pretraining text above SFT's (in nats a token); None if the policy is not there.
  """
  rows: dict[str, list[float]] = {}
  for run in group.runs:
    mine, init, sft = (run.policies.get(name, {}) for name in (policy, "ppo_init", "sft"))
    parts = {
      "kl": (mine.get("kl"), 0.0, 1.0),
      "gold": (mine.get("gold"), init.get("gold"), 1.0),
      "reward": (mine.get("reward"), init.get("reward"), run.reward_std or 1.0),
      "tax": (mine.get("pretrain_loss"), sft.get("pretrain_loss"), 1.0),
    }
    for key, (value, start, scale) in parts.items():
      if value is not None and start is not None:
        rows.setdefault(key, []).append((value - start) / scale)
  found = {key: spread(values) for key, values in rows.items()}
  return {key: value for key, value in found.items() if value} or None


def rl_policies(found: Sequence[Group]) -> list[str]:
  """The RL policies that some run has trained, in the order of the table of stages."""
  names = {name for group in found for run in group.runs for name in run.curves}
  return [name for name in RL_STAGES if name in names]


def differences(found: Sequence[Group], keys: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
  """Each later group minus the first, seed by seed: what is common to a seed drops out.

  Args:
    found: the groups.
    keys: (policy, measurement).
  Returns:
    Rows {'group', 'seeds', 'spreads': a Spread of the differences, or None, for each key}, of groups that share two
    seeds or more with the first.
  """
  first = {run.seed: run for run in found[0].runs}
  rows = []
  for group in found[1:]:
    pairs = [(run, first[run.seed]) for run in group.runs if run.seed in first]
    if len(pairs) < 2:
      continue
    spreads = []
    for policy, key in keys:
      value = lambda run, policy=policy, key=key: run.policies.get(policy, {}).get(key)
      both = [(value(a), value(b)) for a, b in pairs]
      spreads.append(spread([a - b for a, b in both if a is not None and b is not None]))
    rows.append({"group": group.label, "seeds": len(pairs), "spreads": spreads})
  return rows
