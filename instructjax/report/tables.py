"""The report's tables of numbers: every policy, what needs no training, habits, new topics.

Called by page.py, whose template shows them. Pure functions of a run's results; numbers become text here.
"""

import math
from collections.abc import Mapping

import numpy as np

from instructjax.report import doubts, findings, intervals, panels, rounds
from instructjax.report.results import Results


def number(value: float) -> str:
  """The number with two decimals (none from 100 on) and a real minus sign; a dash for a missing value."""
  if value is None or not math.isfinite(value):
    return "–"
  text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
  return text.replace("-", "−")


def percent(value: float) -> str:
  return f"{100 * value:.0f}%".replace("-", "−") if math.isfinite(value) else "–"


def policies(results: Results) -> dict:
  """The table of policies."""
  rows = {name: row for name, row in findings.summary(results).items() if name in results.measured}
  columns = {
    "gold": ("Gold score", number),
    "reward": ("RM score", number),
    "kl": ("KL, nats", number),
    "pretrain_loss": ("Pretraining loss", number),
    "names_topic": ("Names the topic", percent),
    "length": ("Tokens", number),
    "ended": ("Ended", percent),
  }
  return _table(rows, columns)


def _table(rows: Mapping[str, Mapping], columns: Mapping) -> dict:
  """A table: the titles of those columns that some row has a value for, and the cells by row.

  Args:
    rows: row -> key of a column -> value.
    columns: key -> (title, function that shows a value).
  """
  columns = {
    key: value for key, value in columns.items() if any(key in row for row in rows.values())
  }
  return {
    "columns": [title for title, _ in columns.values()],
    "rows": {
      name: [show(row[key]) if key in row else "" for key, (_, show) in columns.items()]
      for name, row in rows.items()
    },
  }


def _rate(win: tuple[float, list[float]]) -> str:
  return f"{percent(win[0])} [{percent(win[1][0])}, {percent(win[1][1])}]"


def untrained(results: Results, config) -> dict:
  """The table of what needs no training, or no RL: scores, and how often PPO-ptx's answer is judged better."""
  rows = findings.summary(results)
  rows = {name: row for name, row in rows.items() if name not in results.measured}
  seed, bootstrap = config.seed, config.evaluate.bootstrap
  wins = doubts.untrained_wins(results, bootstrap=bootstrap, seed=seed)
  for name, best in results.best_at_kl.items():
    rng = np.random.default_rng(seed)
    wins[f"best_of_n/{name}"] = intervals.mean_interval(best.wins_P, bootstrap, rng)
  beaten_by = {name: panels.NAMES[name.partition("/")[2] or "ppo_ptx"] for name in wins}
  shown = {}
  for name, row in rows.items():
    title = panels.NAMES.get(name, "")
    if not title:
      title = f"Best of {row['n']:.0f} of PPO init, beside {beaten_by[name]}"
    shown[title] = dict(row) | (
      {"won": f"{beaten_by[name]}: {_rate(wins[name])}"} if name in wins else {}
    )
  columns = {
    "won": ("Policy preferred to it", str),
    "gold": ("Gold score", number),
    "reward": ("RM score", number),
    "kl": ("KL, nats", number),
    "names_topic": ("Names the topic", percent),
  }
  return _table(shown, columns)


def habits(results: Results) -> dict:
  """The table of repetition, copying and sameness, of policies and of what needs no training."""
  rows = findings.summary(results)
  rows = {panels.NAMES[name]: row for name, row in rows.items() if name in panels.NAMES}
  columns = {
    "repeats": ("Repeat a word pair", percent),
    "topic_again": ("Name the topic again", percent),
    "copied": ("Words copied from the prompt", percent),
    "distinct": ("Different answers", percent),
  }
  return _table(rows, columns)


def within_policies(results: Results, config) -> dict:
  """The table of how far reward and gold score agree within each policy's answers; no rows without a gold score.

  A reward model can order the policies rightly and still not tell one policy's answers apart.
  """
  rng = np.random.default_rng(config.seed)
  found = {
    panels.NAMES[name]: rounds.correlation(
      row.reward, row.gold, results.samples_per_prompt, config.evaluate.bootstrap, rng
    )
    for name, row in results.measured.items()
    if row.gold is not None
  }
  cells = {
    name: {"r": f"{number(value)} [{number(low)}, {number(high)}]"}
    for name, (value, (low, high)) in found.items()
  }
  return _table(cells, {"r": ("Correlation of reward and gold score", str)})


def new_topics(results: Results) -> dict:
  """The table of topics seen and not seen in training."""
  if not results.new_topics:
    return {}
  rows = {}
  for name, new in results.new_topics.items():
    seen = results.measured[name]
    row = {}
    for where, found in (("seen", seen), ("new", new)):
      if found.gold is not None:
        row[f"gold_{where}"] = float(np.mean(found.gold))
      if found.names_topic is not None:
        row[f"topic_{where}"] = float(np.mean(found.names_topic))
    rows[panels.NAMES[name]] = row
  columns = {
    "gold_seen": ("Gold score, seen", number),
    "gold_new": ("new", number),
    "topic_seen": ("Names the topic, seen", percent),
    "topic_new": ("new", percent),
  }
  return _table(rows, columns)


def shots(shots: Mapping[int, float]) -> str:
  """The scores of the larger base with each number of worked examples, in words."""
  return ", ".join(f"{count}: {number(score)}" for count, score in shots.items())
