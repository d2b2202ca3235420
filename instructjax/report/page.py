"""Writes the report: the text, tables and samples of index.html around the figures.

What holds and what does not is findings.py's to say.
"""

import html
import json
import math
import pathlib

import numpy as np

from instructjax.core.errors import writing
from instructjax.report import figures, findings, overoptimization, panels, style
from instructjax.report.results import Results

NUM_SAMPLES = 6
# First row of a sample's answers; the other policies follow.
_MAIN = ("base", "sft", "ppo", "ppo_ptx")
_PERCENT = {"preferred_over_base", "rl_over_sft", "reward_model", "topic_following"}
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
}


def plain(value):
  """The value as JSON can hold it: numpy to Python, NaN and infinity to null."""
  if isinstance(value, dict):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def number(value: float) -> str:
  """Two decimals, none from 100 on, with a true minus sign; a dash for a missing value."""
  if value is None or not math.isfinite(value):
    return "–"
  text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
  return text.replace("-", "−")


def _percent(value: float) -> str:
  return f"{100 * value:.0f}%" if math.isfinite(value) else "–"


def _policy(name: str) -> str:
  colour, label = panels.COLOURS[name], html.escape(panels.NAMES[name])
  return f'<span class="dot" style="background:{colour}"></span>{label}'


def _table(header: list[str], rows: list[list[str]], kind: str) -> str:
  """Table of cells that are HTML already; a cell that starts with '<td' brings its own tag."""
  head = "".join(f"<th>{cell}</th>" for cell in header)
  body = "".join(
    "<tr>"
    + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
    + "</tr>"
    for row in rows
  )
  return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _section(id_: str, title: str, lead: str, body: str) -> str:
  """A section with its lead paragraph; nothing where there is nothing to show."""
  if not body:
    return ""
  return f'<section id="{id_}"><h2>{title}</h2><p class="soft">{lead}</p>{body}</section>'


def _figure(svg: str, caption: str = "") -> str:
  return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" if svg else ""


def _measured(finding: dict) -> str:
  """Each measured value and its interval; one that belongs to no value alone has its own line."""
  show = _percent if finding["id"] in _PERCENT else number
  values, intervals = finding["measured"], finding["interval"]
  if intervals and not isinstance(intervals[0], (list, tuple)):
    intervals = [intervals] if len(values) == 1 else []
  lines = []
  for i, (name, value) in enumerate(values.items()):
    label = html.escape(_LABELS.get(name, name.replace("_", " ")))
    bounds = ""
    if i < len(intervals):
      bounds = f" <small>[{show(intervals[i][0])}, {show(intervals[i][1])}]</small>"
    lines.append(f"<div><span>{label}</span><span>{show(value)}{bounds}</span></div>")
  if finding["interval"] and not intervals:
    low, high = (show(bound) for bound in finding["interval"])
    lines.append(f"<div><small>95% interval</small><small>[{low}, {high}]</small></div>")
  return f'<div class="measured">{"".join(lines)}</div>'


def _findings(found: list[dict]) -> str:
  rows = []
  for finding in found:
    kind, verdict = ("yes", "holds") if finding["holds"] else ("no", "does not hold")
    pill = f'<span class="pill {kind}">{verdict}</span>'
    claim, paper = html.escape(finding["claim"]), html.escape(finding["paper"]).replace("+-", "±")
    rows.append([claim, f'<span class="soft">{paper}</span>', _measured(finding), pill])
  holding = sum(finding["holds"] for finding in found)
  lead = f"{holding} of {len(found)} hold in this run. Brackets are 95% intervals."
  body = _table(["Claim", "In the paper", "Measured here", ""], rows, "findings") if rows else ""
  return _section("findings", "The paper's findings, measured", lead, body)


