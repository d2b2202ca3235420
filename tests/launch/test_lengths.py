"""Rollouts whose answers end on their own: against expectations in closed form and figures worked out by hand."""

import numpy as np
import pytest

from launch import lengths, topology


def test_the_mean_is_that_of_lengths_cut_at_the_limit():
  # With one or two tokens, a mean of 1.25 is a quarter of twos.
  assert lengths.go_on_probability(1.25, 2) == pytest.approx(0.25)
  go_on = lengths.go_on_probability(200.0, 1024)
  rng = np.random.default_rng(0)
  drawn = np.minimum(rng.geometric(1 - go_on, 200_000), 1024)
  assert drawn.mean() == pytest.approx(200.0, rel=0.01)


@pytest.mark.parametrize("mean, limit", [(20.0, 1024), (200.0, 1024), (1.0, 8), (8.0, 8)])
def test_all_at_once_take_the_longest(mean, limit):
  go_on = lengths.go_on_probability(mean, limit)
  # The sum over k of the probability that some answer is longer than k; its first token takes no step.
  longest = sum(1 - (1 - go_on**k) ** 512 for k in range(limit))
  assert lengths.expected_steps(512, 512, mean, limit) == pytest.approx(longest - 1, rel=0.02)


def test_refilled_slots():
  # One slot takes all answers one after the other, four of them a quarter each and something for the end.
  assert lengths.expected_steps(64, 1, 20.0, 1024) == pytest.approx(64 * 19, rel=0.05)
  assert 16 * 19 < lengths.expected_steps(64, 4, 20.0, 1024) < 16 * 19 + 4 * 20
  assert lengths.expected_steps(8, 4, 100.0, 100) == pytest.approx(2 * 99)


def test_iterations_with_and_without_refilling():
  chip = topology.Chip(
    "x", 1.0, flops=10.0, hbm_rate=10.0, link_rate=10.0, dcn_rate=1e30, clock=10.0
  )
  # A step of 8 rows: HBM binds, 4 of its 10 bytes are weights; by the cost model 2 seconds, links 0.5.
  step = {"flops": 8.0, "hbm_bytes": 10.0, "wire_bytes": 5.0, "cycles": 20.0}
  assert lengths.step_seconds(step, 4.0, 1.0, chip) == {
    "roofline": 1.0,
    "overlapped": 2.0,
    "serial": 2.5,
  }
  half = lengths.step_seconds(step, 4.0, 0.5, chip)
  assert half == pytest.approx({"roofline": 0.7, "overlapped": 1.4, "serial": 1.65})
  fast = step | {"hbm_bytes": 0.0}
  assert lengths.step_seconds(fast, 4.0, 0.5, chip)["overlapped"] == pytest.approx(1.0)
  decode = {"steps": 99, "rows": 8, "weight_bytes": 4.0, "step": step}
  estimates = {"roofline": {"seconds": 109.0}, "overlapped": {"seconds": 208.0}}
  found = lengths.at_mean(100.0, 100, 8, 4, decode, estimates, chip)
  # Every answer of 100 tokens: what was compiled, or twice as many steps of half the rows; four shards want four.
  all_rows, in_slots = found["cases"]
  assert (all_rows["slots"], in_slots["slots"]) == (8, 4)
  assert (all_rows["steps"], in_slots["steps"]) == pytest.approx((99, 198))
  assert all_rows["seconds"] == pytest.approx({"roofline": 109.0, "overlapped": 208.0})
  assert in_slots["seconds"] == pytest.approx(
    {"roofline": 10 + 198 * 0.7, "overlapped": 10 + 198 * 1.4}
  )
  assert all_rows["tokens"]["roofline"] == pytest.approx(800 / 109)
  lines = lengths.text(found)
  assert (
    "8 at a time, until the longest ends" in lines[1] and "99 steps  109.00 / 208.00 s" in lines[1]
  )
  assert "4 at a time, each refilled when its answer ends" in lines[2]


@pytest.mark.parametrize(
  "mean, stage, words",
  [
    (0.5, "ppo", "--mean_response=0.5 must be from 1 to config.data.max_response_length=1024"),
    (1025.0, "ppo_ptx", "--mean_response=1025 must be"),
    (
      200.0,
      "sft",
      "--mean_response is of the answers that an RL stage samples, not of sft",
    ),
  ],
)
def test_what_is_no_mean(mean, stage, words):
  with pytest.raises(ValueError, match=words):
    lengths.require_mean(mean, 1024, stage)
