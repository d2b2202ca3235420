"""The expected times of an iteration and of all stages of a run, from the passes that they make.

The stage that was compiled has its own figures for decoding and sending. Of the others only sizes are known.
Called by planning.py and changes.py.
"""

import dataclasses
import math
from collections.abc import Mapping

from instructjax.core.config import Config
from instructjax.core.errors import UserError
from instructjax.core.stages import STAGES
from instructjax.parallel import sharding
from instructjax.stages import lineage
from launch import costs, expect, programs, sketch
from launch.lengths import Means
from launch.topology import Chip


@dataclasses.dataclass(frozen=True)
class Records:
  """How many records the user's data have, which a config does not say."""

  demonstrations: int
  comparisons: int


def sketched(
  config: Config,
  stage: str,
  mesh,
  chip: Chip,
  means: Means,
  program: programs.Program | None = None,
) -> tuple[expect.Expectation, sketch.Sketch]:
  """The expected time of a stage's step from its sizes alone, and the sketch that it was made of.

  Raises:
    UserError: the stage has no step, or the mesh does not divide its batch or networks.
  """
  program = program or programs.make(config, mesh, stage, means)
  sizes = sketch.sketch(config, stage, program, mesh.shape, chip, means)
  shards = sharding.num_row_shards(mesh)
  floors = {name: {"links": seconds} for name, seconds in sizes.links.items()}
  parts = _passes(config, stage, mesh, chip, means, floors, {})
  work = sketch.work_of(config, stage, shards, means)
  if work is not None:
    steps = sum(work.steps.values())
    parts.insert(0, expect.decoding(steps, sizes.decode_bytes, sizes.decode_links, chip))
  return expect.iteration(parts), sizes


def compiled(
  config: Config,
  stage: str,
  mesh,
  chip: Chip,
  means: Means,
  decoding: costs.Loop | None,
  timing: Mapping,
) -> expect.Expectation:
  """The expected time of a stage's step from its compiled program.

  Args:
    config, stage, mesh, chip, means: what was compiled.
    decoding: all decode steps together; None if the stage has none.
    timing: as from `estimate.timing`.
  """
  phases = timing["phases"]
  floor = lambda phase: {"links": phase["seconds"]["links"], "memory": phase["seconds"]["HBM"]}
  floors = {name: floor(phases[name]) for name in ("scoring", "update")}
  slowest = {name: phases[name]["serial"] for name in ("scoring", "update")}
  sent = 0.0
  if decoding is not None:
    sent = decoding.cost.wire_bytes / chip.link_rate
    rest = {"links": sent, "memory": decoding.cost.hbm_bytes / chip.hbm_rate}
    of_rollout = floor(phases["rollout"])
    floors["prefill"] = {name: max(0.0, of_rollout[name] - spent) for name, spent in rest.items()}
  parts = _passes(config, stage, mesh, chip, means, floors, slowest)
  if decoding is not None:
    parts.insert(0, expect.decoding(decoding.trips or 0, decoding.cost.hbm_bytes, sent, chip))
  return expect.iteration(parts)


def _passes(
  config: Config,
  stage: str,
  mesh,
  chip: Chip,
  means: Means,
  floors: Mapping[str, Mapping[str, float]],
  slowest: Mapping[str, float],
) -> list[expect.Part]:
  flops: dict[str, float] = {}
  for one in sketch.make_passes(config, stage, sharding.num_row_shards(mesh), means):
    flops[one.part] = flops.get(one.part, 0.0) + one.flops / mesh.size
  return [
    expect.passes(name, count, floors.get(name, {}), slowest.get(name, 0.0), chip)
    for name, count in flops.items()
  ]


def stages(
  config: Config,
  known: tuple[str, expect.Expectation, str],
  mesh,
  chip: Chip,
  means: Means,
  records: Records,
) -> tuple[list[expect.StageTime], list[str]]:
  """The times of all stages of the run that train.

  Args:
    config: the run's config.
    known: the stage that is planned, the time of its step, and `compiled` or `sketched`.
    mesh, chip, means: of the plan.
    records: numbers of records.
  Returns:
    (the times, the stages whose time is not counted, each with the reason).
  """
  times, left_out = [], []
  for name in lineage.plan(config):
    if name == known[0]:
      times.append(expect.StageTime(name, _steps(config, name, means, records), *known[1:]))
      continue
    if STAGES[name].role is None or lineage.given(config, name):
      left_out.append(f"{name} (trains nothing)")
      continue
    try:
      found, _ = sketched(config, name, mesh, chip, means)
    except UserError:
      left_out.append(f"{name} (does not divide over this mesh)")
      continue
    times.append(expect.StageTime(name, _steps(config, name, means, records), found, "sketched"))
  return times, left_out


def _steps(config: Config, stage: str, means: Means, records: Records) -> float:
  """The steps of a stage that trains."""
  row, data = STAGES[stage], config.data
  if row.is_rl:
    return lineage.variant(config, stage).num_iterations
  cfg = getattr(config, row.block)
  if row.is_base:
    return cfg.num_steps
  if row.kind == "rm":
    return cfg.num_epochs * math.ceil(records.comparisons / cfg.batch_size)
  prompt, response = (
    means.prompt or data.max_prompt_length,
    means.response or data.max_response_length,
  )
  rows = records.demonstrations * (prompt + response) / cfg.length * (1 + cfg.pretrain_mix)
  return cfg.num_epochs * math.ceil(rows / cfg.batch_size)


def words(records: Records) -> str:
  """What the run's numbers of steps assume, besides the lengths of texts."""
  return (
    f"{records.demonstrations:,} demonstrations and {records.comparisons:,} prompts with comparisons"
    " (--demonstrations, --comparisons)"
  )


def total_decoding(summary: costs.Summary) -> costs.Loop | None:
  """All loops of decode steps as one; None if the program has none."""
  loops = [loop for loop in summary.loops.values() if costs.DECODE.search(loop.op_name)]
  if not loops:
    return None
  cost = costs.Cost()
  for loop in loops:
    cost += loop.cost
  return costs.Loop("rollout", sum(loop.trips or 0 for loop in loops), cost, "decode")
