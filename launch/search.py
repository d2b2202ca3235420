"""Searches for the best mesh: ranks all possible meshes by a rough estimate, compiles the best few, and recommends one.

It varies only what changes results by rounding error at most: the mesh, `remat`, and the number of chunks in which
PPO-ptx processes its pretraining rows. Each program is compiled in a process of its own, one after the other. This
frees the memory in between, and a crash of the compiler costs one trial only. Called by plan.py, and by planning.py to
compile changes.
"""

import collections
import dataclasses
import json
import math
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator

from instructjax.core.config import Config, ExecutionConfig, MeshConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import STAGES
from instructjax.stages import lineage
from launch import estimate, progress
from launch.topology import GIB, Chip

_AXES = ("data", "fsdp", "tensor")  # the axes to choose; any other axis stays as configured
_WAYS = ("roofline", "overlapped", "serial")


@dataclasses.dataclass(frozen=True)
class Choice:
  """One choice of the settings that are searched.

  Attributes:
    mesh: (axis, size) pairs in the order of the mesh.
    remat: value of `execution.remat`.
    ptx_microbatches: value of `ppo.ptx_microbatches`; None if the stage has no pretraining rows.
    seconds, bytes, least_bytes: estimates, see `sketch.Sketch`.
  """

  mesh: tuple[tuple[str, int], ...]
  remat: str
  ptx_microbatches: int | None
  seconds: float
  bytes: float
  least_bytes: float

  def flags(self, config: Config) -> list[str]:
    """The flags that make the planner or a run use this choice."""
    flags = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh]
    if config.execution.remat != self.remat:
      flags.append(f"--config.execution.remat={self.remat}")
    if self.ptx_microbatches not in (None, config.ppo.ptx_microbatches):
      flags.append(f"--config.ppo.ptx_microbatches={self.ptx_microbatches}")
    return flags


@dataclasses.dataclass(frozen=True)
class Ranking:
  """All meshes, sorted by what can be said about them without compiling.

  Attributes:
    choices: the possible choices, most promising first.
    do_not_divide: reason -> meshes over which something cannot be divided.
    too_large: mesh -> bytes of its weights, optimiser states and caches, if these alone exceed a device's memory.
  """

  choices: list[Choice]
  do_not_divide: dict[str, list[str]]
  too_large: dict[str, float]


def run(
  config: Config,
  stage: str,
  topology_name: str,
  devices: list,
  chip: Chip,
  number: int,
  compile_one: Callable[[list[str]], dict],
) -> dict:
  """Tries meshes and recommends one.

  Args:
    config: the run's config; its mesh is a starting point only.
    stage: a stage that trains.
    topology_name: a slice as --topology names it.
    devices: the devices of the topology.
    chip: rates and memory of the devices.
    number: how many meshes that fit to compile.
    compile_one: runs the planner with additional flags. It returns the report, or {'failure': reason}.
  Returns:
    A report of JSON values for `text`.
  Raises:
    UserError: number is not positive, or no mesh is possible for the stage's batch and models.
  """
  if number < 1:
    raise UserError(f"--tries={number} must be positive")
  ranking = rank(config, stage, devices, chip)
  if not ranking.choices and not ranking.too_large:
    reason, spellings = max(ranking.do_not_divide.items(), key=lambda item: len(item[1]))
    raise UserError(
      f"no mesh of the {len(devices)} devices of {topology_name} goes with {stage}; {len(spellings)} of"
      f" {sum(map(len, ranking.do_not_divide.values()))}, as {spellings[0]}, because {reason}"
    )
  trials = try_best(ranking.choices, number, lambda choice: compile_one(choice.flags(config)))
  rows = [_row(config, choice, report) for choice, report in trials]
  fitting = [row for row in rows if row["fits"]]
  return {
    "note": "estimates: nothing has run on a TPU",
    "stage": stage,
    "preset": config.preset,
    "topology": topology_name,
    "chip": chip.name,
    "devices": len(devices),
    "hbm": int(chip.hbm_bytes),
    "do_not_divide": ranking.do_not_divide,
    "too_large": ranking.too_large,
    "candidates": len({choice.mesh for choice in ranking.choices}),
    "trials": rows,
    "recommended": min(fitting, key=_compared) if fitting else None,
    "nearest": None if fitting else _nearest(rows, ranking.too_large, chip),
  }


