"""Whole figures: panels laid out as SVG for the page, and the overview as PNG.

Called by page.py. Matplotlib is imported only when a figure is drawn. Pyplot is not used, because it keeps figures in
global state.
"""

import io
import re
from collections.abc import Sequence

from instructjax.report import overoptimization, panels
from instructjax.report.overoptimization import Point
from instructjax.report.panels import INK
from instructjax.report.results import Results

_STYLE = {
  "font.size": 9.5,
  "axes.titlesize": 10.5,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.7,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": INK,
  "grid.alpha": 0.12,
  "grid.linewidth": 0.7,
  "xtick.major.size": 0,
  "ytick.major.size": 0,
  "legend.frameon": False,
  "legend.fontsize": 8.5,
  "lines.linewidth": 1.8,
  "figure.facecolor": "none",
  "axes.facecolor": "none",
  "text.parse_math": False,  # a dollar sign is a dollar sign
  "svg.fonttype": "none",
  "svg.hashsalt": "report",
} | {
  name: INK
  for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
}


def _svg(figure, label: str) -> str:
  """The figure as an SVG element that can stand in a page.

  Its ink takes the page's text colour. It has no date, so that equal figures are equal texts, and its groups have no
  ids, which would clash with those of other figures in the page.
  """
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg")
  text = buffer.getvalue()
  text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :]).replace(INK, "currentColor")
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _style():
  import matplotlib  # here: importing it takes most of a second, and only the report needs it

  return matplotlib.rc_context(_STYLE)


def _layout(draws: list, columns: int, width: float, height: float, **figure_kwargs):
  """A figure of those panels that have something to show, `columns` in a row; None if there is no such panel."""
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  # A panel says whether it drew anything only after it has drawn. So each is first drawn on paper that is thrown away,
  # to know how many there are to lay out.
  scratch = Figure()
  draws = [draw for draw in draws if draw(scratch.add_subplot())]
  if not draws:
    return None
  columns = min(columns, len(draws))
  rows = -(-len(draws) // columns)
  figure = Figure(
    figsize=(width, rows * height),
    layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    **figure_kwargs,
  )
  for i, draw in enumerate(draws):
    draw(figure.add_subplot(rows, columns, i + 1))
  return figure


def svg(draws: list, label: str, *, columns: int, height: float = 2.9) -> str:
  """The SVG element of those panels that have something to show; '' if there is no such panel.

  Args:
    draws: functions that draw into an axes and return whether they drew anything.
    label: description for readers who cannot see the figure.
    columns: panels in a row.
    height: height of a row in inches; the figure is 10 inches wide.
  """
  with _style():
    figure = _layout(draws, columns, 10, height)
    return "" if figure is None else _svg(figure, label)


def overview(results: Results, wins: dict, points: Sequence[Point], path):
  """Writes report.png, which shows a run in six panels and is meant for a README.

  Args:
    results: what evaluation measured.
    wins: the win rates, as of `findings.win_matrix`.
    points: as of `overoptimization_points.of_results`.
    path: the file.
  """
  curves = results.curves
  # A run from given weights may have no baseline and no base.
  opponents = [name for name in ("sft", "reward_base", "base", "ppo_init") if name in wins][:2]
  pushed = "rl" if "rl" in overoptimization.scores(results) else "best_of_n"
  title = "KL from the PPO initialisation, nats"
  draws = [
    lambda ax: panels.draw_score(ax, curves),
    lambda ax: panels.draw_curve(ax, curves, "kl", title, square_root=True),
    lambda ax: panels.draw_tax(ax, results),
    lambda ax: panels.draw_win_rates(ax, wins, opponents),
    lambda ax: panels.draw_overoptimization(ax, results, pushed, points),
    lambda ax: panels.draw_accuracy(ax, results),
  ]
  with _style():
    from matplotlib.lines import Line2D

    figure = _layout(draws, 3, 14, 4, facecolor="white")
    if figure is None:
      raise ValueError("no panel of the overview has anything to show")
    handles = [
      Line2D([], [], color=panels.COLOURS[name], label=panels.NAMES[name], linewidth=3)
      for name in curves
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) or 1)
    figure.savefig(path, dpi=110)
