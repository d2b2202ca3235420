"""A run saved on one mesh goes on on another: the state comes back bit for bit, what follows within rounding."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.core.structs import PackedBatch
from instructjax.parallel import sharding
from instructjax.train import checkpoint, saved_state, supervised
from instructjax.train.optim import make_optimizer
from tests import tiny

VOCAB, ROWS, LENGTH, STEPS = 23, 8, 6, 2
FINGERPRINT = {"config": "c" * 64}
SAVED_ON = (1, 1, 4, 2)
OTHERS = [(1, 1, 2, 4), (1, 1, 8, 1), (2, 2, 1, 2), (1, 1, 1, 1)]


@pytest.fixture(scope="module")
def model(tiny_config):
  return tiny.make_model(tiny_config, VOCAB, "lm", num_kv_heads=4)


@pytest.fixture(scope="module")
def start(quick_jit, model, adam_config):
  """start(sizes) -> (mesh, train step with dropout, state of fresh weights)."""
  tx, steps = make_optimizer(adam_config, 100), {}

  def one(sizes):
    devices = jax.devices()[: np.prod(sizes)]
    mesh, key = sharding.make_mesh(MeshConfig(*sizes), devices), jax.random.key(0)
    with mock.patch.object(jax, "jit", quick_jit):
      params = supervised.init_params(mesh, model, key)
      state, shardings = supervised.create_state(mesh, model, tx, params, key)
      if sizes not in steps:
        steps[sizes] = supervised.make_lm_train_step(
          model, tx, dropout_rate=0.3, state_shardings=shardings
        )
    return mesh, steps[sizes], state

  return one


def train(mesh, step, state, seeds):
  """(state, losses) after a step on the batch of each seed."""
  losses = []
  column_BL = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  for seed in seeds:
    token_BL = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    weight_BL = (column_BL > 0).astype(np.float32)
    batch = PackedBatch(token_BL, np.ones_like(column_BL), column_BL, weight_BL)
    with jax.set_mesh(mesh):
      state, metrics = step(state, sharding.place_batch(mesh, batch))
    losses.append(float(metrics["loss"]))
  return state, losses


def to_numpy(state):
  return jax.tree.map(np.array, dataclasses.replace(state, key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory):
  """(directory of the checkpoint, state in it, state and losses of the steps after it)."""
  directory = tmp_path_factory.mktemp("stage")
  mesh, step, state = start(SAVED_ON)
  state, _ = train(mesh, step, state, range(STEPS))
  with checkpoint.Checkpoints(directory, keep=1) as checkpoints:
    checkpoints.save(STEPS, state, {}, {}, FINGERPRINT, {})
  then = to_numpy(state)
  state, losses = train(mesh, step, state, range(STEPS, 2 * STEPS))
  return directory, then, to_numpy(state), losses


@pytest.mark.parametrize("sizes", [SAVED_ON, *OTHERS], ids=str)
def test_a_run_goes_on_on_another_mesh(start, saved, sizes):
  directory, then, after, losses = saved
  mesh, step, fresh = start(sizes)
  layout = jax.tree.map(lambda x: x.sharding, fresh)
  with checkpoint.Checkpoints(directory, keep=1) as checkpoints:
    state, _ = checkpoints.restore(STEPS, fresh, FINGERPRINT)
  jax.tree.map(np.testing.assert_array_equal, to_numpy(state), then)
  assert jax.tree.map(lambda x: x.sharding, state) == layout
  state, got_losses = train(mesh, step, state, range(STEPS, 2 * STEPS))
  if sizes == SAVED_ON:
    assert got_losses == losses
    jax.tree.map(np.testing.assert_array_equal, to_numpy(state), after)
    return
  np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, to_numpy(state), after)


@pytest.mark.parametrize("sizes", OTHERS, ids=str)
def test_weights_are_loaded_onto_another_mesh(model, saved, sizes):
  mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
  shardings, shapes = models.param_shardings(mesh, model)
  placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  params = saved_state.load_params(saved[0], jax.tree.map(placed, shapes, shardings))
  jax.tree.map(np.testing.assert_array_equal, params, saved[1].params)
  assert jax.tree.map(lambda x: x.sharding, params) == shardings