def rank(config: Config, stage: str, devices: list, chip: Chip) -> Ranking:
  """Ranks all choices by their estimates.

  Choices that are estimated to fit come first, then faster ones, then those that need less memory. Times within about
  5% count as equal, because the estimates are not more accurate than that.

  Args:
    config, stage, devices, chip: see `run`.
  Raises:
    UserError: the stage has no train step.
  """
  from instructjax.parallel import sharding  # JAX, after the environment is set
  from launch import programs, sketch

  programs.require_trained(stage, config)
  ranking, reasons = Ranking([], {}, {}), collections.defaultdict(list)
  for cfg in meshes(config.mesh, len(devices)):
    mesh = sharding.make_mesh(cfg, devices)
    spelling = estimate.spell_mesh(mesh.shape)
    shards = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    try:
      # remat and ptx_microbatches do not change a program's arguments, so one program per mesh is enough for all of
      # them. A single chunk always has a number of rows that can be divided if any number of chunks does.
      program = programs.make(_with(config, "full", 1), mesh, stage)
    except UserError as error:
      reasons[str(error)].append(spelling)
      continue
    for remat, chunks in _options(config, stage, shards):
      sizes = sketch.sketch(_with(config, remat, chunks), stage, program, mesh.shape, chip)
      choice = Choice(
        tuple(mesh.shape.items()), remat, chunks, sizes.seconds, sizes.bytes, sizes.least_bytes
      )
      if sizes.least_bytes > chip.hbm_bytes:
        ranking.too_large[spelling] = sizes.least_bytes
      else:
        ranking.choices.append(choice)
  ranking.choices.sort(
    key=lambda choice: (
      choice.bytes > chip.hbm_bytes,
      round(math.log(choice.seconds) / math.log(1.05)),
      choice.bytes,
    )
  )
  ranking.do_not_divide.update(_merged(reasons))
  return ranking


def meshes(configured: MeshConfig, num_devices: int) -> Iterator[MeshConfig]:
  """Yields every mesh of that many devices. Axes that are not searched keep their configured size.

  Raises:
    UserError: the number of devices is not divisible by the sizes of the other axes.
  """
  others = math.prod(size for axis, size in vars(configured).items() if axis not in _AXES)
  if others < 1 or num_devices % others:
    raise UserError(
      f"mesh {estimate.spell_mesh(vars(configured))}: axes besides {', '.join(_AXES)} must be"
      f" positive and divide the {num_devices} devices"
    )
  free = num_devices // others
  divisors = [n for n in range(1, free + 1) if free % n == 0]
  for fsdp in divisors:
    for tensor in divisors:
      if free % (fsdp * tensor) == 0:
        data = free // (fsdp * tensor)
        yield dataclasses.replace(configured, data=data, fsdp=fsdp, tensor=tensor)


def _options(config: Config, stage: str, shards: int) -> Iterator[tuple[str, int | None]]:
  """Yields every (remat, ptx_microbatches) for which the rows of a chunk can be divided over the shards."""
  counts = [None]
  cfg = lineage.variant(config, stage)
  if STAGES[stage].is_rl and cfg.gamma > 0:
    rows = cfg.batch_size // cfg.num_minibatches * cfg.ptx_rows // shards  # rows per shard
    counts = [n for n in range(1, rows + 1) if rows % n == 0]
  for remat in typing.get_args(typing.get_type_hints(ExecutionConfig)["remat"]):
    for chunks in counts:
      yield remat, chunks


def _with(config: Config, remat: str, ptx_microbatches: int | None) -> Config:
  """The config with these values of remat and ptx_microbatches, and its mesh unchanged."""
  execution = dataclasses.replace(config.execution, remat=remat)
  ppo = dataclasses.replace(
    config.ppo, ptx_microbatches=ptx_microbatches or config.ppo.ptx_microbatches
  )
  return dataclasses.replace(config, ppo=ppo, execution=execution)