def chosen_samples(prompts: list[str], count: int) -> list[int]:
  """Indices of up to `count` different prompts, spread evenly over the list: nobody picked them."""
  first = sorted({prompt: i for i, prompt in reversed(list(enumerate(prompts)))}.values())
  return [first[i * len(first) // count] for i in range(count)] if len(first) > count else first


def _samples(prompts: list[str], measured: dict) -> str:
  parts = []
  for i in chosen_samples(prompts, NUM_SAMPLES):
    cells = []
    for name in [*(n for n in _MAIN if n in measured), *(n for n in measured if n not in _MAIN)]:
      found = measured[name]
      scores = [f"gold {number(float(found.gold[i]))}"] if found.gold is not None else []
      scores.append(f"reward {number(float(found.reward[i]))}")
      ended = "" if found.ended[i] else " · cut off"
      answer = html.escape(found.answer[i].strip()) or '<span class="soft">(empty)</span>'
      cells.append(
        f'<div class="answer" style="border-color:{panels.COLOURS[name]}">'
        f"<b>{html.escape(panels.NAMES[name])}</b>"
        f"<p>{answer}</p><small>{' · '.join(scores)}{ended}</small></div>"
      )
    prompt = html.escape(prompts[i].strip())
    parts.append(f'<div class="prompt">{prompt}</div><div class="answers">{"".join(cells)}</div>')
  lead = (
    "Held-out prompts at even distances through the list, one sampled answer of each policy: "
    "nobody picked them. Small print: the gold score (where there is one), the reward model's, "
    "and whether the length limit cut the answer off."
  )
  return _section("samples", "The same prompts, answered by each policy", lead, "".join(parts))


def _policies(results: Results) -> str:
  rows = findings.summary(results)
  columns = {
    "gold": ("Gold score", number),
    "reward": ("RM score", number),
    "kl": ("KL, nats", number),
    "pretrain_loss": ("Pretraining loss", number),
    "names_topic": ("Names the topic", _percent),
    "length": ("Tokens", number),
    "ended": ("Ended", _percent),
  }
  columns = {
    key: value for key, value in columns.items() if any(key in row for row in rows.values())
  }
  body = [
    [_policy(name)] + [show(row[key]) if key in row else "" for key, (_, show) in columns.items()]
    for name, row in rows.items()
  ]
  lead = (
    "Means over held-out prompts. KL is a sample's total from the PPO initialisation; pretraining "
    "loss is in nats a token of held-out text. The RM score's zero is the mean demonstration."
  )
  table = (
    _table(["Policy"] + [label for label, _ in columns.values()], body, "numbers") if rows else ""
  )
  return _section("policies", "Every policy at a glance", lead, table)


def _win_cell(rate: float, interval) -> str:
  colour = "31,157,107" if rate > 0.5 else "217,72,95"
  strength = min(0.6, 1.3 * abs(rate - 0.5))
  bounds = f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f}"
  background = f"rgba({colour},{strength:.2f})"
  return f'<td style="background:{background}">{_percent(rate)}<br><small>{bounds}</small></td>'


def _wins(wins: dict, judge: str) -> str:
  rows = [
    [_policy(a)] + ["<td>·</td>" if a == b else _win_cell(*wins[a][b]) for b in wins] for a in wins
  ]
  header = ["answers of ↓ preferred to →"] + [html.escape(panels.NAMES[name]) for name in wins]
  table = _table(header, rows, "wins") if len(wins) > 1 else ""
  opponents = [name for name in ("sft", "reward_base", "base") if name in wins][:2]
  svg = figures.svg(
    [lambda ax, name=name: panels.draw_win_rates(ax, wins, [name]) for name in opponents],
    "Win rates over SFT and over the base",
    columns=2,
    height=0.55 + 0.36 * len(wins),
  )
  lead = (
    "How often the row's answer to a prompt is judged better than the column's, equal ones "
    f"counting half; judged by "
    f"{judge}. Below each rate, its 95% interval in percent: bootstrap over prompts."
  )
  return _section("wins", "Who is preferred to whom", lead, table + _figure(svg))


def _curves(results: Results) -> str:
  curves = results.curves
  draws = [
    lambda ax: panels.draw_curve(ax, curves, "reward", "Reward-model score"),
    lambda ax: panels.draw_curve(ax, curves, "gold", "Gold score (steers nothing)"),
    lambda ax: panels.draw_curve(ax, curves, "kl", "KL, nats (√ scale)", square_root=True),
    lambda ax: panels.draw_pretraining_over_ppo(ax, results),
    lambda ax: panels.draw_curve(ax, curves, "entropy", "Entropy, nats a sample"),
    lambda ax: panels.draw_curve(ax, curves, "response_length", "Answer length, tokens"),
  ]
  svg = figures.svg(draws, "Curves over PPO", columns=3, height=2.6)
  keys = " &nbsp; ".join(_policy(name) for name, rows in curves.items() if rows)
  caption = (
    "Faint: each iteration; bold: running mean. Dashed lines in the pretraining panel: the held-out "
    "loss of base and SFT."
  )
  return _section("curves", "Over PPO", keys, _figure(svg, caption))


def _tax(results: Results) -> str:
  svg = figures.svg(
    [lambda ax: panels.draw_tax(ax, results), lambda ax: panels.draw_trade_off(ax, results)],
    "Pretraining loss by policy, and score against it",
    columns=2,
    height=3.0,
  )
  lead = (
    "Aligning a model costs it some of what it knew. Mixing pretraining gradients into PPO "
    "(PPO-ptx) is meant to pay that back."
  )
  return _section("tax", "The alignment tax", lead, _figure(svg))


def _reward_model(results: Results) -> str:
  pairs = results.reward_model.validation.pairs
  svg = figures.svg(
    [lambda ax: panels.draw_accuracy(ax, results), lambda ax: panels.draw_calibration(ax, results)],
    "Reward-model accuracy and calibration",
    columns=2,
    height=3.4,
  )
  lead = (
    f"Share of {pairs} held-out pairs (ties left out) that the reward model orders as a labeler "
    "did, beside how often two labelers agree with each other. Grey diamonds: the paper's figures. "
    "Bars: 95% intervals."
  )
  return _section("reward-model", "The reward model beside its labelers", lead, _figure(svg))


def _fit_words(which: str, scores: dict) -> str:
  """The fitted curve of the gold score in words."""
  fitted = overoptimization.fit(which, scores["distance"], scores["gold"])
  if fitted is None:
    return ""
  alpha, beta = fitted
  sign, label, term = (
    "−+"[beta < 0],
    *(("Best of n", "d") if which == "best_of_n" else ("PPO", "log d")),
  )
  words = f"{label}: gold ≈ d ({number(alpha)} {sign} {number(abs(beta))} {term})"
  top = overoptimization.peak(which, alpha, beta)
  if top is not None and top <= scores["distance"].max():
    words += f", highest at d = {number(top)}"
  return words + ". "


def _overoptimization(results: Results) -> str:
  scores = overoptimization.scores(results)
  draws = [
    lambda ax, which=which: panels.draw_overoptimization(ax, results, which)
    for which in ("best_of_n", "rl")
  ]
  svg = figures.svg(draws, "Gold and reward-model score against KL", columns=2, height=3.6)
  caption = (
    "Solid: gold score; dashed: the reward model's; thin: the form of Gao et al. (2022) fitted to "
    "gold. "
  )
  caption += "".join(_fit_words(which, found) for which, found in scores.items())
  if "rl" in scores:
    caption += (
      "Squares: where the policies with a KL penalty ended, gold filled and reward model hollow."
    )
  lead = (
    "Push too hard on the reward model and what it stands for is lost. d = √KL from the PPO "
    "initialisation; both "
    "scores in standard deviations of its answers. "
    "Best of n: KL&nbsp;=&nbsp;log&nbsp;n&nbsp;−&nbsp;(n&nbsp;−&nbsp;1)/n."
  )
  return _section("overoptimization", "Over-optimisation", lead, _figure(svg, caption))


def _what_ran(config, prompts: list[str]) -> str:
  model, reward, ppo = config.model, config.reward_model, config.ppo
  facts = [
    f"preset {config.preset}, seed {config.seed}",
    f"policy {model.num_layers} layers × {model.d_model}",
    f"reward model {reward.num_layers} × {reward.d_model}",
    f"PPO {ppo.num_iterations} × {ppo.batch_size} episodes, β = {ppo.beta:g}, γ = {ppo.gamma:g}",
    f"{len(set(prompts))} held-out prompts",
  ]
  return " · ".join(html.escape(fact).replace(" ", "&nbsp;") for fact in facts)


def page(config, prompts: list[str], results: Results, found: list[dict], wins: dict) -> str:
  """The whole report as one HTML document."""
  judge = "the gold score" if results.has_gold else "the reward model"
  parts = {
    "findings": ("Findings", _findings(found)),
    "samples": ("Samples", _samples(prompts, results.measured)),
    "policies": ("Policies", _policies(results)),
    "wins": ("Win rates", _wins(wins, judge)),
    "curves": ("Over PPO", _curves(results)),
    "tax": ("Alignment tax", _tax(results)),
    "reward-model": ("Reward model", _reward_model(results)),
    "overoptimization": ("Over-optimisation", _overoptimization(results)),
  }
  links = " ".join(f'<a href="#{id_}">{title}</a>' for id_, (title, body) in parts.items() if body)
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>InstructGPT recipe: {html.escape(str(config.preset))}</title>"
    f"<style>{style.CSS}</style></head><body><h1>InstructGPT, step by step</h1>"
    f'<p class="soft ran">{_what_ran(config, prompts)}</p><nav>{links}</nav>'
    + "".join(body for _, body in parts.values())
    + "</body></html>\n"
  )


def write(directory, config, prompts: list[str], results: Results, found: list[dict]):
  """Writes findings.json, report.png and index.html.

  Args:
    directory: made if missing.
    config: Config of the run.
    prompts: one an answer, so each `samples_per_prompt` times in a row.
    results: of the run.
    found: what findings.find said of the results.
  """
  directory = pathlib.Path(directory)
  wins = findings.win_matrix(results, bootstrap=config.evaluate.bootstrap, seed=config.seed)
  text = page(config, prompts, results, found, wins)
  with writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "findings.json").write_text(
      json.dumps(plain(found), indent=1, allow_nan=False) + "\n"
    )
    figures.overview(results, wins, directory / "report.png")
    (directory / "index.html").write_text(text, encoding="utf-8")
