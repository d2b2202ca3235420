"""The panels of a comparison draw what the runs have, and say so if there is nothing."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from instructjax.report import comparison, comparison_groups, comparison_panels
from tests.report import runs


def axes():
  return Figure().add_subplot()


def test_win_rates_have_means_seeds_and_intervals_inside_the_axis():
  found = comparison_groups.groups([runs.run(seed) for seed in (0, 1, 2)])
  ax = axes()
  assert comparison_panels.draw_win_rates(ax, comparison.win_rates(found), found)
  bar, seeds, mean, _ = ax.lines
  assert list(seeds.get_xdata()) == [0.6, 0.7, 0.8]
  np.testing.assert_allclose(mean.get_xdata(), 0.7)
  assert max(bar.get_xdata()) <= 1
  assert not comparison_panels.draw_win_rates(axes(), {}, found)


def test_the_frontier_has_a_line_for_each_seed_and_their_mean():
  found = comparison_groups.groups([runs.run(seed) for seed in (0, 1)])
  ax = axes()
  assert comparison_panels.draw_frontier(ax, found, "gold")
  ways = [line for line in ax.lines if len(line.get_xdata()) == 20]
  assert [line.get_linewidth() for line in ways] == [0.8, 0.8, 2]
  assert ax.lines[-2].get_xdata()[0] == 4.0  # where the policy ended: KL 4
  assert ax.lines[-2].get_ydata()[0] == np.mean([3 - 0.02, 4 - 0.02]) - 2


def test_a_run_without_gold_scores_has_no_panel_of_them():
  plain = runs.run(0)
  log = [
    {key: value for key, value in row.items() if key != "gold"} for row in plain.curves["ppo_ptx"]
  ]
  policies = {
    name: {k: v for k, v in row.items() if k != "gold"} for name, row in plain.policies.items()
  }
  found = comparison_groups.groups(
    [dataclasses.replace(plain, curves={"ppo_ptx": log}, policies=policies)]
  )
  assert not comparison_panels.draw_frontier(axes(), found, "gold")
  assert not comparison_panels.draw_tax(axes(), found, "gold")
  assert comparison_panels.draw_frontier(axes(), found, "reward")
  assert comparison_panels.draw_tax(axes(), found, "reward")


def test_the_tax_joins_the_groups_of_a_policy():
  found = comparison_groups.groups([runs.run(0, beta) for beta in (0.0, 0.5)])
  ax = axes()
  assert comparison_panels.draw_tax(ax, found, "gold")
  joined = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
  np.testing.assert_allclose(joined[0].get_ydata(), [1.0, 0.5])


def test_unbounded_ppo_takes_no_room_from_several_groups():
  def with_beta0(beta):
    plain = runs.run(0, beta)
    return dataclasses.replace(plain, curves=dict(plain.curves, ppo_beta0=plain.curves["ppo_ptx"]))

  one, two = ([with_beta0(beta) for beta in betas] for betas in ((0.1,), (0.1, 0.2)))
  assert comparison_panels.on_frontier(comparison_groups.groups(one)) == ["ppo_ptx", "ppo_beta0"]
  assert comparison_panels.on_frontier(comparison_groups.groups(two)) == ["ppo_ptx"]
