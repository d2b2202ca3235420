"""What is read of a checkpoint: parts of its state, on another layout, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.core.errors import UserError
from instructjax.train import saved_state
from instructjax.train.checkpoint import Checkpoints


def _state(seed=0, width=8):
  params = {"w_DF": jax.random.normal(jax.random.key(seed), (width, 4)), "bias": jnp.zeros((4,))}
  return {"params": params, "step": jnp.int32(0)}


def _save(directory, steps, state, metrics=None):
  with Checkpoints(directory, keep=10) as checkpoints:
    for step in steps:
      checkpoints.save(step, state, {"row": step}, (metrics or {}).get(step, {}), {}, {})


def _assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_best_step_is_the_earliest_of_the_lowest(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0}
  _save(tmp_path, losses, _state(), {step: {"loss": loss} for step, loss in losses.items()})
  assert saved_state.best_step(tmp_path, "loss") == (2, 1.0)
  with pytest.raises(UserError, match="accuracy"):
    saved_state.best_step(tmp_path, "accuracy")


def test_params_alone_are_loaded_out_of_a_state(tmp_path):
  state = _state(seed=5)
  _save(tmp_path, [1, 2], state)
  params = saved_state.load_params(tmp_path, jax.eval_shape(lambda: _state()["params"]))
  _assert_same(params, state["params"])
  part = saved_state.load_state_item(
    tmp_path, {"params": {"bias": state["params"]["bias"]}}, step=1
  )
  _assert_same(part, {"params": {"bias": state["params"]["bias"]}})


def test_params_load_onto_another_layout_and_dtype(tmp_path):
  state = _state(seed=5)
  _save(tmp_path, [1], state)
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
  sharding = NamedSharding(mesh, PS("fsdp", "tensor"))
  abstract = {"w_DF": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=sharding)}
  w_DF = saved_state.load_params(tmp_path, abstract)["w_DF"]
  assert w_DF.sharding == sharding and w_DF.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.array(w_DF), np.array(state["params"]["w_DF"].astype(jnp.bfloat16))
  )


def test_misfits_are_refused_by_name(tmp_path):
  _save(tmp_path, [1], _state())
  wide = jax.eval_shape(lambda: _state(width=16)["params"])
  with pytest.raises(
    UserError, match=r"params.w_DF must have shape \(16, 4\) and has shape \(8, 4\)"
  ):
    saved_state.load_params(tmp_path, wide)
  with pytest.raises(UserError, match=r"params.head must have shape \(4,\) and is missing"):
    saved_state.load_params(tmp_path, {"head": jax.ShapeDtypeStruct((4,), "float32")})
  with pytest.raises(UserError, match=r"no checkpoint of step 2 in .*/2/manifest.json is missing"):
    saved_state.load_params(tmp_path, _state()["params"], step=2)
  with pytest.raises(UserError, match="no checkpoint in .*nowhere"):
    saved_state.load_params(tmp_path / "nowhere", _state()["params"])
