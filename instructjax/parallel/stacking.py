"""The two ways in which layers' weights lie: stacked on a leading axis, or a list with one tree a layer.

A scan over layers wants them stacked. Layers that are unrolled want the list: a slice of a stack is copied before a
product can read it, and the gradient's parts are copied into a stack again. Called by the models, by checkpoint (saved
one way, read the other) and by whoever compares weights. Imports nothing of the project.

In any tree, weights or optimiser state, the layers lie under the key `layers` of a dict.
"""

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


def _with_axis(leaf, size: int):
  place = leaf.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PS(None, *place.spec))
  return jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=place)


def _without_axis(leaf):
  place = leaf.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PS(*place.spec[1:]))
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)
