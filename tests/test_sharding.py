"""Mesh, rules and placement: GPT-3 175B divides, mistakes are named, eight devices equal one."""

import dataclasses
import functools
import math
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax import models, sharding
from instructjax.config import MeshConfig, ModelConfig, RopeScalingConfig

GPT3 = ModelConfig(
  num_layers=96,
  d_model=12288,
  num_heads=96,
  num_kv_heads=96,
  head_dim=128,
  d_mlp=49152,
  max_length=2048,
  position="learned",
  rope_base=1e4,
  rope_scaling=RopeScalingConfig("none", 8.0, 1.0, 4.0, 8192),
  norm="layernorm",
  norm_eps=1e-5,
  mlp="gelu",
  use_bias=True,
  qkv_bias=False,
  attention_window=256,
  tie_embeddings=True,
  init_std=0.02,
  dtype="bfloat16",
  layers="scan",
  remat=True,
  weights="",
)
TINY = dataclasses.replace(
  GPT3,
  num_layers=2,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_mlp=24,
  max_length=16,
  attention_window=0,
  dtype="float32",
  layers="unroll",
  remat=False,
)
VOCAB = 19
QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time of tiny programs


def abstract_mesh(data, fsdp, tensor):
  return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES)


def tree_shardings(mesh, model):
  return sharding.param_shardings(mesh, models.param_axes(model), models.param_shapes(model))


def test_gpt3_175b_has_its_published_size():
  shapes = models.param_shapes(models.make_model(GPT3, 50257, "lm"))
  layers, d, vocab, length = 96, 12288, 50257, 2048
  # Per layer 12 d^2 weights and 13 d biases and norms; then the final norm and both tables.
  expected = layers * (12 * d**2 + 13 * d) + 2 * d + (vocab + length) * d
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == expected == 174_604_259_328


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 128, 8), (2, 64, 8)])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_gpt3_175b_divides_over_pods(shape, head):
  mesh, model = abstract_mesh(*shape), models.make_model(GPT3, 50257, head)
  shapes, shardings = models.param_shapes(model), tree_shardings(mesh, model)
  local = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), shapes, shardings)
  whole = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  # The tables (0.4%) are split over fsdp only: no device holds much over its fair share.
  assert sum(jax.tree.leaves(local)) < 1.08 * whole / (shape[1] * shape[2])
  assert shardings["embedding"]["token_VD"].spec == PS(None, "fsdp")


def test_the_vocabulary_is_not_split_because_50257_divides_by_nothing():
  assert sharding.AXIS_RULES["vocab"] is None
  assert 50257 == 29 * 1733


def test_a_dimension_that_does_not_divide_names_its_parameter():
  model = models.make_model(TINY, VOCAB, "lm")
  message = r"layers/attention/b_qkv_GQK: kv_heads=2 must be divisible by mesh axis tensor=4"
  with pytest.raises(ValueError, match=message):
    tree_shardings(abstract_mesh(1, 2, 4), model)


def test_an_axis_without_a_rule_is_refused():
  with pytest.raises(ValueError, match="logical axis 'embd' must have a rule; known are embed,"):
    sharding.param_shardings(
      abstract_mesh(1, 2, 2), {"w": ("embd", "mlp")}, {"w": jax.ShapeDtypeStruct((4, 4), float)}
    )
  with pytest.raises(ValueError, match="parameter w: shape .* must have axes"):
    sharding.param_shardings(
      abstract_mesh(1, 2, 2), {"w": ("embed",)}, {"w": jax.ShapeDtypeStruct((4, 4), float)}
    )


