"""What to change in a plan that does not fit or wastes time: settings to try, by a sketch and then by the compiler.

Called by planning.py. Settings are tried that change results by rounding at most, and the mesh; and adapters, which
are another recipe, where nothing else fits.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from instructjax.core.config import Config, MeshConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import STAGES
from instructjax.parallel import sharding
from instructjax.stages import lineage
from launch import estimate, programs, whole_run
from launch.lengths import Means
from launch.topology import GIB, Chip

# A change that saves a smaller share of the time is not worth a line.
_WORTH = 0.03
_ADAPTERS = {"adapter.rank": 16}
# Of a device's memory, what a change may fill by estimate: sketches are rough.
_FULL = 0.95


@dataclasses.dataclass(frozen=True)
class Change:
  """A change of settings.

  Attributes:
    values: dotted config field -> value; `mesh` stands for the whole mesh.
    seconds: expected time of an iteration with it.
    bytes: memory of a device, by estimate.
    is_compiled: whether the compiler was asked.
    fits: whether it fits.
  """

  values: Mapping[str, Any]
  seconds: float
  bytes: float
  is_compiled: bool
  fits: bool

  @property
  def flags(self) -> list[str]:
    """The flags of the planner, or of a run if the mesh is not among them."""
    return [
      f"--mesh={estimate.spell_mesh(vars(value))}" if name == "mesh" else f"--config.{name}={value}"
      for name, value in self.values.items()
    ]


def candidates(config: Config, stage: str, mesh, means: Means) -> list[dict[str, Any]]:
  """Settings to try, each with its value; the larger steps come in several."""
  found = [
    {"execution.remat": value}
    for value in ("none", "products", "full")
    if value != config.execution.remat
  ]
  row, shards = STAGES[stage], sharding.num_row_shards(mesh)
  found += [{"mesh": sizes} for sizes in _meshes(mesh)]
  if not (row.is_base or lineage.is_adapted(config)):
    found.append(_ADAPTERS)
  if not row.is_rl:
    cfg = getattr(config, row.block)
    rows = cfg.batch_size // shards
    name = f"{row.block}.microbatches"
    return found + [{name: n} for n in _near(cfg.microbatches, rows)]
  cfg = lineage.variant(config, stage)
  minibatch = cfg.batch_size // cfg.num_minibatches
  if cfg.gamma:
    rows = minibatch * cfg.ptx_rows // shards
    found += [{"ppo.ptx_microbatches": n} for n in _near(cfg.ptx_microbatches, rows)]
  if not cfg.packed_rows:
    found += [{"ppo.microbatches": n} for n in _near(cfg.microbatches, minibatch // shards)]
    rows = cfg.batch_size // shards
    found += [{"ppo.score_microbatches": n} for n in _near(cfg.score_microbatches, rows)]
    if means.response or means.prompt:
      found += [
        {"ppo.packed_rows": n * shards, "ppo.microbatches": 1, "ppo.score_microbatches": 1}
        for n in (1, 2)
        if minibatch % (n * shards) == 0
      ]
  slots = [cfg.batch_size // n for n in (2, 4, 8)]
  found += [
    {"rollout.slots": n} for n in (0, *slots) if n % shards == 0 and n != config.rollout.slots
  ]
  if cfg.packed_rows:
    found.append({"ppo.packed_rows": 0})
  # What saves most memory, all at once, and what saves most time.
  small = {
    "execution.remat": "full",
    "rollout.slots": min((n for n in slots if n % shards == 0), default=0),
  }
  if not cfg.packed_rows:
    small |= {
      "ppo.microbatches": minibatch // shards,
      "ppo.score_microbatches": cfg.batch_size // shards,
    }
  if cfg.gamma:
    small |= {"ppo.ptx_microbatches": minibatch * cfg.ptx_rows // shards}
  return [*found, small]


def _near(count: int, most: int) -> list[int]:
  """Half of a count, its double and four times it, if they divide the rows of a shard."""
  near = [count // 2] if count % 2 == 0 else []
  return [n for n in (*near, 2 * count, 4 * count) if n and most % n == 0]


def _meshes(mesh) -> list[MeshConfig]:
  """The meshes with twice as many devices along `tensor`, or half as many."""
  sizes = dict(mesh.shape)
  found = []
  for fsdp, tensor in (
    (sizes["fsdp"] // 2, 2 * sizes["tensor"]),
    (2 * sizes["fsdp"], sizes["tensor"] // 2),
  ):
    if fsdp and tensor and fsdp * tensor == sizes["fsdp"] * sizes["tensor"]:
      found.append(MeshConfig(**sizes | {"fsdp": fsdp, "tensor": tensor}))
  return found


def changed(config: Config, values: Mapping[str, Any]) -> Config:
  """The config with other values of some fields."""
  for name, value in values.items():
    if name == "mesh":
      config = dataclasses.replace(config, mesh=value)
      continue
    block, field = name.split(".")
    new = dataclasses.replace(getattr(config, block), **{field: value})
    config = dataclasses.replace(config, **{block: new})
  return config


def sketch_all(
  config: Config,
  stage: str,
  devices: list,
  chip: Chip,
  means: Means,
  now: tuple[float, float],
) -> list[Change]:
  """All candidates by their sketches: how much they differ from the sketch of what was compiled.

  Args:
    config: the run's config, whose mesh has its sizes.
    stage, devices, chip, means: of the plan.
    now: expected seconds of the plan itself, and the bytes that it takes or would take.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  program = programs.make(config, mesh, stage, means)
  base, sizes = whole_run.sketched(config, stage, mesh, chip, means, program)
  seconds, size = now
  found = []
  for values in candidates(config, stage, mesh, means):
    other = changed(config, values)
    try:
      of = mesh if "mesh" not in values else sharding.make_mesh(other.mesh, devices)
      expected, others = whole_run.sketched(other, stage, of, chip, means)
    except UserError:  # it does not divide
      continue
    new_bytes = max(others.least_bytes, size + others.bytes - sizes.bytes)
    change = Change(
      values,
      seconds=seconds * expected.seconds / base.seconds,
      bytes=new_bytes,
      is_compiled=False,
      fits=new_bytes <= _FULL * chip.hbm_bytes,
    )
    found.append(change)
  return found


