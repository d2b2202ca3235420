"""How long a rollout takes where answers end on their own, beside the bound that is compiled. Called by plan.py.

Lengths are taken to be geometric, an answer ending with the same probability at every token, and cut at the limit.
No JAX.
"""

import heapq
import math
import random

from instructjax.core.errors import UserError
from instructjax.core.stages import RL_STAGES
from launch.topology import Chip


def require_mean(mean: float, limit: int, stage: str):
  """Refuses what is no mean of lengths up to the limit, and a stage without answers."""
  if stage not in RL_STAGES:
    raise UserError(f"--mean_response is of the answers that an RL stage samples, not of {stage}")
  if not 1 <= mean <= limit:
    raise UserError(
      f"--mean_response={mean:g} must be from 1 to config.data.max_response_length={limit}"
    )


def go_on_probability(mean: float, limit: int) -> float:
  """Of an answer going on after a token, so that lengths cut at `limit` have this mean."""
  low, high = 0.0, 1.0
  for _ in range(40):
    middle = (low + high) / 2
    # P(longer than k) = q^k, and a mean is the sum of these.
    if (1 - middle**limit) / (1 - middle) < mean:
      low = middle
    else:
      high = middle
  return low


def expected_steps(
  num_rows: int, num_slots: int, mean: float, limit: int, draws: int = 50
) -> float:
  """Decode steps that `num_rows` answers take, of which `num_slots` are decoded at a time: the mean of a few draws.

  A slot whose answer has ended takes the next prompt, whose first token its prefill gives. With as many slots as rows
  the longest answer counts. The draws are the same at every call.
  """
  random_, go_on = random.Random(0), go_on_probability(mean, limit)
  total = 0
  for _ in range(draws):
    ends = [0] * num_slots
    for _ in range(num_rows):
      # The largest length whose probability to be reached is above a uniform number.
      length = 1 + int(math.log(1 - random_.random()) / math.log(go_on)) if go_on else 1
      heapq.heapreplace(ends, ends[0] + min(length, limit) - 1)
    total += max(ends)
  return total / draws


def step_seconds(
  step: dict[str, float], weight_bytes: float, share: float, chip: Chip
) -> dict[str, float]:
  """Seconds of a decode step with a share of the rows, in the three ways of `estimate.timing`.

  Args:
    step: flops, hbm_bytes, wire_bytes and cycles of a compiled step with all rows.
    weight_bytes: of hbm_bytes, what does not go with the rows.
    share: of the rows that were compiled.
  """
  fixed = min(weight_bytes, step["hbm_bytes"])
  hbm_bytes = fixed + share * (step["hbm_bytes"] - fixed)
  compute, links = share * step["flops"] / chip.flops, share * step["wire_bytes"] / chip.link_rate
  # A step that fits in the chip's fast memory reads nothing.
  part = hbm_bytes / step["hbm_bytes"] if step["hbm_bytes"] else share
  cycles = step["cycles"] / chip.clock * part
  return {
    "roofline": max(compute, hbm_bytes / chip.hbm_rate, links),
    "overlapped": max(cycles, links),
    "serial": cycles + links,
  }


def at_mean(
  mean: float,
  limit: int,
  num_rows: int,
  num_shards: int,
  decode: dict,
  estimates: dict[str, dict],
  chip: Chip,
) -> dict:
  """Estimates of an iteration at a mean length, all rows decoded at once and in ever fewer slots.

  Args:
    decode: of the compiled loop: `steps`, `rows` decoded at once, `weight_bytes`, and `step`, what one costs.
    estimates: way -> seconds of an iteration at the compiled length, as in `estimate.timing`.
    num_shards: slots are split over.
  """
  whole = step_seconds(decode["step"], decode["weight_bytes"], 1.0, chip)
  cases, slots = [], num_rows
  while slots and slots % num_shards == 0:
    steps = expected_steps(num_rows, slots, mean, limit)
    one = step_seconds(decode["step"], decode["weight_bytes"], slots / decode["rows"], chip)
    seconds = {
      way: total["seconds"] - decode["steps"] * whole[way] + steps * one[way]
      for way, total in estimates.items()
    }
    tokens = {way: num_rows * mean / value for way, value in seconds.items()}
    cases.append({"slots": slots, "steps": steps, "seconds": seconds, "tokens": tokens})
    slots = slots // 2 if slots % 2 == 0 else 0
  return {"mean": mean, "limit": limit, "lengths": "geometric, cut at the limit", "cases": cases}


def text(found: dict) -> list[str]:
  """Lines of a report."""
  lines = [
    f"At {found['mean']:g} tokens an answer on average (lengths assumed geometric, {found['limit']} at most) instead of"
    " the compiled bound, estimates of an iteration: roofline / cost model, communication hidden / none hidden:"
  ]
  for case in found["cases"]:
    first = case is found["cases"][0]
    how = "until the longest ends" if first else "each refilled when its answer ends"
    seconds = " / ".join(f"{value:.2f}" for value in case["seconds"].values())
    tokens = " / ".join(f"{value:,.0f}" for value in case["tokens"].values())
    lines.append(
      f"  {case['slots']:5} at a time, {how:35}{case['steps']:6.0f} steps  {seconds} s,"
      f" {tokens} tokens a second"
    )
  return lines
