"""The report's panels. Each draws one thing into an axes, and returns whether it had anything to draw.

Called by figures.py and page.py with the results of a run. Imports no matplotlib, since the caller passes the axes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from instructjax.core.stages import POLICIES, UNTRAINED
from instructjax.report import equal_kl, findings, intervals, overoptimization
from instructjax.report.overoptimization import Point, column, running_mean
from instructjax.report.results import Measured, Results

NAMES = {name: policy.title for name, policy in (POLICIES | UNTRAINED).items()}
COLOURS = {name: policy.colour for name, policy in (POLICIES | UNTRAINED).items()}
BEST_OF_N_COLOUR = "#8b5cc7"
# In the page currentColor takes the place of this colour, so that figures follow the light or dark scheme.
INK = "#1c2127"
# The paper's numbers with their +-: 5-fold cross-validation (sec 4.1), agreement between labelers (sec 3.4).
_PAPER_ACCURACY = {"train": (0.724, 0.004), "heldout": (0.696, 0.009)}
_PAPER_AGREEMENT = {"train": (0.726, 0.015), "heldout": (0.773, 0.013)}


def pretraining_loss(results: Results) -> dict[str, float]:
  """The mean loss per token of held-out pretraining text, in nats, of each policy of the policy's network."""
  # Not the larger base's: the alignment tax is about what one network loses.
  return {
    name: findings.loss_per_token(rows)
    for name, rows in results.pretraining.items()
    if name != "reward_base"
  }


