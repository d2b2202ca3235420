"""Estimates how long a rollout takes if answers end before the length limit. Called by plan.py.

The compiled program gives the time of the longest possible rollout only. Here, lengths are assumed to be geometric and
cut at the limit, which means that an answer ends with the same probability at every token. No JAX.
"""

import heapq
import math
import random

from instructjax.core.errors import UserError
from instructjax.core.stages import RL_STAGES
from launch.topology import Chip


def require_mean(mean: float, limit: int, stage: str):
  """Checks that a mean length is possible, and that the stage samples answers.

  Args:
    mean: mean length of an answer [tokens].
    limit: longest answer [tokens].
    stage: name of the stage.
  Raises:
    UserError: the mean is not between 1 and the limit, or the stage samples no answers.
  """
  if stage not in RL_STAGES:
    raise UserError(f"--mean_response is of the answers that an RL stage samples, not of {stage}")
  if not 1 <= mean <= limit:
    raise UserError(
      f"--mean_response={mean:g} must be from 1 to config.data.max_response_length={limit}"
    )


def go_on_probability(mean: float, limit: int) -> float:
  """The probability that an answer continues after a token, for which lengths cut at `limit` have this mean."""
  low, high = 0.0, 1.0
  # The mean grows with the probability q, so q is found by bisection. 40 halvings give it to 1e-12.
  for _ in range(40):
    middle = (low + high) / 2
    # P(length > k) = q^k. The mean is the sum of these for k = 0 to limit - 1.
    if (1 - middle**limit) / (1 - middle) < mean:
      low = middle
    else:
      high = middle
  return low


def expected_steps(
  num_rows: int, num_slots: int, mean: float, limit: int, draws: int = 50
) -> float:
  """The expected number of decode steps for `num_rows` answers if `num_slots` of them are decoded at a time.

  When an answer ends, its slot takes the next prompt. The prefill of a prompt gives the first token of its answer, so
  this token takes no decode step. With as many slots as rows, the longest answer decides.

  The result is the mean over `draws` simulations, which are the same at every call.
  """
  random_, go_on = random.Random(0), go_on_probability(mean, limit)
  total = 0
  for _ in range(draws):
    ends = [0] * num_slots
    for _ in range(num_rows):
      # Inverse sampling: the largest length that is reached with a probability above a uniform random number.
      length = 1 + int(math.log(1 - random_.random()) / math.log(go_on)) if go_on else 1
      # The slot that is free first takes the next row.
      heapq.heapreplace(ends, ends[0] + min(length, limit) - 1)
    total += max(ends)
  return total / draws


def step_seconds(
  step: dict[str, float], weight_bytes: float, share: float, chip: Chip
) -> dict[str, float]:
  """Estimates the seconds of a decode step with fewer rows, in the three ways of `estimate.timing`.

  Args:
    step: flops, hbm_bytes, wire_bytes and cycles of the compiled step with all rows.
    weight_bytes: the part of hbm_bytes that does not depend on the number of rows.
    share: number of rows as a fraction of those compiled.
    chip: rates of the device.
  """
  fixed = min(weight_bytes, step["hbm_bytes"])
  hbm_bytes = fixed + share * (step["hbm_bytes"] - fixed)
  compute, links = share * step["flops"] / chip.flops, share * step["wire_bytes"] / chip.link_rate
  # The cost model's cycles are scaled like the HBM traffic, which dominates a decode step. A step that fits in the
  # chip's fast memory reads nothing from HBM, and is scaled like the rows.
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
  """Estimates an iteration at a mean answer length, with all rows decoded at once and then with fewer and fewer slots.

  Args:
    mean: mean length of an answer [tokens].
    limit: longest answer, for which the program is compiled [tokens].
    num_rows: answers per iteration.
    num_shards: number of shards over which the slots are split.
    decode: the compiled decode loop: its `steps`, the `rows` decoded at once, `weight_bytes`, and the cost of a `step`.
    estimates: way -> estimate of an iteration at the compiled length, as in `estimate.timing`.
    chip: rates of the devices.
  """
  whole = step_seconds(decode["step"], decode["weight_bytes"], 1.0, chip)
  cases, slots = [], num_rows
  while slots and slots % num_shards == 0:
    steps = expected_steps(num_rows, slots, mean, limit)
    one = step_seconds(decode["step"], decode["weight_bytes"], slots / decode["rows"], chip)
    # Everything but the decode loop takes as long as in the compiled program.
    seconds = {
      way: total["seconds"] - decode["steps"] * whole[way] + steps * one[way]
      for way, total in estimates.items()
    }
    tokens = {way: num_rows * mean / value for way, value in seconds.items()}
    cases.append({"slots": slots, "steps": steps, "seconds": seconds, "tokens": tokens})
    slots = slots // 2 if slots % 2 == 0 else 0
  return {"mean": mean, "limit": limit, "lengths": "geometric, cut at the limit", "cases": cases}


def text(found: dict) -> list[str]:
  """The lines of the report about `at_mean`'s result."""
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
