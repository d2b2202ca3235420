"""Connects the processes of a run on CPUs with each other, before anything takes long.

Called by pipeline.py. On CPUs, JAX's collectives run over Gloo. The devices of each group that communicates, a clique,
connect when a program first needs them, and Gloo gives up if the last comes 30 s after the first, which no option
changes. One process may well compile that much longer than another. Once connected, they wait for each other.
"""

import itertools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def axes(mesh: Mesh) -> list[tuple[str, ...]]:
  """The sets of mesh axes over which a program may communicate: all but those over one device."""
  split = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
  return [
    subset for size in range(1, len(split) + 1) for subset in itertools.combinations(split, size)
  ]


def meeting(mesh: Mesh):
  """The jitted function that communicates in every clique: one number a device to as many sums as there are cliques."""
  # Each device brings a number of its own. XLA would replace the sum of a number that all share by a product.
  each = P(mesh.axis_names)
  sums = lambda x: [jax.lax.psum(x, subset) for subset in axes(mesh)]
  return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=each, out_specs=each))


def connect(mesh: Mesh):
  """Connects the devices of every clique of the mesh. All processes of the run must call it at about the same time."""
  if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
    return
  number_D = np.arange(mesh.size, dtype=np.float32)
  spread = NamedSharding(mesh, P(mesh.axis_names))
  number_D = jax.make_array_from_callback(number_D.shape, spread, number_D.__getitem__)
  jax.block_until_ready(meeting(mesh)(number_D))
