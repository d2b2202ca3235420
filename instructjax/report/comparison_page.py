"""Writes the report of a comparison: index.html, one file without scripts or network access, and comparison.json.

Called by instructjax/compare.py and at the end of a sweep. Turns groups of runs into what templates/compare.html.j2
shows; comparison.py computes it, comparison_panels.py draws it.
"""

import dataclasses
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe

from instructjax.core import terminal
from instructjax.core.errors import writing
from instructjax.core.text import printable
from instructjax.report import (
  comparison,
  comparison_panels,
  costs,
  figures,
  overoptimization_fits,
  panels,
  tables,
)
from instructjax.report.comparison import Spread
from instructjax.report.comparison_groups import Group
from instructjax.report.page import TEMPLATES, plain, shown_as

# Measurements of a policy: (title, how it is shown).
MEASUREMENTS = {
  "gold": ("Gold score", tables.number),
  "reward": ("RM score", tables.number),
  "kl": ("KL, nats", tables.number),
  "pretrain_loss": ("Pretraining loss", tables.number),
  "names_topic": ("Names the topic", tables.percent),
  "length": ("Tokens", tables.number),
  "repeats": ("Repeat a word pair", tables.percent),
  "topic_again": ("Topic named again", tables.percent),
  "copied": ("Words copied", tables.percent),
  "distinct": ("Different answers", tables.percent),
}
_COMPARED = ("gold", "reward", "kl", "pretrain_loss", "repeats")


def _cell(found: Spread | None, show) -> tuple[str, str]:
  """(mean ± standard deviation, interval) as text; empty where nothing was measured."""
  if found is None:
    return "", ""
  value = show(found.mean) + (f" ± {show(found.std)}" if len(found.values) > 1 else "")
  if found.interval is None:
    return value, ""
  low, high = found.interval
  if show is tables.percent and min(found.values) >= 0:  # no share is below 0 or above 1
    low, high = max(low, 0.0), min(high, 1.0)
  return value, f"[{show(low)}, {show(high)}]"


def _findings(groups: Sequence[Group]) -> list[dict]:
  rows = []
  for row in comparison.finding_rows(groups):
    measured = []
    for name, spreads in row["measured"].items():
      label, show = shown_as(row["id"], name)
      measured.append((label, [_cell(found, show) for found in spreads]))
    rows.append(
      {
        "claim": row["claim"],
        "rule": row["rule"].replace("+-", "±").replace(" - ", " − "),
        "measured": measured,
        "verdicts": [_verdict(counts) for counts in row["holds"]],
      }
    )
  return rows


def _verdict(counts: tuple[int, int, int]) -> tuple[str, str]:
  """(class of the pill, words): in how many runs a finding holds."""
  yes, no, open_ = counts
  total = yes + no + open_
  if not total:
    return "open", "not asked"
  if total == 1:
    return (
      ("yes", "holds") if yes else ("no", "does not hold") if no else ("open", "cannot be told")
    )
  words = f"holds in {yes} of {total}"
  words += f", does not in {no}" if no else ""
  words += f", cannot be told in {open_}" if open_ else ""
  return "yes" if yes == total else "no" if no > yes else "open", words


def _policies(groups: Sequence[Group]) -> list[dict]:
  """A table for each measurement that some policy has: a row a policy, a column a group."""
  rows = comparison.policy_rows(groups)
  result = []
  for key, (title, show) in MEASUREMENTS.items():
    named = {
      name: [_cell(found, show) for found in row[key]]
      for name, row in rows.items()
      if key in row and name in panels.NAMES
    }
    if named:
      titles = {name: (panels.NAMES[name], panels.COLOURS[name]) for name in named}
      result.append(
        {"title": title, "rows": [(*titles[name], cells) for name, cells in named.items()]}
      )
  return result


def _differences(groups: Sequence[Group]) -> dict:
  policies = [name for name in comparison.rl_policies(groups) if name != "ppo_beta0"]
  keys = [(policy, key) for policy in policies for key in _COMPARED]
  rows = comparison.differences(groups, keys)
  kept = [i for i in range(len(keys)) if any(row["spreads"][i] for row in rows)]
  named = lambda i: f"{panels.NAMES[keys[i][0]]}: {MEASUREMENTS[keys[i][1]][0]}"
  return {
    "columns": [f"{row['group']} ({row['seeds']} seeds)" for row in rows],
    "rows": [
      (named(i), [_cell(row["spreads"][i], MEASUREMENTS[keys[i][1]][1]) for row in rows])
      for i in kept
    ],
  }


def _times(groups: Sequence[Group]) -> dict:
  """Seconds of each stage, as mean over a group's runs, and their sum."""
  took = [[costs.by_stage(run.logs, run.made) for run in group.runs] for group in groups]
  stages = dict.fromkeys(name for rows in took for row in rows for name in row)

  def cell(rows: Sequence[Mapping[str, costs.StageCost]], name: str) -> tuple[str, str]:
    found = comparison.spread([row[name].seconds for row in rows if name in row])
    if found is None:
      return "", ""
    low, high = min(found.values), max(found.values)
    between = f"{costs.duration(low)} to {costs.duration(high)}" if len(found.values) > 1 else ""
    return costs.duration(found.mean), between

  total = [sum(cost.seconds for row in rows for cost in row.values()) / len(rows) for rows in took]
  return {
    "rows": [(name, [cell(rows, name) for rows in took]) for name in stages],
    "total": [costs.duration(seconds) for seconds in total],
  }


