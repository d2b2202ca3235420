"""What the panels show: means, rows with their intervals, ticks."""

import dataclasses

import numpy as np
import pytest
from matplotlib import pyplot

from instructjax.core import results as core_results
from instructjax.report import equal_kl, overoptimization_points, panels
from tests.report import example


def test_pretraining_loss_is_a_mean_over_tokens():
  # 11 nats over 10 tokens, not the mean of the rows' 2 and 1.
  results = dataclasses.replace(example.results(), pretraining={"sft": np.array([[2, 1], [9, 9]])})
  assert panels.pretraining_loss(results) == {"sft": 1.1}


def test_accuracy_rows():
  rows = panels.accuracy_rows(example.results())
  named = {label: (value, half) for label, value, half, _ in rows}
  assert len(rows) == 6
  assert named["Reward model, held-out labelers"] == (0.68, pytest.approx(0.0196))
  # Folds .60 and .64: standard deviation .02 sqrt 2, standard error .02.
  assert named["Cross-validation, fold left out"] == pytest.approx((0.62, 1.96 * 0.02))
  assert rows[-1][3] == (0.773, 0.013)
  reward_model = core_results.RewardModel(0.0, example.judged(0.6), None, ())
  alone = dataclasses.replace(example.results(), reward_model=reward_model, agreement=None)
  assert [row[0] for row in panels.accuracy_rows(alone)] == ["Reward model, held-out prompts"]


def test_labels_of_policies_that_are_alike_do_not_lie_over_each_other():
  """SFT and the PPO initialisation gain and cost nearly the same."""
  same = example.results()
  rows = same.pretraining["sft"]
  alike = dataclasses.replace(
    same,
    pretraining={name: rows for name in ("sft", "ppo_init", "ppo", "ppo_ptx")},
    measured={name: same.measured["sft"] for name in ("sft", "ppo_init", "ppo", "ppo_ptx")},
  )
  _, ax = pyplot.subplots()
  try:
    assert panels.draw_trade_off(ax, alike)
    assert sorted(text.get_text() for text in ax.texts) == ["PPO", "PPO init", "PPO-ptx", "SFT"]
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
  finally:
    pyplot.close()


def test_ticks_of_an_axis_of_square_roots():
  assert panels.square_root_ticks(16.0) == [0, 1, 4, 9]  # 16 is two digits, 20 above the axis
  assert panels.square_root_ticks(0.64) == [0, 0.04, 0.2, 0.4, 0.6]


def test_each_reward_of_a_list_has_a_panel_and_the_reward_model_no_second_one():
  curves = {
    "ppo": [{"step": 1, "reward": 0.1, "reward_std": 1.0}],
    "ppo_ptx": [
      {"step": 1, "rewards/polite": 1.0, "rewards/polite/std": 0.5, "rewards/rm": 0.1},
      {"step": 2, "rewards/length": -3.0, "rewards/total": 0.4, "ensemble_std": 0.2},
    ],
  }
  assert panels.reward_curves(curves) == [
    ("rewards/total", "Sum of rewards (maximised)"),
    ("rewards/polite", "Reward: polite, unweighted"),
    ("rewards/length", "Reward: length, unweighted"),
    ("ensemble_std", "Disagreement of the ensemble"),
  ]
  assert panels.reward_curves({"ppo": curves["ppo"]}) == []


def test_a_short_run_does_not_go_to_and_fro_in_distance():
  """Eight iterations whose KL alternates about its trend: means of five are as even as the trend."""
  kl = [n + (0.9 if n % 2 else -0.9) for n in range(1, 9)]
  rows = [{"step": n, "kl": k**2, "gold": 0.0, "reward": 0.0} for n, k in enumerate(kl, 1)]
  curves = {**example.results().curves, "ppo_beta0": rows}
  results = dataclasses.replace(example.results(), curves=curves)
  _, ax = pyplot.subplots()
  assert panels.draw_overoptimization(ax, results, "rl", [])
  lines = [line.get_xdata() for line in ax.get_lines() if line.get_linestyle() in ("-", "--")]
  (smooth, *_) = [x for x in lines if len(x) == 8]
  # Of five: their middle, with .9 / 5 left over. The ends are single iterations, then means of three.
  np.testing.assert_allclose(smooth[2:6], [3 + 0.18, 4 - 0.18, 5 + 0.18, 6 - 0.18])
  pyplot.close("all")


def bars(ax):
  """Ends of the lines that have two points, horizontal or vertical."""
  lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 2]
  return [[*zip(line.get_xdata(), line.get_ydata())] for line in lines]


def markers(ax, kind):
  """Where there is a mark of a kind, and whether it is hollow."""
  return [
    (*line.get_xdata(), *line.get_ydata(), line.get_markerfacecolor() == "none")
    for line in ax.get_lines()
    if line.get_marker() == kind and len(line.get_xdata()) == 1
  ]


def test_checkpoints_are_diamonds_with_their_intervals():
  results = example.with_checkpoints()
  points = overoptimization_points.of_results(results, bootstrap=20, seed=0)
  assert len(points) == 3
  _, ax = pyplot.subplots()
  assert panels.draw_overoptimization(ax, results, "rl", points)
  expected = [
    (point.distance[0], point.scores[key][0], key == "reward")
    for point in points
    for key in ("gold", "reward")
  ]
  assert markers(ax, "D") == expected
  (left, right), (low, high) = points[0].distance[1], points[0].scores["gold"][1]
  x, y, _ = expected[0]
  assert {((left, y), (right, y)), ((x, low), (x, high))} <= set(map(tuple, bars(ax)))
  _, ax = pyplot.subplots()
  assert panels.draw_overoptimization(ax, results, "best_of_n", points) and not markers(ax, "D")
  pyplot.close("all")


def test_checkpoints_at_equal_kl_are_dots_with_their_intervals():
  results = example.with_checkpoints()
  table = equal_kl.table(results, bootstrap=20, seed=0)
  _, ax = pyplot.subplots()
  assert panels.draw_equal_kl(ax, results, table)
  methods = [table["methods"][name] for name in results.curves]
  dots = [(p["kl"], p["gain"], False) for method in methods for p in method["checkpoints"]]
  assert len(dots) == 6 and markers(ax, "o") == dots
  assert [mark[:2] for mark in markers(ax, "s")] == [
    (method["end"]["kl"], method["end"]["gain"]) for method in methods
  ]
  one = methods[0]["checkpoints"][0]
  (left, right), (low, high), x, y = one["kl_interval"], one["interval"], one["kl"], one["gain"]
  assert {((left, y), (right, y)), ((x, low), (x, high))} <= set(map(tuple, bars(ax)))
  # A run's line goes from the initialisation over its two checkpoints to its end.
  line = next(line for line in ax.get_lines() if line.get_label() == "PPO")
  places = [
    (0, 0),
    *(mark[:2] for mark in dots[:2]),
    (methods[0]["end"]["kl"], methods[0]["end"]["gain"]),
  ]
  np.testing.assert_allclose([*zip(line.get_xdata(), line.get_ydata())], places)
  pyplot.close("all")