def accuracy_rows(results: Results) -> list[tuple[str, float, float, tuple[float, float]]]:
  """Accuracies of the reward model and agreement of the labelers, beside the paper's numbers.

  Returns:
    Rows of (label, value, half the width of its 95% interval, (the paper's value, its +-)).
  """
  rm, agreement = results.reward_model, results.agreement
  rows = []

  def add(label, value, stderr, paper):
    rows.append((label, float(value), 1.96 * float(stderr), paper))

  names = {"train": "training labelers", "heldout": "held-out labelers"}
  for group, found in (("train", rm.validation), ("heldout", rm.heldout_labelers)):
    if found:
      label = names[group] if rm.heldout_labelers else "held-out prompts"
      paper = _PAPER_ACCURACY[group]
      add(f"Reward model, {label}", found.accuracy, found.accuracy_stderr, paper)
  folds = {
    "train": [fold.train for fold in rm.cross_validation],
    "heldout": [fold.heldout for fold in rm.cross_validation],
  }
  for group, found in folds.items():
    if found:
      stderr = np.std(found, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else 0.0
      label = "folds trained on" if group == "train" else "fold left out"
      add(f"Cross-validation, {label}", np.mean(found), stderr, _PAPER_ACCURACY[group])
  for group, found in vars(agreement).items() if agreement else ():
    label = f"Agreement, {names[group]}"
    add(label, found.agreement, found.agreement_stderr, _PAPER_AGREEMENT[group])
  return rows


def draw_curve(ax, curves: Mapping, key: str, title: str, *, square_root: bool = False) -> bool:
  """Draws a metric over iterations for each RL stage: faint as logged, bold as a running mean."""
  drawn = False
  for name, rows in curves.items():
    step, value = column(rows, "step", key)
    if not len(step):
      continue
    drawn = True
    value = np.maximum(value, 0) if square_root else value
    ax.plot(step, value, color=COLOURS[name], alpha=0.25, linewidth=1)
    ax.plot(
      step, running_mean(value, max(1, len(step) // 12)), color=COLOURS[name], label=NAMES[name]
    )
  if square_root:
    ax.set_yscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set_ylim(bottom=0)
    ticks = square_root_ticks(ax.get_ylim()[1])
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
  ax.set_title(title)
  ax.set_xlabel("iteration")
  return drawn


def square_root_ticks(top: float) -> list[float]:
  """Ticks for an axis of square roots: 0, and values of one digit up to `top` that lie about evenly on it."""
  rounded = [float(f"{top * (k / 4) ** 2:.0e}") for k in range(1, 5)]
  return [0.0, *(tick for tick in rounded if tick <= top)]


def reward_curves(curves: Mapping) -> list[tuple[str, str]]:
  """(metric, title) of each reward of `ppo.rewards`, and of their sum first; [] for the reward model alone."""
  names = dict.fromkeys(name for rows in curves.values() for row in rows for name in row)
  single = [name for name in names if name.startswith("rewards/") and not name.endswith("/std")]
  titles = {name: f"Reward: {name.removeprefix('rewards/')}, unweighted" for name in single}
  if titles:
    titles["rewards/total"] = "Sum of rewards (maximised)"
  titles.pop("rewards/rm", None)  # it has a panel always
  if "ensemble_std" in names:
    titles["ensemble_std"] = "Disagreement of the ensemble"
  return sorted(titles.items(), key=lambda pair: pair[0] != "rewards/total")


def draw_score(ax, curves: Mapping) -> bool:
  """Draws the reward-model score (dashed) and the gold score (solid) over iterations, in one panel."""
  drawn = False
  lines = (("gold", "-", "gold score"), ("reward", "--", "reward-model score"))
  for key, line, label in lines:
    columns = {name: column(rows, "step", key) for name, rows in curves.items()}
    for name, (step, value) in columns.items():
      if len(step):
        smooth = running_mean(value, max(1, len(step) // 12))
        ax.plot(step, smooth, line, color=COLOURS[name])
        drawn = True
    if any(len(step) for step, _ in columns.values()):
      ax.plot([], [], line, color=INK, label=label)
  if drawn:
    ax.legend()
  ax.set_title("Score over PPO")
  ax.set_xlabel("iteration")
  return drawn


def draw_pretraining_over_ppo(ax, results: Results) -> bool:
  """Draws the held-out pretraining loss over iterations; lines mark the losses of the base and of SFT."""
  loss, curves = pretraining_loss(results), results.curves
  title = "Held-out pretraining loss, nats a token"
  drawn = draw_curve(ax, curves, "validation/pretrain_loss", title)
  for name in ("base", "sft"):
    if name in loss:
      ax.axhline(loss[name], color=COLOURS[name], linewidth=1.2, linestyle=(0, (4, 2)))
      ax.annotate(
        NAMES[name],
        (0.01, loss[name]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=8,
        color=COLOURS[name],
      )
  return drawn


def draw_tax(ax, results: Results) -> bool:
  """Draws every policy's held-out pretraining loss as its distance from the base's: the alignment tax."""
  loss = pretraining_loss(results)
  if not loss:
    return False
  start = loss.get("base", min(loss.values()))
  ax.axvline(start, color=COLOURS["base"], linewidth=1.2)
  for i, (name, value) in enumerate(loss.items()):
    ax.plot(
      [start, value], [i, i], color=COLOURS[name], linewidth=5, alpha=0.45, solid_capstyle="butt"
    )
    ax.plot(value, i, "o", color=COLOURS[name], markersize=8)
    _beside(ax, f"{value:.2f}", max(start, value), i, gap=8)
  _named_rows(ax, [NAMES[name] for name in loss])
  ax.margins(x=0.14)
  ax.set_title("Loss on pretraining text")
  ax.set_xlabel("nats a token, held out")
  return True


# Where a label may stand beside its point: offset in points, and which side of it is there.
_SIDES = (
  ((0, 7), "center", "bottom"),
  ((0, -7), "center", "top"),
  ((8, 0), "left", "center"),
  ((-8, 0), "right", "center"),
)


def _label(ax, points: Mapping[str, tuple[float, float]]):
  """Writes each point's label on the first side where it touches no label before it; above if there is none."""
  ax.autoscale_view()  # which matplotlib does as late as it draws: until then the points are outside, without extents
  taken = []
  for label, point in points.items():
    style = dict(textcoords="offset points", fontsize=8.5)
    texts = [ax.annotate(label, point, xytext=at, ha=ha, va=va, **style) for at, ha, va in _SIDES]
    boxes = [text.get_window_extent() for text in texts]
    free = [i for i, box in enumerate(boxes) if not any(box.overlaps(other) for other in taken)]
    chosen = free[0] if free else 0
    taken.append(boxes[chosen])
    for i, text in enumerate(texts):
      if i != chosen:
        text.remove()


def draw_trade_off(ax, results: Results) -> bool:
  """Draws every policy's score against its held-out pretraining loss; up and to the left is better."""
  loss, measured = pretraining_loss(results), results.measured
  names = [name for name in loss if name in measured]
  points = {name: (loss[name], float(np.mean(intervals.judged(measured[name])))) for name in names}
  for name, point in points.items():
    ax.plot(*point, "o", color=COLOURS[name], markersize=8)
  ax.margins(x=0.15, y=0.15)
  _label(ax, {NAMES[name]: point for name, point in points.items()})
  ax.set_xlabel("loss on pretraining text, nats a token")
  ax.set_ylabel("gold score" if results.has_gold else "reward-model score")
  ax.set_title("What is gained, and what it costs")
  return len(names) > 1


def draw_win_rates(ax, wins: dict, opponents: list[str]) -> bool:
  """Draws the win rate of every policy over one or two opponents (dots, diamonds), with 95% intervals."""
  opponents = [name for name in opponents if name in wins]
  # A single opponent has no rate over itself.
  names = [name for name in wins if [name] != opponents]
  for j, opponent in enumerate(opponents):
    # Two opponents share a row: one a little above its middle, one below.
    shift = 0.36 * (j - (len(opponents) - 1) / 2)
    ax.plot([], [], "oD"[j], color=INK, label=f"over {NAMES[opponent]}", markersize=5)
    for i, name in enumerate(names):
      if name != opponent:
        rate, (low, high) = wins[name][opponent]
        colour = COLOURS[name]
        ax.plot([low, high], [i + shift] * 2, color=colour, linewidth=2.2, solid_capstyle="round")
        ax.plot(rate, i + shift, "oD"[j], color=colour, markersize=5.5)
        _beside(ax, f"{rate:.0%}", high, i + shift)
  ax.axvline(0.5, color=INK, linewidth=1)
  _named_rows(ax, [NAMES[name] for name in names])
  ax.set_xlim(0, 1.08)
  ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
  ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
  ax.set_title("Win rate")
  if len(opponents) == 1:
    ax.set_title(f"Win rate over {NAMES[opponents[0]]}")
  elif opponents:
    ax.legend(
      loc="lower right", bbox_to_anchor=(1, 0.985), ncols=2, handletextpad=0.1, columnspacing=1
    )
  return bool(opponents and names)


def _named_rows(ax, labels: list[str]):
  """Labels the vertical axis with one row per name, the first on top."""
  ax.set_yticks(range(len(labels)), labels)
  ax.set_ylim(len(labels) - 0.5, -0.5)
  ax.grid(axis="y", visible=False)


def _beside(ax, text: str, x: float, y: float, *, gap: float = 5):
  ax.annotate(text, (x, y), xytext=(gap, 0), textcoords="offset points", va="center", fontsize=8)


def draw_accuracy(ax, results: Results) -> bool:
  """Draws the reward model's accuracy and how often labelers agree; diamonds are the paper's numbers."""
  rows = accuracy_rows(results)
  if not rows:
    return False
  for i, (label, value, half, (paper, error)) in enumerate(rows):
    colour = "#3b82d6" if not label.startswith("Agreement") else "#e3a008"
    ax.plot(
      [value - half, value + half], [i, i], color=colour, linewidth=2.4, solid_capstyle="round"
    )
    ax.plot(value, i, "o", color=colour, markersize=6.5)
    _beside(ax, f"{value:.1%}", value + half, i)
    ax.plot(
      [paper - error, paper + error],
      [i + 0.27] * 2,
      color=INK,
      linewidth=1,
      alpha=0.5,
    )
    ax.plot(
      paper, i + 0.27, "D", color=INK, markersize=3.5, alpha=0.5, label=None if i else "paper"
    )
  ax.axvline(0.5, color=INK, linewidth=1)
  _named_rows(ax, [row[0] for row in rows])
  ax.set_xlim(0.47, max([0.85] + [row[1] + row[2] + 0.06 for row in rows]))
  ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
  ax.legend(loc="lower right", bbox_to_anchor=(1, 0.985), handletextpad=0.1)
  ax.set_title("Reward model and labelers")
  return True


def draw_calibration(ax, results: Results) -> bool:
  """Draws how often the reward model is right against the probability that it gives to being right."""
  if results.reward_model.validation is None:
    return False
  found = results.reward_model.validation.calibration
  columns = (found.confidence, found.accuracy, found.count)
  confidence, accuracy, count = (np.array(x, float) for x in columns)
  kept = count > 0
  ax.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, alpha=0.5, linestyle=(0, (4, 2)))
  ax.plot(confidence[kept], accuracy[kept], color="#3b82d6", linewidth=1.2)
  ax.scatter(
    confidence[kept], accuracy[kept], s=8 + 240 * count[kept] / count.sum(), color="#3b82d6"
  )
  ax.set_xlabel("predicted probability")
  ax.set_ylabel("share right")
  ax.set_title(f"Calibration (expected error {found.expected_error:.1%})")
  return True


def draw_overoptimization(ax, results: Results, which: str, points: Sequence[Point]) -> bool:
  """Draws gold score (solid) and reward-model score (dashed) against sqrt(KL), and the curve fitted to the gold score.

  Without gold scores there is only the reward model's, and no over-optimisation to see.

  Args:
    ax: where to.
    results: what evaluation measured.
    which: 'best_of_n' or 'rl', as in `overoptimization.scores`.
    points: of 'rl', its checkpoints, as diamonds.
  """
  found = overoptimization.scores(results).get(which)
  title = "best of n" if which == "best_of_n" else "PPO, no KL penalty"
  ax.set_title(
    f"Over-optimisation: {title}" if found is None or "gold" in found else f"Reward: {title}"
  )
  ax.set_xlabel("√KL from the PPO initialisation")
  if not found:
    return False
  colour = BEST_OF_N_COLOUR if which == "best_of_n" else COLOURS["ppo_beta0"]
  distance = found["distance"]
  for key, line in (("reward", "--"), ("gold", "-")):
    if key not in found:
      continue
    if which == "best_of_n":
      ax.plot(distance, found[key], "o" + line, color=colour, markersize=4)
    else:
      # Single iterations are noisy in both directions, so the line is a running mean of distance and score alike.
      # Over five at least: of a dozen iterations, single ones would go to and fro in distance.
      window = max(5, len(distance) // 12)
      ax.plot(distance, found[key], ".", color=colour, alpha=0.3, markersize=4)
      ax.plot(running_mean(distance, window), running_mean(found[key], window), line, color=colour)
  fitted = "gold" in found and overoptimization.fit(which, distance, found["gold"])
  if fitted:
    d = np.linspace(0, distance.max(), 100)
    ax.plot(d, overoptimization.curve(which, d, *fitted), color=INK, linewidth=1)
  ax.set_ylabel("score, standard deviations")
  if which == "best_of_n":
    for row, d, score in zip(results.best_of_n, distance, found["reward"]):
      ax.annotate(
        f"n={row.n}",
        (d, score),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=7.5,
      )
  else:
    _mark_checkpoints(ax, points, colour)
    _mark_penalised(ax, results.measured)
  ax.axhline(0, color=INK, linewidth=0.7)
  return True


def _mark_checkpoints(ax, points: Sequence[Point], colour: str):
  """Marks checkpoints with their intervals: the gold score filled, the reward model's hollow."""
  for point in points:
    distance, (left, right) = point.distance
    for key, (value, (low, high)) in point.scores.items():
      ax.plot([left, right], [value] * 2, color=colour, linewidth=1)
      ax.plot([distance] * 2, [low, high], color=colour, linewidth=1)
      fill = colour if key == "gold" else "none"
      ax.plot(distance, value, "D", color=colour, markerfacecolor=fill, markersize=5.5)


def draw_equal_kl(ax, results: Results, table: Mapping) -> bool:
  """Draws what each method gains against its KL: best-of-n by n, RL runs by checkpoint (dots) or by iteration.

  Squares are finished policies. What is measured on test prompts has its intervals over them.

  `table` is that of `equal_kl.table`.
  """
  if not table:
    return False
  for name, curve in equal_kl.curves(results).items():
    colour, style = COLOURS.get(name, BEST_OF_N_COLOUR), "-"
    if name == equal_kl.BEST_OF_N:
      style = "o--"
    kl = np.maximum(curve.kl, 0)
    label = NAMES.get(name, "Best of n")
    ax.plot(kl, curve.gain, style, color=colour, label=label, markersize=3.5)
    method = table["methods"][name]
    marks = [(point, "o", 4) for point in method["checkpoints"]]
    for point, mark, size in [*marks, (method["end"], "s", 6)]:
      if point:  # best-of-n has no end
        (left, right), (low, high) = point["kl_interval"], point["interval"]
        ax.plot([max(left, 0), right], [point["gain"]] * 2, color=colour, linewidth=1)
        ax.plot([max(point["kl"], 0)] * 2, [low, high], color=colour, linewidth=1)
        ax.plot(max(point["kl"], 0), point["gain"], mark, color=colour, markersize=size)
  ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
  ax.set_xlim(left=0)
  ticks = square_root_ticks(ax.get_xlim()[1])
  ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  ax.axhline(0, color=INK, linewidth=0.7)
  ax.set_xlabel("KL from the PPO initialisation, nats (√ scale)")
  ax.set_ylabel("gold score gained" if results.has_gold else "reward-model score gained")
  ax.set_title("Gain against KL")
  ax.legend()
  return True


def _mark_penalised(ax, measured: Mapping[str, Measured]):
  """Marks where the policies with a KL penalty ended: the gold score filled, the reward model's hollow."""
  init = measured["ppo_init"]
  for name in ("ppo", "ppo_ptx"):
    found = measured.get(name)
    if found and found.kl is not None and found.gold is not None and init.gold is not None:
      distance = np.sqrt(max(0.0, float(np.mean(found.kl))))
      marks = (
        (found.gold, init.gold, COLOURS[name], NAMES[name]),
        (found.reward, init.reward, "none", None),
      )
      for value, start, fill, label in marks:
        score = (np.mean(value) - np.mean(start)) / (np.std(start) or 1.0)
        ax.plot(
          distance, score, "s", color=COLOURS[name], markerfacecolor=fill, markersize=7, label=label
        )