def _runs(groups: Sequence[Group]) -> list[tuple]:
  """Rows of (colour, group, runs with their seeds, versions of the code)."""
  rows = []
  for number, group in enumerate(groups):
    seeds = ", ".join(f"{run.name} (seed {run.seed})" for run in group.runs)
    code = dict.fromkeys(
      made.commit[:12] or made.version for run in group.runs for made in run.made.values()
    )
    rows.append((comparison_panels.colour(number), group.label, printable(seeds), ", ".join(code)))
  return rows


def _figure(draws: list, label: str, **layout) -> markupsafe.Markup:
  """A figure whose label, for those who cannot see it, may hold any letters."""
  return markupsafe.Markup(figures.svg(draws, html.escape(printable(label)), **layout))


def _figures(groups: Sequence[Group]) -> dict[str, markupsafe.Markup]:
  rates = comparison.win_rates(groups)
  words = comparison_panels.win_rates_in_words(rates, groups)
  keys = ("gold", "reward")
  frontier = [lambda ax, key=key: comparison_panels.draw_frontier(ax, groups, key) for key in keys]
  tax = [lambda ax, key=key: comparison_panels.draw_tax(ax, groups, key) for key in keys]
  return {
    "wins": _figure(
      [lambda ax: comparison_panels.draw_win_rates(ax, rates, groups)],
      f"Win rates with 95% intervals. {words}",
      columns=1,
      height=0.8 + 0.16 * len(rates) * (1.5 + len(groups)),
    ),
    "frontier": _figure(
      frontier,
      f"Gold score and reward against KL. At the end of training: {comparison_panels.ends_in_words(groups, 'kl')}",
      columns=2,
      height=3.8,
    ),
    "tax": _figure(
      tax,
      f"What is gained against the alignment tax: {comparison_panels.ends_in_words(groups, 'tax')}",
      columns=2,
      height=3.8,
    ),
  }


def page(groups: Sequence[Group]) -> str:
  """The whole comparison as one HTML document."""
  runs = [run for group in groups for run in group.runs]
  return TEMPLATES.get_template("compare.html.j2").render(
    count=len(runs),
    groups=_runs(groups),
    labels=[group.label for group in groups],
    different=list(groups[0].values) if len(groups) > 1 else [],
    values=[(group.label, list(group.values.values())) for group in groups],
    has_seeds=any(len(group.runs) > 1 for group in groups),
    findings=_findings(groups),
    policies=_policies(groups),
    differences=_differences(groups),
    fits=[
      (group.label, [overoptimization_fits.in_words(*key, fit) for key, fit in found.items()])
      for group in groups
      if (found := comparison.fits(group))
    ],
    times=_times(groups),
    figures=_figures(groups),
    colours=[(panels.COLOURS[name], panels.NAMES[name]) for name in comparison.rl_policies(groups)],
    marks=[
      (panels.NAMES[name], _MARK_WORDS.get(name, "diamond"))
      for name in comparison_panels.on_frontier(groups)
    ],
  )


_MARK_WORDS = {
  "ppo": "circle, dashed line",
  "ppo_ptx": "square, solid line",
  "rloo": "triangle up",
  "grpo": "triangle down",
  "ppo_beta0": "cross, dotted line",
}


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
  """What the comparison found, in types that JSON has: every number of every group, with its values by seed."""
  spread = lambda found: None if found is None else dataclasses.asdict(found)
  in_groups = lambda spreads: [spread(found) for found in spreads]
  return plain(
    {
      "groups": [
        {
          "label": group.label,
          "values": dict(group.values),
          "runs": [{"name": run.name, "seed": run.seed} for run in group.runs],
        }
        for group in groups
      ],
      "findings": [
        {**row, "measured": {key: in_groups(found) for key, found in row["measured"].items()}}
        for row in comparison.finding_rows(groups)
      ],
      "policies": {
        policy: {key: in_groups(found) for key, found in row.items()}
        for policy, row in comparison.policy_rows(groups).items()
      },
    }
  )


def write(directory: pathlib.Path, groups: Sequence[Group]) -> pathlib.Path:
  """Writes index.html and comparison.json.

  Returns:
    The path of the page.
  Raises:
    UserError: the files cannot be written.
  """
  text = page(groups)
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "index.html"
    path.write_text(text, encoding="utf-8")
    found = json.dumps(as_json(groups), indent=1, allow_nan=False) + "\n"
    (directory / "comparison.json").write_text(found, encoding="utf-8")
  return path


def show(groups: Sequence[Group]):
  """Prints the findings and the policies as tables."""
  labels = [group.label for group in groups]
  text = lambda cell: " ".join(part for part in cell if part)
  rows = []
  for finding in comparison.finding_rows(groups):
    rows.append([finding["id"], *(_verdict(counts)[1] for counts in finding["holds"])])
    for name, spreads in finding["measured"].items():
      label, shown = shown_as(finding["id"], name)
      rows.append([f"  {label}", *(text(_cell(found, shown)) for found in spreads)])
  terminal.show(
    terminal.Table(
      columns=["finding", *labels],
      rows=rows,
      title="findings: mean ± standard deviation over seeds [95% interval of the mean]",
      prose=labels,
    )
  )
  policies = comparison.rl_policies(groups)
  rows = [
    [f"{panels.NAMES[policy]}: {title}", *(text(_cell(found, shown)) for found in row[key])]
    for policy, row in comparison.policy_rows(groups).items()
    for key, (title, shown) in MEASUREMENTS.items()
    if key in row and policy in ("sft", *policies)
  ]
  terminal.show(
    terminal.Table(columns=["policy", *labels], rows=rows, title="policies", prose=labels)
  )
