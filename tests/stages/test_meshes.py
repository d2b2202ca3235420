"""The mesh of a run: what an open axis becomes, and what is refused because devices would repeat each other's work."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh

from configs import models as presets
from instructjax.core.config import MeshConfig, from_config_dict
from instructjax.core.errors import UserError
from instructjax.parallel import sharding
from instructjax.stages import lineage, meshes


def load(preset: str, **blocks):
  config = from_config_dict(presets.get("ppo_ptx", preset))
  changed = {
    name: dataclasses.replace(getattr(config, name), **new) for name, new in blocks.items()
  }
  return dataclasses.replace(config, **changed)


@pytest.fixture
def devices(monkeypatch):
  """Makes meshes of any number of devices, which are not there."""

  def of(number: int):
    def make(cfg, devices=None):
      sizes = [getattr(cfg, axis) for axis in sharding.MESH_AXES]
      if -1 in sizes:
        rest = -1
        for size in sizes:
          rest *= size
        sizes[sizes.index(-1)] = number // rest
      return AbstractMesh(tuple(sizes), sharding.MESH_AXES)

    monkeypatch.setattr(sharding, "make_mesh", make)

  return of


@pytest.mark.parametrize(
  ("preset", "number", "wanted"),
  [
    ("gpt3_1p3b", 8, (1, 1, 8, 1)),  # all rows divide: fsdp takes all
    ("gpt3_1p3b", 256, (1, 1, 32, 8)),  # 32 rows of sft
    ("llama3_8b", 256, (1, 1, 32, 8)),
    ("llama3_70b", 256, (1, 1, 32, 8)),
    ("gpt3_760m", 16, (1, 1, 16, 1)),
    ("gpt3_175b", 256, (1, 1, 8, 32)),  # 8 rows of sft
  ],
)
def test_an_open_axis_takes_what_the_rows_divide(devices, preset, number, wanted):
  devices(number)
  config = load(preset)
  stages = lineage.plan(config)
  found = meshes.settle(config, stages)
  assert found == MeshConfig(*wanted)
  mesh = sharding.make_mesh(found)
  meshes.require_fit(config, mesh, stages)
  said = meshes.choice(config, mesh)
  assert ("mesh.fsdp=-1 would be 256" in said) == (number == 256)
  assert (f"fsdp={wanted[2]}, tensor={wanted[3]};" in said) == (number == 256)


def test_what_is_given_stays(devices):
  devices(256)
  config = load("gpt3_1p3b", mesh=dict(slice=2, data=4, fsdp=-1))  # 32 rows of sft
  assert meshes.settle(config, lineage.plan(config)) == MeshConfig(2, 4, 4, 8)
  config = load("gpt3_1p3b", mesh=dict(fsdp=-1, tensor=2))
  assert meshes.settle(config, lineage.plan(config)) == MeshConfig(1, 1, 128, 2)
  config = load("gpt3_1p3b", mesh=dict(fsdp=64, tensor=4))
  assert meshes.settle(config, lineage.plan(config)) == MeshConfig(1, 1, 64, 4)


def test_a_hint_is_not_refused_in_its_turn():
  """No mesh of 1024 devices divides 8 rows, so the hint names the batches that have to grow."""
  config = load("gpt3_175b")
  mesh = AbstractMesh((1, 1, 1024, 1), sharding.MESH_AXES)
  words = (
    r"config.sft.batch_size=8 must be .* or the mesh to --config.mesh.slice=1 --config.mesh.data=1"
    r" --config.mesh.fsdp=64 --config.mesh.tensor=16 --config.sft.batch_size=64 --config.ppo_init.batch_size=64$"
  )
  with pytest.raises(UserError, match=words):
    meshes.require_fit(config, mesh, ["sft", "ppo_init", "rm", "ppo_ptx"])
  config = load("gpt3_175b", sft=dict(batch_size=64), ppo_init=dict(batch_size=64))
  mesh = AbstractMesh((1, 1, 64, 16), sharding.MESH_AXES)
  meshes.require_fit(config, mesh, lineage.plan(config))


@pytest.mark.parametrize(
  ("ppo", "words"),
  [
    (
      {},
      r"config.ppo.batch_size / num_minibatches = 64 rows must be .* = 128, else each device computes",
    ),
    ({"num_minibatches": 1, "microbatches": 8}, "num_minibatches / microbatches = 64 rows"),
    ({"num_minibatches": 1, "score_microbatches": 8}, "batch_size / score_microbatches = 64 rows"),
    (
      {"num_minibatches": 4, "ptx_microbatches": 16},
      "num_minibatches \\* ptx_rows / ptx_microbatches = 64 rows .*, or set fewer --config.ppo.ptx_microbatches$",
    ),
    ({"num_minibatches": 4, "packed_rows": 64}, "config.ppo.packed_rows=64 must be divisible"),
    ({"num_minibatches": 4, "packed_rows": 128}, None),  # the rows that are packed are split
    ({"num_minibatches": 4, "gamma": 0.0, "ptx_microbatches": 16}, None),  # of which there are none
  ],
)
def test_rows_that_every_device_would_compute(ppo, words):
  config = load("gpt3_1p3b", ppo=ppo)
  config = dataclasses.replace(config, stage="ppo_ptx" if config.ppo.gamma else "ppo")
  mesh = AbstractMesh((1, 1, 128, 2), sharding.MESH_AXES)
  if words is None:
    meshes.require_fit(config, mesh, [config.stage])
    return
  with pytest.raises(UserError, match=words):
    meshes.require_fit(config, mesh, [config.stage])
