"""The two ways in which layers' weights lie: stacked on a leading axis, or a list with one tree a layer.

A scan over layers wants them stacked. Layers that are unrolled want the list: a slice of a stack is copied before a
product can read it, and the gradient's parts are copied into a stack again. Called by the models, by checkpoint (which
saves stacks only) and by whoever compares weights. Imports nothing of the project.

In any tree, weights or optimiser state, the layers lie under the key `layers` of a dict.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as PS

KEY = "layers"


def unstacked(layers: Any) -> list:
  """The list of one tree a layer, of a stack or of what is such a list already.

  By `split`, whose gradient is one concatenation; indexing would pad and add N arrays of full size.
  """
  if isinstance(layers, list):
    return layers
  leaves, treedef = jax.tree.flatten(layers)
  rows = [jax.lax.split(leaf, (1,) * leaf.shape[0], axis=0) for leaf in leaves]
  return [
    jax.tree.unflatten(treedef, [row.reshape(row.shape[1:]) for row in layer])
    for layer in zip(*rows)
  ]


def stacked(layers: Any) -> Any:
  """One tree whose leaves have a leading axis of layers, of such a list or of what is stacked already."""
  if not isinstance(layers, list):
    return layers
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def stack_each(layers: Any) -> Any:
  """`stacked` outside of a traced function, each leaf by itself and placed as its layers are."""
  if not isinstance(layers, list):
    return layers

  def one(*leaves):
    place = _with_axis(leaves[0], len(leaves)).sharding
    return _stack_program(place)(leaves)

  return jax.tree.map(one, *layers)


def unstack_each(layers: Any) -> list:
  """`unstacked` outside of a traced function, leaf by leaf; each is freed before the next is taken apart.

  So no more than one leaf lies in memory twice.
  """
  if isinstance(layers, list):
    return layers
  leaves, treedef = jax.tree.flatten(layers)
  parts = []
  for leaf in leaves:
    parts.append(_unstack_program(_without_axis(leaf).sharding)(leaf))
    jax.block_until_ready(parts[-1])
    leaf.delete()
  return [jax.tree.unflatten(treedef, layer) for layer in zip(*parts)]


@functools.cache
def _stack_program(place):
  return jax.jit(lambda leaves: jnp.stack(leaves), out_shardings=place)


@functools.cache
def _unstack_program(place):
  return jax.jit(lambda leaf: [layer for layer in unstacked(leaf)], out_shardings=place)


def stacked_shapes(layers: Any) -> Any:
  """`stacked` of ShapeDtypeStructs, with shardings where they have any."""
  if not isinstance(layers, list):
    return layers
  return jax.tree.map(lambda leaf: _with_axis(leaf, len(layers)), layers[0])


def unstacked_shapes(layers: Any) -> list:
  """`unstacked` of ShapeDtypeStructs, with shardings where they have any."""
  if isinstance(layers, list):
    return layers
  number = jax.tree.leaves(layers)[0].shape[0]
  return [jax.tree.map(_without_axis, layers) for _ in range(number)]


def relay(tree: Any, change: Callable[[Any], Any]) -> Any:
  """`tree` with `change` made to every node under a key `layers`."""
  has_layers = lambda node: isinstance(node, dict) and KEY in node

  def at(node):
    return {**node, KEY: change(node[KEY])} if has_layers(node) else node

  return jax.tree.map(at, tree, is_leaf=has_layers)


def _with_axis(leaf: Any, size: int):
  place = leaf.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PS(None, *place.spec))
  return jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=place)


def _without_axis(leaf: Any):
  place = leaf.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PS(*place.spec[1:]))
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)