@pytest.mark.parametrize(
  ("asked", "nearest"),
  [
    ((1, 16, 1), "data=1, fsdp=8, tensor=1"),
    ((3, 1, 2), "data=4, fsdp=1, tensor=2"),
    ((-1, 3, 1), "data=2, fsdp=4, tensor=1"),
    ((1, 1, 1), "data=8, fsdp=1, tensor=1"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest(asked, nearest):
  with pytest.raises(ValueError, match=f"got 8. Nearest that fits: .*{nearest}"):
    sharding.make_mesh(MeshConfig(*asked))


def test_two_free_axes_or_a_zero_are_refused():
  for asked in ((-1, -1, 1), (0, 8, 1), (-2, 8, 1)):
    with pytest.raises(ValueError, match="must be positive sizes, with -1 at most once"):
      sharding.make_mesh(MeshConfig(*asked))


def test_mesh_fills_the_free_axis_over_given_devices():
  assert dict(sharding.make_mesh(MeshConfig(1, -1, 2)).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
  mesh = sharding.make_mesh(MeshConfig(-1, 1, 1), jax.devices()[:3])
  assert dict(mesh.shape) == {"data": 3, "fsdp": 1, "tensor": 1}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_batches_are_placed_by_rows_or_refused():
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  batch = {"token_BL": np.arange(24).reshape(8, 3), "index_B": np.arange(8)}
  placed = sharding.place_batch(mesh, batch)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert placed["token_BL"].sharding == sharding.batch_sharding(mesh)
  assert {shard.data.shape for shard in placed["token_BL"].addressable_shards} == {(2, 3)}
  with pytest.raises(ValueError, match=r"batch: 6 rows must be divisible by .* data \* fsdp = 4"):
    sharding.place_batch(mesh, np.zeros((6, 3)))


def pod_mesh(shape, processes):
  """A mesh of devices of which nothing but their process is known, `processes` in order of mesh position."""
  devices = np.array([types.SimpleNamespace(process_index=p) for p in processes]).reshape(shape)
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  return types.SimpleNamespace(devices=devices, shape=sizes)


@pytest.mark.parametrize(
  ("shape", "processes", "rows"),
  [
    ((4, 1, 1), [0, 0, 1, 1], {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
    ((2, 2, 1), [0, 1, 0, 1], {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}),  # hosts are squares of a slice
    ((1, 2, 2), [0, 1, 2, 3], {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 3: [4, 5, 6, 7]}),  # tensor across
    ((1, 1, 4), [0, 0, 1, 1], {0: list(range(8)), 1: list(range(8))}),
  ],
)
def test_a_process_brings_the_rows_that_its_devices_hold(shape, processes, rows):
  mesh = pod_mesh(shape, processes)
  for process, expected in rows.items():
    with mock.patch.object(jax, "process_index", return_value=process):
      assert sharding.own_rows(mesh, 8).tolist() == expected
  with pytest.raises(ValueError, match=r"batch: 7 rows must be divisible by the mesh's data \* fs"):
    sharding.own_rows(mesh if shape[:2] != (1, 1) else pod_mesh((1, 2, 1), [0, 1]), 7)


def test_rows_of_shards_that_are_no_neighbours_are_placed_each_on_its_own():
  mesh = pod_mesh((2, 2, 1), [0, 1, 0, 1])
  asked = lambda shape, _, shard: [shape] + [shard((slice(i, i + 2), slice(None))) for i in (2, 6)]
  with (
    mock.patch.object(jax, "process_index", return_value=1),
    mock.patch.object(jax, "make_array_from_callback", asked),
    mock.patch.object(sharding, "batch_sharding"),
  ):
    own = np.arange(24).reshape(8, 3)[sharding.own_rows(mesh, 8)]
    shape, first, second = sharding.place_batch(mesh, own)
  assert shape == (8, 3)
  np.testing.assert_array_equal(first, [[6, 7, 8], [9, 10, 11]])
  np.testing.assert_array_equal(second, [[18, 19, 20], [21, 22, 23]])


def test_rows_held_by_every_process_may_be_of_any_number():
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  for rows, shard_rows in ((8, 2), (6, 6)):
    array = np.arange(rows * 3).reshape(rows, 3)
    placed = sharding.place_rows(mesh, (array,))[0]
    np.testing.assert_array_equal(placed, array)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(shard_rows, 3)}


def test_moments_lie_as_their_parameters_do():
  mesh, model = sharding.make_mesh(MeshConfig(1, 4, 2)), models.make_model(TINY, VOCAB, "lm")
  shapes, shardings = models.param_shapes(model), tree_shardings(mesh, model)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state_shardings = sharding.opt_state_shardings(tx, shapes, shardings, mesh)
  state = jax.eval_shape(tx.init, shapes)
  assert jax.tree.structure(state) == jax.tree.structure(state_shardings)
  assert optax.tree.get(state_shardings, "mu") == optax.tree.get(state_shardings, "nu") == shardings
  counts = [
    s for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(state_shardings)) if not x.shape
  ]
  assert counts and all(s == sharding.replicated(mesh) for s in counts)


def test_rows_stay_split_inside_a_step_where_they_divide():
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  pin = jax.jit(functools.partial(sharding.shard_rows, tensor_dim=1))
  with jax.set_mesh(mesh):
    even, odd = pin((jnp.zeros((8, 2)), jnp.zeros((6, 2))))
  spec = PS(("data", "fsdp"), "tensor")
  assert even.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
  assert odd.sharding.is_equivalent_to(NamedSharding(mesh, PS(None, "tensor")), 2)
  assert len(pin((jnp.zeros((8, 2)),))[0].devices()) == 1  # no mesh: untouched


@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_decoding_weights_are_split_over_tensor_only(how):
  mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
  model = models.make_model(dataclasses.replace(TINY, layers=how), VOCAB, "lm")
  with jax.set_mesh(mesh):
    params = jax.device_put(_model_params_tokens()[1], tree_shardings(mesh, model))
    weights = jax.jit(functools.partial(models.decode_weights, model))(params)
  layer = weights["layers"][0] if how == "unroll" else weights["layers"]
  share = lambda x: x.addressable_shards[0].data.size / x.size
  assert share(params["layers"]["mlp"]["w_up_DF"]) == 1 / 8
  assert share(layer["mlp"]["w_up_DF"]) == share(layer["attention"]["w_qkv_DGQK"]) == 1 / 2
  assert share(weights["embedding"]["token_VD"]) == 1


@functools.cache
def _model_params_tokens():
  model = models.make_model(TINY, VOCAB, "lm")
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: np.asarray(rng.normal(0, 0.3, x.shape), np.float32), models.param_shapes(model)
  )
  is_token_BL = np.arange(6)[None] >= rng.integers(0, 3, (8, 1))
  return model, params, rng.integers(0, VOCAB, (8, 6)).astype(np.int32), is_token_BL


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _loss_and_decode(model, params, token_BL, is_token_BL):
  """Gradient of a loss, and the logits of three cached decode steps in a loop."""
  position_BL = models.positions_from_mask(is_token_BL)

  def loss(params):
    logits_BLV = models.apply(
      model, params, token_BL, segment_BL=is_token_BL.astype(jnp.int32), position_BL=position_BL
    )
    return jnp.sum(jnp.where(is_token_BL[:, :, None], jnp.sin(logits_BLV), 0.0))

  weights = models.decode_weights(model, params)
  cache = models.init_cache(model, 8, 6)
  logits_BV, cache = models.prefill(model, weights, token_BL[:, :3], is_token_BL[:, :3], cache)

  def step(t, carry):
    _, cache = carry
    known_BT = is_token_BL & (jnp.arange(6) <= t)[None]
    return models.decode_step(model, weights, token_BL[:, t], position_BL[:, t], t, known_BT, cache)

  logits_BV, _ = jax.lax.fori_loop(3, 6, step, (logits_BV, cache))
  return jax.value_and_grad(loss)(params), logits_BV


@pytest.fixture(scope="module")
def one_device():
  return _loss_and_decode(*_model_params_tokens())


@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_eight_devices_equal_one(one_device, how):
  model, params, token_BL, is_token_BL = _model_params_tokens()
  model = models.make_model(dataclasses.replace(TINY, layers=how), VOCAB, "lm")
  mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
  with jax.set_mesh(mesh):
    params = jax.device_put(params, tree_shardings(mesh, model))
    batch = sharding.place_batch(mesh, (token_BL, is_token_BL))
    compiled = _loss_and_decode.lower(model, params, *batch).compile()
    result = compiled(params, *batch)
  if how == "unroll":  # the decode loop is then the only loop, and it gathers no weights
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert gathers and not any("while/body" in line for line in gathers)
  for expected, got in zip(jax.tree.leaves(one_device), jax.tree.leaves(result), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
  w_qkv = params["layers"]["attention"]["w_qkv_DGQK"]
  assert w_qkv.addressable_shards[0].data.size * 4 == w_qkv.size
