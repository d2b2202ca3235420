"""Writes the report: index.html with its tables and figures; findings.json, costs.json and report.png beside it.

One function for each section of the page turns results into the values that templates/page.html.j2 shows. Numbers are
formatted here, and a section without anything to show gets an empty value or None. The wording and the tags are in the
template, which escapes all values. Whether a finding holds is decided in findings.py.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping

import jinja2
import markupsafe
import numpy as np

from instructjax.core import provenance
from instructjax.core.errors import writing
from instructjax.core.provenance import Provenance
from instructjax.core.text import printable, printable_lines
from instructjax.report import (
  costs,
  doubts,
  equal_kl,
  figures,
  findings,
  overoptimization,
  overoptimization_fits,
  overoptimization_points,
  panels,
  rounds,
  tables,
)
from instructjax.report.results import Measured, Results

NUM_SAMPLES = 6
TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
  keep_trailing_newline=True,
)
# A sample shows the answers of these policies first, and then those of the others.
_MAIN = ("base", "sft", "ppo", "ppo_ptx")
# Findings whose values are shares.
_PERCENT = {"reward_model", "topic_following", "own_words", *doubts.JUDGED}
# Their values that are no shares.
_NUMBERS = {"base_loss", "larger_base_loss", "kl", "best_of_n_kl"}
VERDICTS = {
  True: ("yes", "holds"),
  False: ("no", "does not hold"),
  None: ("open", "cannot be told"),
}
_LABELS = panels.NAMES | {
  "zero_shot": "over Larger base",
  "few_shot": "over Larger base, few-shot",
  "ppo_minus_sft": "PPO − SFT",
  "ppo_ptx_minus_sft": "PPO-ptx − SFT",
  "ppo_ptx_minus_base": "PPO-ptx − Base",
  "reward_gap_in_rm_std": "reward gap, RM std",
  "labeler_agreement": "labelers’ agreement",
  "heldout_labelers": "on held-out labelers",
  "cross_validation_train": "folds trained on",
  "cross_validation_heldout": "fold left out",
  "kl": "KL, nats",
  "larger_base_loss": "loss of Larger base, nats",
  "base_loss": "loss of Base, nats",
  "best_of_n_kl": "KL of best of n, nats",
  "more_repeats": "repeats, PPO-ptx − PPO init",
  "repeats_ppo_init": "repeats, PPO init",
  "repeats_ppo_ptx": "repeats, PPO-ptx",
  "copied": "words copied",
  "distinct": "different answers",
  "topic_again": "topic named again",
  "ppo_ptx_over_sft": "PPO-ptx over SFT",
  "names_topic_sft": "SFT names the topic",
  "names_topic_ppo_ptx": "PPO-ptx names the topic",
}


def plain(value):
  """The value in types that JSON has: NumPy's become Python's, NaN and infinity become null."""
  if isinstance(value, dict):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _drawn(*args, **kwargs) -> markupsafe.Markup:
  """A figure as HTML that must not be escaped; empty if no panel has anything to show."""
  return markupsafe.Markup(figures.svg(*args, **kwargs))


def shown_as(finding: str, name: str) -> tuple[str, Callable[[float], str]]:
  """How a measured value of a finding is called, and the function that shows it."""
  is_share = finding in _PERCENT and name not in _NUMBERS
  return _LABELS.get(name, name.replace("_", " ")), tables.percent if is_share else tables.number


def _measured(finding: dict) -> list[tuple[str, str, str]]:
  """Rows of (label, value, interval), the interval empty for a value that has none."""
  bounds, rows = finding["interval"], []
  for i, (name, value) in enumerate(finding["measured"].items()):
    label, show = shown_as(finding["id"], name)
    between = f"[{show(bounds[i][0])}, {show(bounds[i][1])}]" if i < len(bounds) else ""
    rows.append((label, show(value), between))
  return rows


def _in_brief(finding: dict) -> str:
  """The values that have an interval, on a line."""
  rows = [row for row in _measured(finding) if row[2]]
  return ", ".join(f"{label} {value} {between}" for label, value, between in rows)


def _findings(found: list[dict]) -> list[dict]:
  return [
    {
      "claim": finding["claim"],
      "paper": finding["paper"].replace("+-", "±"),
      "rule": finding["rule"].replace("+-", "±").replace(" - ", " − "),
      "measured": _measured(finding),
      "brief": _in_brief(finding),
      "verdict": VERDICTS[finding["holds"]],
    }
    for finding in found
  ]


def chosen_samples(prompts: list[str], count: int) -> list[int]:
  """Indices of up to `count` different prompts, spread evenly over the list, so that no choice can flatter the run."""
  # The first place of each prompt, which stands in the list once for each of its answers.
  first = sorted({prompt: i for i, prompt in reversed(list(enumerate(prompts)))}.values())
  return [first[i * len(first) // count] for i in range(count)] if len(first) > count else first


def _samples(
  prompts: list[str], measured: Mapping[str, Measured]
) -> list[tuple[str, list[dict], list[dict]]]:
  """The samples to show: (prompt, one answer of each main policy, one of each other policy)."""
  main = [name for name in _MAIN if name in measured]
  others = [name for name in measured if name not in _MAIN]

  def answer(name: str, i: int) -> dict:
    found = measured[name]
    scores = [f"gold {tables.number(float(found.gold[i]))}"] if found.gold is not None else []
    scores.append(f"reward {tables.number(float(found.reward[i]))}")
    return {
      "policy": name,
      "text": printable_lines(found.answer[i].strip()),
      "small": " · ".join(scores) + ("" if found.ended[i] else " · cut off"),
    }

  return [
    (
      printable_lines(prompts[i].strip()),
      [answer(name, i) for name in main],
      [answer(name, i) for name in others],
    )
    for i in chosen_samples(prompts, NUM_SAMPLES)
  ]


def _win_cell(rate: float, interval) -> dict:
  colour = "31,157,107" if rate > 0.5 else "217,72,95"
  strength = min(0.6, 1.3 * abs(rate - 0.5))
  return {
    "rate": tables.percent(rate),
    "interval": f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f}",
    "background": f"rgba({colour},{strength:.2f})",
  }


def _wins(wins: dict) -> dict:
  """The win rates: a row of cells for each policy, with None on the diagonal, and the figure."""
  opponents = [name for name in ("sft", "reward_base", "base", "ppo_init") if name in wins][:2]
  return {
    "rows": {a: [None if a == b else _win_cell(*wins[a][b]) for b in wins] for a in wins}
    if len(wins) > 1
    else {},
    "svg": _drawn(
      [lambda ax, name=name: panels.draw_win_rates(ax, wins, [name]) for name in opponents],
      "Win rates over SFT and over the base",
      columns=2,
      height=0.55 + 0.36 * len(wins),
    ),
  }


def _curves(results: Results) -> markupsafe.Markup:
  curves = results.curves
  draws = [
    lambda ax: panels.draw_curve(ax, curves, "reward", "Reward-model score"),
    lambda ax: panels.draw_curve(ax, curves, "gold", "Gold score (steers nothing)"),
    lambda ax: panels.draw_curve(ax, curves, "kl", "KL, nats (√ scale)", square_root=True),
    lambda ax: panels.draw_pretraining_over_ppo(ax, results),
    lambda ax: panels.draw_curve(ax, curves, "entropy", "Entropy, nats a sample"),
    lambda ax: panels.draw_curve(ax, curves, "response_length", "Answer length, tokens"),
  ]
  draws += [
    lambda ax, key=key, title=title: panels.draw_curve(ax, curves, key, title)
    for key, title in panels.reward_curves(curves)
  ]
  return _drawn(draws, "Curves over PPO", columns=3, height=2.6)


def _tax(results: Results) -> markupsafe.Markup:
  draws = [
    lambda ax: panels.draw_tax(ax, results),
    lambda ax: panels.draw_trade_off(ax, results),
  ]
  label = "Pretraining loss by policy, and score against it"
  return _drawn(draws, label, columns=2, height=3.0)


def _reward_model(results: Results) -> markupsafe.Markup:
  draws = [
    lambda ax: panels.draw_accuracy(ax, results),
    lambda ax: panels.draw_calibration(ax, results),
  ]
  return _drawn(draws, "Reward-model accuracy and calibration", columns=2, height=3.4)


def _overoptimization(results: Results, *, bootstrap: int, seed: int) -> dict:
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
    "svg": _drawn(draws, label, columns=2, height=3.6),
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


def _equal_kl(results: Results, table: Mapping) -> dict:
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
    "svg": _drawn([draw], "Score gained against KL", columns=1, height=4.2),
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


def _rounds(table: Mapping) -> dict:
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


def _what_ran(config, prompts: list[str]) -> str:
  """The line of facts about the run; non-breaking spaces let it break only between two facts."""
  model, reward, ppo = config.model, config.reward_model, config.ppo
  facts = [
    f"preset {printable(config.preset)}, seed {config.seed}",
    f"policy {model.num_layers} layers × {model.d_model}",
    f"reward model {reward.num_layers} × {reward.d_model}",
    f"PPO {ppo.num_iterations} × {ppo.batch_size} episodes, β = {ppo.beta:g}, γ = {ppo.gamma:g}",
    f"{len(set(prompts))} held-out prompts",
  ]
  return " · ".join(fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)


def _made(made: Mapping[str, Provenance]) -> dict:
  """The provenance of the last stage, in rows with the sources of all stages, and one line for each stage."""
  last = list(made.values())[-1]
  every = {kind: source for row in made.values() for kind, source in row.sources.items()}
  rows = provenance.rows(dataclasses.replace(last, sources=every))
  lines = [(stage, row.date, provenance.code(row)) for stage, row in made.items()]
  # Printable, because a path may hold bytes that are not UTF-8, which the page could not be written with.
  return {"rows": [(name, printable(value)) for name, value in rows], "stages": lines}


def _costs(took: Mapping[str, costs.StageCost], made: Mapping[str, Provenance]) -> dict:
  """What the run took, in a sentence and by stage."""
  return {"words": printable(costs.in_words(took, made)), "rows": costs.table(took)}


def page(
  config,
  prompts: list[str],
  results: Results,
  found: list[dict],
  wins: dict,
  made: Mapping[str, Provenance],
  took: Mapping[str, costs.StageCost],
) -> str:
  """The whole report as one HTML document."""
  judgement = results.reward_model.validation
  cfg = config.evaluate
  equal = equal_kl.table(results, bootstrap=cfg.bootstrap, seed=config.seed)
  return TEMPLATES.get_template("page.html.j2").render(
    preset=printable(config.preset),
    what_ran=_what_ran(config, prompts),
    names=panels.NAMES,
    colours=panels.COLOURS,
    findings=_findings(found),
    samples=_samples(prompts, results.measured),
    policies=tables.policies(results),
    gold_words=results.gold_words,
    shots=tables.shots(results.shots),
    best_shots=max((n for n in results.shots if n), key=results.shots.__getitem__, default=0),
    untrained=tables.untrained(results, config),
    habits=tables.habits(results),
    new_topics=tables.new_topics(results),
    judge="the gold score" if results.has_gold else "the reward model",
    wins=_wins(wins),
    trained=[name for name, rows in results.curves.items() if rows],
    curves=_curves(results),
    tax=_tax(results),
    reward_model=_reward_model(results),
    within_policies=tables.within_policies(results, config),
    num_pairs=judgement.pairs if judgement else 0,
    equal_kl=_equal_kl(results, equal),
    rounds=_rounds(rounds.table(results, bootstrap=cfg.bootstrap, seed=config.seed)),
    overoptimization=_overoptimization(results, bootstrap=cfg.bootstrap, seed=config.seed),
    costs=_costs(took, made),
    made=_made(made),
  )


def write(
  directory,
  config,
  prompts: list[str],
  results: Results,
  found: list[dict],
  made: Mapping[str, Provenance],
  took: Mapping[str, costs.StageCost],
):
  """Writes findings.json, costs.json, report.png and index.html.

  Args:
    directory: folder of the report; made if missing.
    config: the run's Config.
    prompts: the prompt of each answer, so that each stands in the list `samples_per_prompt` times in a row.
    results: what evaluation measured.
    found: the result of findings.find.
    made: stage -> provenance, in the order in which the stages ran; evaluation is the last.
    took: what each of these stages took.
  Raises:
    UserError: the files cannot be written.
  """
  directory = pathlib.Path(directory)
  # Computed again rather than passed on; the same seed gives the digits that findings and page have.
  settings = {"bootstrap": config.evaluate.bootstrap, "seed": config.seed}
  wins = findings.win_matrix(results, **settings)
  points = overoptimization_points.of_results(results, **settings)
  text = page(config, prompts, results, found, wins, made, took)
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "findings.json").write_text(
      json.dumps(plain(found), indent=1, allow_nan=False) + "\n"
    )
    by_stage = {stage: dataclasses.asdict(cost) for stage, cost in took.items()}
    (directory / "costs.json").write_text(
      json.dumps(plain(by_stage), indent=1, allow_nan=False) + "\n"
    )
    figures.overview(results, wins, points, directory / "report.png")
    (directory / "index.html").write_text(text, encoding="utf-8")
