"""Converts layers' weights between two forms: stacked on a leading axis, or a list with one tree a layer.

A scan over layers needs them stacked. Unrolled layers are faster with a list: XLA copies a slice of a stack before a
product can read it, and copies the parts of the gradient into a stack again. Called by the models, by the stages that
compare weights, and by train/checkpoint.py, which saves stacks only, so that a run can go on in either form. Imports
nothing of the project.

In every tree, of weights or of optimiser state, the layers are under the key `layers` of a dict.
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
  """The layers as a list; a list is returned as it is."""
  if isinstance(layers, list):
    return layers
  leaves, treedef = jax.tree.flatten(layers)
  # The gradient of a split is one concatenation. That of N indexings is a sum of N padded arrays of the stack's size.
  rows = [jax.lax.split(leaf, (1,) * leaf.shape[0], axis=0) for leaf in leaves]
  return [
    jax.tree.unflatten(treedef, [row.reshape(row.shape[1:]) for row in layer])
    for layer in zip(*rows)
  ]


def stacked(layers: Any) -> Any:
  """The layers as one tree whose leaves have a leading axis of layers; a stack is returned as it is."""
  if not isinstance(layers, list):
    return layers
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def stack_each(layers: Any) -> Any:
  """`stacked` for arrays outside of a traced function: leaf by leaf, sharded as the layers are."""
  if not isinstance(layers, list):
    return layers

  def one(*leaves):
    place = _with_axis(leaves[0], len(leaves)).sharding
    return _stack_program(place)(leaves)

  return jax.tree.map(one, *layers)


def unstack_each(layers: Any) -> list:
  """`unstacked` for arrays outside of a traced function. It deletes the stack.

  It goes leaf by leaf and frees each before the next, so at most one leaf is in memory twice.
  """
  if isinstance(layers, list):
    return layers
  leaves, treedef = jax.tree.flatten(layers)
  parts = []
  for leaf in leaves:
    parts.append(_unstack_program(_without_axis(leaf).sharding)(leaf))
    # Dispatch is asynchronous: without waiting, copies of many leaves could exist before the first is deleted.
    jax.block_until_ready(parts[-1])
    leaf.delete()
  return [jax.tree.unflatten(treedef, layer) for layer in zip(*parts)]


# Cached, because jit compiles again for every new function object; leaves of one shape and place share a program.
@functools.cache
def _stack_program(place):
  return jax.jit(lambda leaves: jnp.stack(leaves), out_shardings=place)


@functools.cache
def _unstack_program(place):
  return jax.jit(lambda leaf: [layer for layer in unstacked(leaf)], out_shardings=place)


def stacked_shapes(layers: Any) -> Any:
  """`stacked` for ShapeDtypeStructs; shardings are kept."""
  if not isinstance(layers, list):
    return layers
  return jax.tree.map(lambda leaf: _with_axis(leaf, len(layers)), layers[0])


def unstacked_shapes(layers: Any) -> list:
  """`unstacked` for ShapeDtypeStructs; shardings are kept."""
  if isinstance(layers, list):
    return layers
  number = jax.tree.leaves(layers)[0].shape[0]
  return [jax.tree.map(_without_axis, layers) for _ in range(number)]


def relay(tree: Any, change: Callable[[Any], Any]) -> Any:
  """Applies `change` (one of the functions above) to the layers of a tree, wherever they are in it."""
  has_layers = lambda node: isinstance(node, dict) and KEY in node

  def at(node):
    return {**node, KEY: change(node[KEY])} if has_layers(node) else node

  return jax.tree.map(at, tree, is_leaf=has_layers)


def _with_axis(leaf, size: int):
  """Shape and sharding of `size` leaves in a stack; the axis of layers is never split."""
  place = leaf.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PS(None, *place.spec))
  return jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=place)


def _without_axis(leaf):
  """Shape and sharding of one layer of a stack."""
  place = leaf.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PS(*place.spec[1:]))
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)