def promising(found: list[Change], seconds: float, fits: bool) -> list[Change]:
  """The changes that help, the best first: what fits where the plan does not, else what saves time.

  Args:
    found: from `sketch_all`.
    seconds: expected time of the plan itself.
    fits: whether the plan itself fits.
  """
  if not fits:
    if any(one.fits and one.values != _ADAPTERS for one in found):
      found = [one for one in found if one.values != _ADAPTERS]
    # Times within 1% are equal, and of these the smallest is the safest.
    coarse = lambda seconds: round(math.log(max(seconds, 1e-9)) * 100)
    key = lambda one: (not one.fits, coarse(one.seconds) if one.fits else 0, one.bytes)
    return sorted(found, key=key)
  found = [one for one in found if one.fits and one.values != _ADAPTERS]
  saving = [one for one in found if one.seconds < (1 - _WORTH) * seconds]
  return sorted(saving, key=lambda one: one.seconds)


def compile_best(
  found: list[Change],
  number: int,
  fits: bool,
  compile_one: Callable[[list[str]], dict],
) -> list[Change]:
  """Asks the compiler about the first `number` changes. If the plan does not fit, it ends with the first that does.

  Returns:
    What it was asked about, with its answers, and the rest as it was.
  """
  asked = []
  for change in found[:number]:
    report = compile_one(change.flags)
    if report.get("fits"):
      change = dataclasses.replace(
        change,
        seconds=report["expected"]["seconds"],
        bytes=report["memory"]["allocated"],
        is_compiled=True,
        fits=True,
      )
    elif "out_of_memory" in report:
      needed = report["out_of_memory"]["needed"] * GIB
      change = dataclasses.replace(change, bytes=needed, is_compiled=True, fits=False)
    asked.append(change)
    if change.fits and change.is_compiled and not fits:
      break
  return asked + found[len(asked) :]


def text(found: list[Change], seconds: float, size: float, fits: bool, most: int = 6) -> list[str]:
  """The lines about changes.

  Args:
    found: the changes that help, the best first.
    seconds, size, fits: of the plan itself.
    most: how many are shown.
  """
  if not found:
    return [
      "What to change: nothing that was tried saves time."
      if fits
      else "Nothing that was tried fits."
    ]
  if not fits and not any(one.fits for one in found):
    lines = ["What to change: nothing that was tried fits; nearest:"]
  else:
    lines = ["What to change (sketched unless it says compiled; times are expected ones):"]
  for one in found[:most]:
    names = " ".join(flag.removeprefix("--config.").removeprefix("--") for flag in one.flags)
    saved = seconds - one.seconds
    what = f"saves {saved:.3g} s of {seconds:.3g}" if saved > 0 else f"costs {-saved:.3g} s"
    what = "takes as long" if abs(saved) < 0.005 * seconds else what
    held = f"{one.bytes / GIB:.2f} GiB ({(one.bytes - size) / GIB:+.2f})"
    end = "" if one.fits else ", does not fit"
    source = "compiled" if one.is_compiled else "sketched"
    source += ", another recipe" if one.values == _ADAPTERS else ""
    lines.append(f"  {names}: {what}, {held}{end}, {source}")
  return lines
