"""One hash for the same weights however they lie, and another for any other weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.parallel import stacking
from instructjax.train import weight_hash
from instructjax.train.weight_hash import tree_fingerprint

RNG = np.random.default_rng(0)
TREE = {
  "layers": {"w": jnp.asarray(RNG.normal(size=(3, 8, 4)), jnp.float32), "b": jnp.ones((3, 8))},
  "bias": jnp.asarray([0.5, 0.0, 0.25]),
}
DIGEST = tree_fingerprint(TREE)


def changed(name, change):
  return tree_fingerprint(TREE | {name: change(TREE[name])})


def test_it_does_not_depend_on_where_weights_lie():
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
  place = lambda x: NamedSharding(mesh, PS(None, "fsdp", "tensor") if x.ndim == 3 else PS())
  spread = jax.tree.map(lambda x: jax.device_put(x, place(x)), TREE)
  assert len(DIGEST) == 64 and tree_fingerprint(spread) == DIGEST
  assert tree_fingerprint(stacking.relay(TREE, stacking.unstacked)) == DIGEST
  assert tree_fingerprint(jax.tree.map(np.asarray, TREE)) == DIGEST


def test_nothing_is_gathered():
  mesh = Mesh(np.array(jax.devices()), ("fsdp",))
  sharded = NamedSharding(mesh, PS("fsdp"))
  program = weight_hash._program(False, NamedSharding(mesh, PS()))
  leaf = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharded)
  text = program.lower(leaf, np.uint32(0)).compile().as_text()
  assert "all-gather" not in text and "all-reduce" in text


@pytest.mark.parametrize(
  "name, change",
  [
    ("bias", lambda x: x.at[1].set(1e-30)),
    ("bias", lambda x: x.at[1].set(-0.0)),
    ("bias", lambda x: x[::-1]),  # the same numbers in another order
    ("bias", lambda x: x.astype(jnp.bfloat16)),
    ("bias", lambda x: x[None]),
    # the same numbers at the same places, and one of a new dimension
    ("bias", lambda x: x[:, None]),
    ("layers", lambda x: x | {"w": x["w"].reshape(3, 4, 8)}),
    (
      "layers",
      lambda x: x | {"w": x["w"][jnp.array([1, 0, 2])]},
    ),  # two layers in each other's place
    # two elements in each other's place, the sum of whose indices is the same
    ("layers", lambda x: x | {"w": x["w"].at[0, :2, :2].set(x["w"][0, :2, :2].T)}),
    ("layers", lambda x: {"w2": x["w"], "b": x["b"]}),
  ],
)
def test_other_weights_have_another(name, change):
  assert changed(name, change) != DIGEST


def test_by_hand():
  """Two elements, of bits 5 and 7 at the indices 0 and 1: place 0 mixes to 0."""

  def mix(word):  # MurmurHash3's fmix32, by Appleby, in Python's integers
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)

  found = weight_hash._sums(False, jnp.asarray([5, 7], jnp.uint32), np.uint32(0))
  mixed = [mix(5), mix(7 ^ mix(weight_hash._STRIDES[0]))]
  products = [word * (word >> 16) for word in mixed]
  assert found.tolist() == [sum(mixed) % 2**32, sum(products) % 2**32]
