"""The panels of a comparison of runs, drawn into axes, and the same values in words. Called by comparison_page.py.

A group of runs has a colour, and a policy has a mark and a line. Where there is one group, policies have the colours
that they have in a run's report.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from instructjax.report import comparison, panels, tables
from instructjax.report.comparison import Spread
from instructjax.report.comparison_groups import Group
from instructjax.report.panels import INK

# Each has a contrast of 3:1 or more with white and with the dark page.
COLOURS = ("#3b82d6", "#d2691e", "#1f9d6b", "#9b6ad6", "#b58900", "#d9485f", "#1496a8", "#7d8590")
MARKS = {"ppo": "o", "ppo_ptx": "s", "rloo": "^", "grpo": "v", "ppo_beta0": "X"}
LINES = {"ppo": "--", "ppo_beta0": ":"}
GAINS = {"gold": "gold score gained", "reward": "reward gained, RM std"}


def colour(number: int) -> str:
  """The colour of the group with this number; after eight they begin again."""
  return COLOURS[number % len(COLOURS)]


def shade(groups: Sequence[Group], number: int, policy: str) -> str:
  """The colour of a policy of a group."""
  return panels.COLOURS[policy] if len(groups) == 1 else colour(number)


def draw_win_rates(
  ax, rates: Mapping[str, Sequence[Spread | None]], groups: Sequence[Group]
) -> bool:
  """Draws what is preferred to what, in how many of the answers: the mean over seeds, its interval, and each seed."""
  if not rates:
    return False
  for row, spreads in enumerate(rates.values()):
    for number, found in enumerate(spreads):
      if found is None:
        continue
      place = row + 0.7 * (number - (len(groups) - 1) / 2) / max(len(groups), 2)
      own = colour(number)
      if found.interval:
        low, high = np.clip(found.interval, 0, 1)
        ax.plot([low, high], [place] * 2, color=own, linewidth=2.2, solid_capstyle="round")
      ax.plot(found.values, [place] * len(found.values), "|", color=own, markersize=7)
      ax.plot(found.mean, place, "o", color=own, markersize=6)
  ax.set_yticks(range(len(rates)), list(rates))
  ax.set_ylim(len(rates) - 0.5, -0.5)
  ax.grid(axis="y", visible=False)
  ax.axvline(0.5, color=INK, linewidth=1)
  ax.set_xlim(0, 1)
  ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
  ax.set_title("Win rates")
  return True


def on_frontier(groups: Sequence[Group]) -> list[str]:
  """The policies of `draw_frontier`. With several groups, PPO with beta = 0 is left out: it takes all the room."""
  policies = comparison.rl_policies(groups)
  bounded = [name for name in policies if name != "ppo_beta0"]
  return bounded if bounded and len(groups) > 1 else policies


def draw_frontier(ax, groups: Sequence[Group], key: str) -> bool:
  """Draws what was gained (`gold` or `reward`) against KL: a thin line a seed, and where each policy ended."""
  drawn = False
  for number, group in enumerate(groups):
    for policy in on_frontier(groups):
      ways = [comparison.gains(run, policy) for run in group.runs]
      kept = [way for way in ways if way and key in way]
      style, own = LINES.get(policy, "-"), shade(groups, number, policy)
      for way in kept:
        ax.plot(way["kl"], way[key], style, color=own, linewidth=0.8, alpha=0.45)
        drawn = True
      steps = min((len(way["kl"]) for way in kept), default=0)
      if len(kept) > 1:
        mean = lambda name, kept=kept, steps=steps: np.mean(
          [way[name][:steps] for way in kept], axis=0
        )
        ax.plot(mean("kl"), mean(key), style, color=own, linewidth=2)
      end = comparison.ends(group, policy)
      if end and "kl" in end and key in end:
        _cross(ax, end["kl"], end[key], own, MARKS.get(policy, "D"))
        drawn = True
  ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
  ax.set_xlim(left=0)
  ticks = panels.square_root_ticks(ax.get_xlim()[1])
  ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  ax.axhline(0, color=INK, linewidth=0.7)
  ax.set_xlabel("KL from the PPO initialisation, nats (√ scale)")
  ax.set_ylabel(GAINS[key])
  ax.set_title("Gold score against KL" if key == "gold" else "Reward-model score against KL")
  return drawn


def draw_tax(ax, groups: Sequence[Group], key: str) -> bool:
  """Draws what each policy gained against what it forgot of pretraining text; one line joins a policy's groups."""
  drawn = False
  for policy in comparison.rl_policies(groups):
    if policy == "ppo_beta0":  # which has left the scale of the others
      continue
    places = []
    for number, group in enumerate(groups):
      end = comparison.ends(group, policy)
      if end and "tax" in end and key in end:
        own = shade(groups, number, policy)
        _cross(ax, end["tax"], end[key], own, MARKS.get(policy, "D"))
        places.append((end["tax"].mean, end[key].mean))
        drawn = True
    if len(places) > 1:
      ax.plot(*zip(*places), LINES.get(policy, "-"), color=INK, linewidth=0.8, alpha=0.6)
  ax.axvline(0, color=INK, linewidth=0.7)
  ax.set_xlabel("loss on pretraining text above SFT's, nats a token")
  ax.set_ylabel(GAINS[key])
  ax.set_title("What is gained, and what it costs")
  return drawn


def _cross(ax, x: Spread, y: Spread, own: str, mark: str):
  """A mark at the means, with bars of one standard deviation over seeds both ways."""
  if len(x.values) > 1:
    ax.plot([x.mean - x.std, x.mean + x.std], [y.mean] * 2, color=own, linewidth=1.2)
  if len(y.values) > 1:
    ax.plot([x.mean] * 2, [y.mean - y.std, y.mean + y.std], color=own, linewidth=1.2)
  ax.plot(x.mean, y.mean, mark, color=own, markersize=7, markeredgecolor=INK, markeredgewidth=0.6)


def in_words(found: Spread | None, show: Callable[[float], str] = tables.number) -> str:
  """A spread as text: the mean, and over several seeds its interval."""
  if found is None:
    return "not measured"
  if found.interval is None:
    return show(found.mean)
  low, high = found.interval
  return f"{show(found.mean)} ({show(low)} to {show(high)})"


def win_rates_in_words(
  rates: Mapping[str, Sequence[Spread | None]], groups: Sequence[Group]
) -> str:
  """The values of `draw_win_rates`."""
  return "; ".join(
    f"{title}: "
    + ", ".join(
      f"{group.label} {in_words(found, tables.percent)}"
      for group, found in zip(groups, spreads, strict=True)
      if found
    )
    for title, spreads in rates.items()
  )


def ends_in_words(groups: Sequence[Group], across: str) -> str:
  """Where each policy of each group ended; `across` is `kl` or `tax`."""
  parts = []
  for group in groups:
    for policy in comparison.rl_policies(groups):
      end = comparison.ends(group, policy)
      if end and across in end and not (across == "tax" and policy == "ppo_beta0"):
        gained = ", ".join(f"{GAINS[key]} {in_words(end[key])}" for key in GAINS if key in end)
        what = "KL" if across == "kl" else "loss above SFT's"
        parts.append(
          f"{group.label}, {panels.NAMES[policy]}: {what} {in_words(end[across])}, {gained}"
        )
  return "; ".join(parts)
