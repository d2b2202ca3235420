"""Layouts inside a traced step: rows stay split, and decoding weights lie where memory allows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.parallel import constraints, sharding
from tests import tiny


def test_rows_stay_split_inside_a_step_where_they_divide():
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  pin = jax.jit(functools.partial(constraints.shard_rows, tensor_dim=1))
  with jax.set_mesh(mesh):
    even, odd = pin((jnp.zeros((8, 2)), jnp.zeros((6, 2))))
  spec = PS(sharding.ROWS, "tensor")
  assert even.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
  assert odd.sharding.is_equivalent_to(NamedSharding(mesh, PS(None, "tensor")), 2)
  assert len(pin((jnp.zeros((8, 2)),))[0].devices()) == 1  # no mesh: untouched


def kind_mesh(kind, *shape):
  device = AbstractDevice(kind, None, platform="tpu")
  return AbstractMesh(shape, sharding.MESH_AXES, abstract_device=device)


def test_decoding_is_tensor_parallel_while_the_copy_takes_two_fifths_of_the_memory():
  execution = dataclasses.replace(tiny.EXECUTION, dtype="bfloat16", decode_layout="auto")

  def layout(mesh, **changes):
    chosen = dataclasses.replace(execution, **changes)
    return models.model_on(mesh, tiny.GPT3, chosen, 50257, "lm").execution.decode_layout

  # 173.9e9 weights of 2 bytes that tensor splits and tables of 1.3e9: 44.8 GB of 102.8 over 8 devices, 23.0 over 16.
  assert layout(kind_mesh("TPU v5", 1, 1, 128, 8)) == "2d"
  assert layout(kind_mesh("TPU v5", 1, 1, 64, 16)) == "tensor"
  assert layout(kind_mesh("TPU v5p", 1, 1, 128, 8)) == "2d"  # the same chip by its other name
  assert layout(kind_mesh("TPU v5 lite", 1, 1, 16, 16)) == "2d"  # of 16.9 GB
  assert (
    layout(sharding.make_mesh(MeshConfig(1, 1, 8, 1))) == "tensor"
  )  # CPUs: memory bounds nothing
  with pytest.raises(ValueError, match="must know the memory of a 'TPU v99'"):
    layout(kind_mesh("TPU v99", 1, 1, 16, 16))
  assert layout(kind_mesh("TPU v5", 1, 1, 128, 8), decode_layout="tensor") == "tensor"


def test_an_order_is_asked_for_on_a_mesh_only():
  def program(mesh):
    with jax.set_mesh(mesh):
      # A new function each time: traces are remembered, whatever the mesh.
      return str(jax.make_jaxpr(lambda x, y: constraints.after(x + 1, {"y": y}))(1.0, 2.0))

  eight, one = (sharding.make_mesh(MeshConfig(1, n, 1, 1), jax.devices()[:n]) for n in (8, 1))
  assert "optimization_barrier" in program(eight)
  assert "optimization_barrier" not in program(one)
