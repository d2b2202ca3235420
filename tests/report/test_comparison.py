"""Numbers over seeds, against numbers worked out by hand."""

import dataclasses
import json
import math

import pytest

from instructjax.report import comparison, comparison_groups
from tests.report import runs


def test_spread_by_hand():
  # Mean 2, squared deviations 1 + 0 + 1 over n - 1 = 2: standard deviation 1. Student's t with 2 degrees of freedom
  # is 4.3027 at 97.5%, and 4.3027 / sqrt(3) = 2.4842.
  found = comparison.spread([1.0, 2.0, 3.0])
  assert (found.mean, found.std) == (2.0, 1.0)
  assert found.interval == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-4)
  two = comparison.spread([1.0, 2.0, None, math.nan])
  assert two.std == pytest.approx(math.sqrt(0.5)) and two.interval is None
  assert math.isnan(comparison.spread([1.0]).std)
  assert comparison.spread([None]) is None


def test_findings_over_seeds():
  found = comparison_groups.groups([runs.run(seed) for seed in range(3)])
  (row,) = comparison.finding_rows(found)
  assert (
    row["claim"] == "Answers after PPO are preferred to the best of n."
  )  # numbers are one run's
  assert row["holds"] == [(1, 1, 1)]
  assert row["measured"]["ppo_ptx"][0].mean == pytest.approx(0.7)
  rates = comparison.win_rates(found)
  assert list(rates) == ["PPO-ptx over SFT"]
  assert rates["PPO-ptx over SFT"][0].values == pytest.approx((0.6, 0.7, 0.8))


def test_a_policy_that_one_group_lacks_is_empty_there():
  lacks = runs.run(0, 0.2)
  lacks = dataclasses.replace(lacks, policies={"sft": lacks.policies["sft"]})
  found = comparison_groups.groups([runs.run(0), lacks])
  assert [spread and spread.mean for spread in comparison.policy_rows(found)["ppo_ptx"]["kl"]] == [
    4.0,
    None,
  ]


def test_gains_count_from_the_first_iteration_and_rewards_in_their_deviations():
  found = comparison.gains(runs.run(0), "ppo_ptx")
  assert found["gold"][0] == 0 and found["gold"][-1] == pytest.approx(1.9)
  assert found["reward"][-1] == pytest.approx(
    0.2 * 19 / 0.5
  )  # the reward model's standard deviation is .5
  assert found["kl"][-1] == 19
  assert comparison.gains(runs.run(0), "ppo") is None


def test_where_a_policy_ended():
  (group,) = comparison_groups.groups([runs.run(0, 0.0), runs.run(1, 0.0)])
  end = comparison.ends(group, "ppo_ptx")
  assert {key: found.mean for key, found in end.items()} == {
    "kl": 4.0,
    "gold": 1.5,  # 3 and 4, less 2
    "reward": 2.0,  # 1 in deviations of .5
    "tax": pytest.approx(0.1),
  }
  assert comparison.ends(group, "ppo") is None


def test_differences_are_paired_by_seed():
  listed = [runs.run(seed, beta) for beta in (0.0, 0.5) for seed in (0, 1, 2)]
  (row,) = comparison.differences(
    comparison_groups.groups(listed), [("ppo_ptx", "gold"), ("ppo", "gold")]
  )
  assert (row["group"], row["seeds"]) == ("ppo.beta=0.5", 3)
  # The seeds differ by 1 each, and no difference does.
  assert row["spreads"][0].mean == -0.5 and row["spreads"][0].std == pytest.approx(0)
  assert row["spreads"][1] is None
  assert comparison.differences(comparison_groups.groups(listed[:3]), []) == []
  assert json.dumps(row["spreads"][0].values)