def _merged(reasons: dict[str, list[str]]) -> dict[str, list[str]]:
  """Merges reasons that differ in their numbers only. The first one stands for all of them."""
  merged, first = collections.defaultdict(list), {}
  for reason, spellings in reasons.items():
    merged[first.setdefault(re.sub(r"\d+", "N", reason), reason)] += spellings
  return dict(merged)


def try_best(
  choices: list[Choice], number: int, compile_one: Callable[[Choice], dict]
) -> list[tuple[Choice, dict]]:
  """Compiles choices in order until `number` meshes fit. At most twice as many choices are compiled.

  Only the best choice of a mesh that fits is compiled. After a choice that does not fit, all choices that are estimated
  to need at least as much memory are skipped.
  """
  trials, fitting, limit = [], set(), math.inf
  for choice in choices:
    if len(fitting) == number or len(trials) == 2 * number:
      break
    if choice.mesh in fitting or choice.bytes >= limit:
      continue
    report = compile_one(choice)
    trials.append((choice, report))
    if report.get("fits"):
      fitting.add(choice.mesh)
    elif "out_of_memory" in report:
      limit = choice.bytes
  return trials


def compile_apart(command: list[str], flags: list[str]) -> dict:
  """Runs the planner in a process of its own and returns its report.

  Args:
    command: the flags that this process was started with.
    flags: flags to add. They take precedence, because the last one counts if a flag is given twice.
  Returns:
    The report, or {'failure': reason}.
  """
  words = [sys.executable, "-m", "launch.plan", *command]
  words += ["--nosearch", "--compile", "--json", "--try_changes=0"]
  with progress.telling(f"compiling with {' '.join(flags)}"):
    done = subprocess.run([*words, *flags], capture_output=True, text=True)
  if done.returncode in (0, 1) and done.stdout.startswith("{"):
    return json.loads(done.stdout)
  said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
  kind = "killed by signal" if done.returncode < 0 else "exit code"
  return {"failure": f"{kind} {abs(done.returncode)}: {said}"}


def _row(config: Config, choice: Choice, report: dict) -> dict:
  """The part of a trial's report that the search reports."""
  row = {
    "mesh": estimate.spell_mesh(dict(choice.mesh)),
    "remat": choice.remat,
    "ptx_microbatches": choice.ptx_microbatches,
    "flags": choice.flags(config),
    "other_batches": _other_batches(config, choice),
    "sketch": {"seconds": choice.seconds, "bytes": choice.bytes},
    "fits": report.get("fits", False),
  }
  if "failure" in report:
    return row | {"failure": report["failure"]}
  if not report["fits"]:
    return row | {"out_of_memory": report["out_of_memory"]}
  return row | {
    "allocated": report["memory"]["allocated"],
    "expected": report["expected"]["seconds"],
    "estimates": report["timing"]["estimates"],
    "token_kind": report["token_kind"],
    "compilation": report["compilation"],
  }


def _other_batches(config: Config, choice: Choice) -> dict[str, int]:
  """The batches of other stages that this mesh does not divide.

  A run uses one mesh for all its stages, so the user should know about them.
  """
  from instructjax.parallel import sharding  # JAX, after the environment is set

  shards = math.prod(size for axis, size in choice.mesh if axis in sharding.ROWS)
  names = dict.fromkeys(name for row in STAGES.values() for name in row.batches)
  sizes = {name: lineage.value(config, name) for name in names}
  return {name: size for name, size in sizes.items() if size % shards}


def _compared(row: dict) -> float:
  """Seconds of a trial for comparison: the mean of the cost model's times with communication hidden and not hidden."""
  return (row["estimates"]["overlapped"]["seconds"] + row["estimates"]["serial"]["seconds"]) / 2


