"""Expected times against figures worked out by hand."""

import pytest

from launch import expect, topology

CHIP = topology.Chip("x", 2**30, flops=100.0, hbm_rate=10.0, link_rate=1.0, dcn_rate=1.0, clock=1.0)


def test_decoding_reads_at_a_share_of_the_memory_s_rate():
  # 40 bytes at 5, 2.5 and 8 bytes a second.
  found = expect.decoding(steps=4, num_bytes=40.0, links=1.0, chip=CHIP)
  assert (found.seconds, found.most, found.least) == (8.0, 16.0, 5.0)
  assert found.built.startswith("4 steps of 0.00 GB at 50% of the memory's rate (25% to 80%)")
  bound = expect.decoding(steps=4, num_bytes=40.0, links=9.0, chip=CHIP)
  assert (bound.seconds, bound.most, bound.least) == (9.0, 16.0, 9.0)
  assert bound.built.endswith("bound by the links at the public rate")


def test_passes_multiply_at_the_published_share_of_the_peak():
  found = expect.passes("update", flops=47.0, floors={}, slowest=0.0, chip=CHIP)
  assert found.seconds == pytest.approx(1.0)
  assert (found.least, found.most) == pytest.approx((47 / 50, 47 / 44))
  # A slower estimate widens the range, and sending bounds it from below.
  assert expect.passes("update", 47.0, {"links": 0.1}, 3.0, CHIP).most == 3.0
  found = expect.passes("update", 47.0, {"links": 1.5, "memory": 2.0}, 0.0, CHIP)
  assert (found.seconds, found.least, found.most) == (2.0, 2.0, 2.0)
  assert found.built.endswith("bound by the memory at the public rate")


def test_a_run_adds_up_its_stages():
  one = expect.iteration([expect.Part("a", 2.0, 1.0, 4.0, ""), expect.Part("b", 1.0, 1.0, 2.0, "")])
  assert (one.seconds, one.least, one.most) == (3.0, 2.0, 6.0)
  stages = [expect.StageTime("sft", 1200, one, "sketched"), expect.StageTime("ppo", 600, one, "c")]
  found = expect.cost(stages, chips=4, price=0.5)
  assert found["hours"] == pytest.approx([1.0, 1.5, 3.0])
  assert found["chip_hours"] == pytest.approx([4.0, 6.0, 12.0])
  assert found["price"] == pytest.approx([2.0, 3.0, 6.0])
  assert expect.cost(stages, 4, None)["price"] is None
  words = {"left_out": [], "for": "so many"}
  lines = expect.run_text(expect.cost(stages, 4, None) | words)
  assert lines[1] == "  for so many"
  assert "  all: 1.5 h (1.0 to 3.0) on 4 chips: 6 chip-hours (4 to 12)" in lines
  assert lines[-1] == "  --price_per_chip_hour=X adds what that costs."
