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
  overoptimization_points,
  panels,
  rounds,
  sections,
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
    "svg": sections.drawn(
      [lambda ax, name=name: panels.draw_win_rates(ax, wins, [name]) for name in opponents],
      "Win rates over SFT and over the base",
      columns=2,
      height=0.55 + 0.36 * len(wins),
    ),
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
    curves=sections.curves(results),
    tax=sections.tax(results),
    reward_model=sections.reward_model(results),
    within_policies=tables.within_policies(results, config),
    num_pairs=judgement.pairs if judgement else 0,
    equal_kl=sections.at_equal_kl(results, equal),
    rounds=sections.by_round(rounds.table(results, bootstrap=cfg.bootstrap, seed=config.seed)),
    overoptimization=sections.over_kl(results, bootstrap=cfg.bootstrap, seed=config.seed),
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