def _nearest(rows: list[dict], too_large: dict[str, float], chip: Chip) -> dict | None:
  """The mesh that comes closest to fitting, and the GiB that it lacks; None if every trial failed for other reasons."""
  lacks = {spelling: (size - chip.hbm_bytes) / GIB for spelling, size in too_large.items()}
  for row in rows:
    if "out_of_memory" in row:
      found = row["out_of_memory"]
      lacks[row["mesh"]] = found["needed"] - found["available"]
  if not lacks:
    return None
  mesh = min(lacks, key=lacks.get)
  return {"mesh": mesh, "gib": lacks[mesh]}


def text(report: dict) -> str:
  """The report of a search, as text."""
  lines = [
    f"Meshes for {report['stage']} {report['preset']} on {report['topology']}: {report['devices']} x"
    f" {report['chip']}, {report['hbm'] / GIB:.2f} GiB each"
  ]
  for reason, spellings in report["do_not_divide"].items():
    why = re.split(r"; |\. ", reason)[0]  # without the advice at the end of the message
    lines.append(f"  {len(spellings)} do not divide, as {spellings[0]}: {why}")
  if report["too_large"]:
    least = min(report["too_large"], key=report["too_large"].get)
    lines.append(
      f"  {len(report['too_large'])} cannot fit: weights, optimisers and caches alone take at least"
      f" {report['too_large'][least] / GIB:.2f} GiB ({least})"
    )
  lines.append(f"  {report['candidates']} are left; of these compiled, the most promising first:")
  if report["trials"]:
    lines.append(
      f"{'mesh':32}{'remat':>10}{'chunks':>7}{'GiB':>8}{'expected s':>12}{'roofline s':>12}{'hidden s':>10}"
      f"{'none s':>8}{'tokens/s':>11}{'MFU':>6}{'compiled s (CPU)':>18}"
    )
  lines += [_line(row) for row in report["trials"]]
  if report["trials"]:
    lines.append(
      "Seconds of an iteration, tokens and MFU are estimates, nothing has run on a TPU: roofline at public peak"
      " rates; the compiler's cost model with communication hidden, and with none hidden. Tokens and MFU are of"
      " the cost model, hidden."
    )
  return "\n".join([*lines, _verdict(report)])


def _line(row: dict) -> str:
  chunks = row["ptx_microbatches"] or ""
  start = f"{row['mesh']:32}{row['remat']:>10}{chunks:>7}"
  if "failure" in row:
    return f"{start}  failed: {row['failure']}"
  if not row["fits"]:
    found = row["out_of_memory"]
    at_least = "at least " if found["is_lower_bound"] else ""
    missing = found["needed"] - found["available"]
    return f"{start}{found['needed']:8.2f}  does not fit, {at_least}{missing:.2f} GiB too much"
  estimates, spent = row["estimates"], row["compilation"]
  roofline, hidden, none = (estimates[way]["seconds"] for way in _WAYS)
  mfu = f"{estimates['overlapped']['mfu']:.2f}" if "mfu" in estimates["overlapped"] else ""
  compiled = f"{spent['seconds']:.0f} ({spent['cpu_seconds']:.0f})"
  return (
    f"{start}{row['allocated'] / GIB:8.2f}{row['expected']:12.2f}{roofline:12.2f}{hidden:10.2f}{none:8.2f}"
    f"{estimates['overlapped']['tokens']:11,.0f}{mfu:>6}{compiled:>18}"
  )


def _verdict(report: dict) -> str:
  best, nearest = report["recommended"], report["nearest"]
  if best:
    said = f"Recommended (least seconds by the cost model, between hidden and none): {' '.join(best['flags'])}"
    if best["other_batches"]:
      others = ", ".join(f"{name}={size}" for name, size in best["other_batches"].items())
      said += (
        f"\nA run has one mesh for all its stages, and this one does not divide config's {others}."
      )
    return said
  if nearest is None:
    return "Nothing could be compiled."
  return (
    f"Nothing fits. The nearest, {nearest['mesh']}, needs at least {nearest['gib']:.2f} GiB a device more than"
    " there is: take a larger slice, or one of chips with more memory."
  )
