"""Layers as a stack and as a list: the same weights, and checkpoints of the one read as the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.core.config import MeshConfig
from instructjax.core.structs import TrainState
from instructjax.parallel import sharding, stacking
from instructjax.train.checkpoint import Checkpoints
from instructjax.train.saved_state import load_params

LAYERS, WIDTH = 3, 8
FINGERPRINT = {"config": "c" * 64}


def layer(index: int) -> dict:
  w_DF = jnp.arange(WIDTH * 4.0).reshape(WIDTH, 4) + 100 * index
  return {"mlp": {"w_DF": w_DF}, "scale_D": jnp.full(WIDTH, float(index))}


def listed() -> dict:
  return {"embedding": jnp.ones((5, WIDTH)), "layers": [layer(index) for index in range(LAYERS)]}


def test_a_stack_has_the_layers_first():
  stack = stacking.stacked(listed()["layers"])
  assert stack["mlp"]["w_DF"].shape == (LAYERS, WIDTH, 4)
  np.testing.assert_array_equal(stack["scale_D"][:, 0], [0, 1, 2])
  again = stacking.unstacked(stack)
  jax.tree.map(np.testing.assert_array_equal, again, listed()["layers"])
  assert stacking.stacked(stack) is stack
  assert stacking.unstacked(again) is again


def test_gradient_of_a_stack_taken_apart_is_one_concatenation():
  stack = stacking.stacked(listed()["layers"])
  loss = lambda stack: sum(jnp.sum(jnp.sin(x["mlp"]["w_DF"])) for x in stacking.unstacked(stack))
  text = str(jax.make_jaxpr(jax.grad(loss))(stack))
  whole = f"f32[{LAYERS},{WIDTH},4] = "
  lines = [line.split(whole)[1] for line in text.splitlines() if whole in line]
  assert [line.split("[")[0] for line in lines] == ["concatenate"]


def train_state(params: dict, mesh, spec: PS) -> TrainState:
  """A state of distinct numbers; matrices of the layers split by `spec`, which is of one layer."""

  def place(path, x):
    is_split = path[-1].key == "w_DF"
    spec_ = PS(*(None,) * (x.ndim - 2), *spec) if is_split else PS()
    return jax.device_put(x, NamedSharding(mesh, spec_))

  params = jax.tree_util.tree_map_with_path(place, params)
  moments = lambda factor: jax.tree.map(lambda x: factor * x, params)
  adam = optax.ScaleByAdamState(
    count=jax.device_put(jnp.int32(7), sharding.replicated(mesh)), mu=moments(2), nu=moments(3)
  )
  step, key = jax.device_put((jnp.int32(7), jax.random.key(1)), sharding.replicated(mesh))
  return TrainState(step=step, params=params, opt_state=(adam,), key=key)


@pytest.mark.parametrize("saved", ["stack", "list"])
@pytest.mark.parametrize("wanted", ["stack", "list"])
def test_a_checkpoint_is_read_either_way(tmp_path, saved, wanted):
  """Saved on one device, read split over eight: weights, moments and where all of it lies."""
  change = {"stack": stacking.stacked, "list": stacking.unstacked}
  one = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  mesh = sharding.make_mesh(MeshConfig(1, 1, 8, 1))
  made = {name: stacking.relay(listed(), change[name]) for name in change}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    state = train_state(made[saved], one, PS())
    checkpoints.save(7, state, {}, {}, FINGERPRINT, {})
    checkpoints.wait()
    expected = train_state(made[wanted], mesh, PS("fsdp"))
    blank = jax.tree.map(lambda x: x * 0, dataclass_without_key(expected))
    fresh = TrainState(**blank, key=jax.random.key(9))
    got, _ = checkpoints.restore(7, fresh, FINGERPRINT)
  assert_same_arrays(dataclass_without_key(got), dataclass_without_key(expected))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected.params
  )
  assert_same_arrays(load_params(tmp_path, abstract), expected.params)


@pytest.mark.parametrize("how", ["stack", "list"])
def test_layers_on_disk_are_always_stacked(tmp_path, how):
  tree = listed() if how == "list" else stacking.relay(listed(), stacking.stacked)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, jax.tree.map(jnp.asarray, tree), {}, {}, FINGERPRINT, {})
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = checkpointer.metadata(tmp_path / "checkpoints" / "1" / "state").item_metadata.tree
  expected = stacking.relay(listed(), stacking.stacked)
  assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(jnp.shape, expected)


def dataclass_without_key(state: TrainState) -> dict:
  return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def assert_same_arrays(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  place = functools.partial(jax.tree.map, lambda x: x.sharding.shard_shape(x.shape))
  assert place(got) == place(expected)
