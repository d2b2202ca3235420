"""The mesh of a run: chosen where the config leaves it open, and checked against all that has to divide over it.

Called by pipeline.py and by launch's planner.
"""

import dataclasses
import math
from collections.abc import Callable, Collection

from jax.sharding import AbstractMesh, Mesh

from instructjax.core.config import Config, MeshConfig
from instructjax.core.stages import STAGES, RoleName
from instructjax.models import transformer
from instructjax.parallel import sharding
from instructjax.stages import lineage
from instructjax.stages.context import make_model


def settle(
  config: Config,
  stages: Collection[str],
  make_mesh: Callable[[MeshConfig], Mesh | AbstractMesh] | None = None,
) -> MeshConfig:
  """The sizes of the mesh's axes: those of the config, or the nearest that fit where the config leaves one open.

  An axis of -1 takes all devices that are left. If that is `fsdp`, `tensor` is 1, and so many devices do not divide
  every batch and every part of one, `fsdp` takes as many as do, and `tensor` takes the rest.

  Args:
    config: the run's config.
    stages: whose batches and networks are to be divided.
    make_mesh: the mesh of the devices; None for `sharding.make_mesh` of those that are attached.
  Raises:
    UserError: see `sharding.make_mesh`.
  """
  mesh = (make_mesh or sharding.make_mesh)(config.mesh)
  filled = MeshConfig(**mesh.shape)
  if config.mesh.fsdp != -1 or config.mesh.tensor != 1:
    return filled
  parts = [rows for rows, _ in _parts(config, stages).values()]
  sizes = [*_batches(config, stages).values(), *parts]
  return sharding.nearest_mesh(mesh, *_params(config, mesh, stages), sizes) or filled


def require_fit(config: Config, mesh: Mesh | AbstractMesh, stages: Collection[str]):
  """Checks that the mesh divides the parameters, batches and parts of batches of these stages.

  Raises:
    UserError: it does not; see `sharding.require_fit`.
  """
  axes, shapes = _params(config, mesh, stages)
  sharding.require_fit(mesh, axes, shapes, _batches(config, stages), _parts(config, stages))


def choice(config: Config, mesh: Mesh | AbstractMesh) -> str:
  """What `settle` has made of an open axis, in words; '' if that axis took all devices."""
  asked = dataclasses.asdict(config.mesh)
  fixed = math.prod(size for size in asked.values() if size != -1)
  filled = {axis: mesh.size // fixed if size == -1 else size for axis, size in asked.items()}
  if filled == dict(mesh.shape):
    return ""
  sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size != 1)
  return f"mesh: {sizes}; mesh.fsdp=-1 would be {filled['fsdp']}, which does not divide every batch and part of one"


def _params(
  config: Config, mesh: Mesh | AbstractMesh, stages: Collection[str]
) -> tuple[dict, dict]:
  """The logical axes and the shapes of the parameters of all networks, by role."""
  rows = [STAGES[stage] for stage in stages]
  roles: dict[RoleName, None] = dict.fromkeys(row.role for row in rows if row.role)
  if any(row.is_rl for row in rows):
    roles["reward"] = None
  vocab_size = config.tokenizer.vocab_size
  networks = {role: make_model(config, mesh, role, vocab_size) for role in roles}
  axes = {role: transformer.param_axes(model) for role, model in networks.items()}
  return axes, {role: transformer.param_shapes(model) for role, model in networks.items()}


def _batches(config: Config, stages: Collection[str]) -> dict[str, int]:
  """Rows of the batches in use, by their fields."""
  names = dict.fromkeys(name for stage in stages for name in STAGES[stage].batches)
  sizes = {f"config.{name}": lineage.value(config, name) for name in names}
  return {name: size for name, size in sizes.items() if size}


def _parts(config: Config, stages: Collection[str]) -> dict[str, tuple[int, str]]:
  found: dict[str, tuple[int, str]] = {}
  for stage in stages:
    # Of the variants of PPO, the one with the pretraining term has the most parts, all others are among them.
    found |= {f"config.{what}": part for what, part in lineage.part_rows(config, stage).items()}
  return found
