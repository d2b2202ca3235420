"""Sections of the report that are figures and tables of curves: over PPO, against KL, by round of comparisons.

Each function turns results into the values that templates/page.html.j2 shows. Called by page.py.
"""

from collections.abc import Mapping

import markupsafe

from instructjax.report import (
  equal_kl,
  figures,
  overoptimization,
  overoptimization_fits,
  overoptimization_points,
  panels,
  tables,
)
from instructjax.report.results import Results


def drawn(*args, **kwargs) -> markupsafe.Markup:
  """A figure as HTML that must not be escaped; empty if no panel has anything to show."""
  return markupsafe.Markup(figures.svg(*args, **kwargs))


def curves(results: Results) -> markupsafe.Markup:
  """The figure of what RL logs at each iteration."""
  logged = results.curves
  draws = [
    lambda ax: panels.draw_curve(ax, logged, "reward", "Reward-model score"),
    lambda ax: panels.draw_curve(ax, logged, "gold", "Gold score (steers nothing)"),
    lambda ax: panels.draw_curve(ax, logged, "kl", "KL, nats (√ scale)", square_root=True),
    lambda ax: panels.draw_pretraining_over_ppo(ax, results),
    lambda ax: panels.draw_curve(ax, logged, "entropy", "Entropy, nats a sample"),
    lambda ax: panels.draw_curve(ax, logged, "response_length", "Answer length, tokens"),
  ]
  draws += [
    lambda ax, key=key, title=title: panels.draw_curve(ax, logged, key, title)
    for key, title in panels.reward_curves(logged)
  ]
  return drawn(draws, "Curves over PPO", columns=3, height=2.6)


def tax(results: Results) -> markupsafe.Markup:
  """The figure of the alignment tax: losses on pretraining text, and score against them."""
  draws = [
    lambda ax: panels.draw_tax(ax, results),
    lambda ax: panels.draw_trade_off(ax, results),
  ]
  label = "Pretraining loss by policy, and score against it"
  return drawn(draws, label, columns=2, height=3.0)


def reward_model(results: Results) -> markupsafe.Markup:
  """The figure of how often the reward model is right, and how sure it is."""
  draws = [
    lambda ax: panels.draw_accuracy(ax, results),
    lambda ax: panels.draw_calibration(ax, results),
  ]
  return drawn(draws, "Reward-model accuracy and calibration", columns=2, height=3.4)


def over_kl(results: Results, *, bootstrap: int, seed: int) -> dict:
  """The figure of over-optimisation, the fitted curves and the checkpoints in words, and whether PPO is among them."""
  points = overoptimization_points.of_results(results, bootstrap=bootstrap, seed=seed)
  fits = overoptimization_fits.of_results(results, bootstrap=bootstrap, seed=seed)
  scores = overoptimization.scores(results)
  draws = [
    lambda ax, which=which: panels.draw_overoptimization(ax, results, which, points)
    for which in ("best_of_n", "rl")
  ]
  has_gold = any("gold" in found for found in scores.values())
  label = "Gold and reward-model score against KL" if has_gold else "Reward-model score against KL"
  return {
    "title": "Over-optimisation" if has_gold else "Best of n and reward",
    "svg": drawn(draws, label, columns=2, height=3.6),
    "fits": "".join(
      overoptimization_fits.in_words(which, key, fit)
      for which, found in fits.items()
      for key, fit in found.items()
      if has_gold
    ),
    "points": overoptimization_points.in_words(points) if "rl" in scores else "",
    "has_gold": has_gold,
    "has_rl": "rl" in scores,
  }


def at_equal_kl(results: Results, table: Mapping) -> dict:
  """The figure of gain against KL, and the table that reads it at the same KL of all methods."""
  if not table:
    return {}
  between = lambda bounds: (
    f"[{tables.number(bounds[0])}, {tables.number(bounds[1])}]" if bounds else ""
  )
  colours = panels.COLOURS | {equal_kl.BEST_OF_N: panels.BEST_OF_N_COLOUR}

  def cell(gain: Mapping | None) -> tuple[str, str]:
    return (tables.number(gain["gain"]), between(gain["interval"])) if gain else ("not reached", "")

  def place(point: Mapping) -> list[tuple[str, str]]:
    return [(tables.number(point["kl"]), between(point["kl_interval"])), cell(point)]

  def row(name: str, method: Mapping) -> dict:
    return {
      "title": panels.NAMES.get(name, "Best of n"),
      "colour": colours[name],
      "cells": [cell(gain) for gain in method["at"]],
      "checkpoints": [(point["step"], place(point)) for point in method["checkpoints"]],
      "end": place(method["end"]) if method["end"] else [("", "")] * 2,
    }

  draw = lambda ax: panels.draw_equal_kl(ax, results, table)
  return {
    "svg": drawn([draw], "Score gained against KL", columns=1, height=4.2),
    "levels": [f"{level:g}" for level in table["kl"]],
    "rows": [row(name, method) for name, method in table["methods"].items()],
    "score": "gold score" if table["score"] == "gold" else "reward-model score",
    "best_of_n": _best_of_n_prompts(results) if equal_kl.BEST_OF_N in table["methods"] else "",
    "is_of_test_prompts": table["curves"] == "checkpoints",
  }


def _best_of_n_prompts(results: Results) -> str:
  """What best-of-n was measured on, which may be fewer prompts than the policies have."""
  total = len(next(iter(results.measured.values())).reward) // results.samples_per_prompt
  count = len(results.best_of_n[0].by_prompt)
  return "test prompts" if count == total else f"{count} of the {total} test prompts"


def by_round(table: Mapping) -> dict:
  """Both tables of the rounds, with their cells in words."""

  def cell(found) -> tuple[str, str]:
    return (f"{found[0]:.2f}", f"[{found[1][0]:.2f}, {found[1][1]:.2f}]") if found else ("", "")

  if not table:
    return {}
  columns = zip(*(row["heldout"] for row in table["reward_models"]))
  heldout = [place for place, column in enumerate(columns) if any(column)]

  def cells(row) -> list[tuple[str, str]]:
    others = (row["heldout"][place] for place in heldout)
    return [
      *map(cell, row["accuracy"]),
      *map(cell, others),
      *map(cell, row["correlation"].values()),
    ]

  return {
    "reward_models": [
      {"title": f"Reward model, round {row['round']}", "cells": cells(row)}
      for row in table["reward_models"]
    ],
    "heldout": [place + 1 for place in heldout],
    "titles": [panels.NAMES[row["policy"]] for row in table["policies"]],
    "policies": [
      {
        "name": row["policy"],
        "cells": [
          ("" if row["gold"] is None else tables.number(row["gold"]), ""),
          cell(row["over_previous"]),
        ],
      }
      for row in table["policies"]
    ],
  }
