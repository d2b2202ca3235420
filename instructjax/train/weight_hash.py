"""A hash of weights that is computed where they lie, shard by shard.

Called by the RL stages, whose checkpoints hold the hashes of their frozen networks. Nothing is gathered: each device
passes once over its own shards, and two numbers an array come to the host. It guards against faults and mix-ups, not
against forgery.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.parallel import stacking

# Odd multipliers of the indices, so that the same numbers in another order or shape are another sum.
_STRIDES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5)


def tree_fingerprint(tree: Any) -> str:
  """The hash of a pytree's names, shapes, dtypes and numbers, in hex.

  It depends neither on the sharding nor on whether layers are stacked or a list. All processes must call it.
  """
  sums: dict[str, list[Any]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    at = next((i for i, key in enumerate(path) if getattr(key, "key", None) == stacking.KEY), None)
    is_list = at is not None and isinstance(path[at + 1], jax.tree_util.SequenceKey)
    layer, name, shape = 0, jax.tree_util.keystr(path), np.shape(leaf)
    if at is not None and is_list:
      layer, name = path[at + 1].idx, jax.tree_util.keystr((*path[: at + 1], *path[at + 2 :]))
      shape = ("layers", *shape)
    elif at is not None:
      shape = ("layers", *shape[1:])
    dtype = leaf.dtype if isinstance(leaf, jax.Array) else np.asarray(leaf).dtype
    key = f"{name} {dtype} {shape}"
    sums.setdefault(key, []).append(_sum_of(leaf, layer, is_list))
  digest = hashlib.sha256()
  for key, parts in sums.items():  # read only now, when all of them are on their way
    total = np.sum([np.asarray(part) for part in parts], axis=0, dtype=np.uint32)
    digest.update(f"{key}\n".encode() + total.astype("<u4").tobytes())
  return digest.hexdigest()


def _sum_of(leaf: Any, layer: int, is_one: bool) -> jax.Array:
  """The two sums of a leaf; of one layer of a stack if `is_one`."""
  place = getattr(leaf, "sharding", None)
  whole = NamedSharding(place.mesh, PS()) if isinstance(place, NamedSharding) else None
  return _program(is_one, whole)(leaf, np.uint32(layer))


# Cached, because jit compiles again for every new function object.
@functools.lru_cache(maxsize=64)
def _program(is_one: bool, whole: NamedSharding | None):
  return jax.jit(functools.partial(_sums, is_one), out_shardings=whole)


def _sums(is_one: bool, leaf: jax.Array, layer: jax.Array) -> jax.Array:
  """uint32 [2]: over all elements, the sums of mixtures of an element's bits and its indices, modulo 2^32."""
  array = jnp.asarray(leaf)
  array = array[None] if is_one else array
  width = jnp.dtype(f"uint{8 * array.dtype.itemsize}") if array.dtype != bool else jnp.uint8
  bits = array.astype(width) if array.dtype == bool else jax.lax.bitcast_convert_type(array, width)
  bits = bits.astype(jnp.uint32)
  place = jnp.zeros(array.shape, jnp.uint32)
  for axis in range(array.ndim):
    index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    index = index + layer if axis == 0 and is_one else index
    place = place + index * jnp.uint32(_STRIDES[axis % len(_STRIDES)])
  mixed = _mix(bits ^ _mix(place))
  # The second is no function of the first. More of them would cost a CPU more than SHA-256 does.
  sums = [jnp.sum(words, dtype=jnp.uint32) for words in (mixed, mixed * (mixed >> 16))]
  return jnp.stack(sums)


def _mix(word: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3: one to one on 32 bits, and each bit of the result depends on all."""
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return word ^ (word >> 16)
