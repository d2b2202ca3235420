"""Mesh, rules and placement: GPT-3 175B divides, mistakes are named, eight devices equal one."""

import dataclasses
import functools
import math
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as PS

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.parallel import constraints, sharding, stacking
from tests import tiny


def flags(*sizes) -> str:
  """A mesh as errors spell it."""
  return " ".join(
    f"--config.mesh.{axis}={size}" for axis, size in zip(sharding.MESH_AXES, sizes, strict=True)
  )


TINY = dataclasses.replace(
  tiny.GPT3,
  num_layers=2,
  d_model=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_mlp=24,
  max_length=16,
  attention_window=0,
)
VOCAB = 19
QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time of tiny programs


def make_gpt3(head: str):
  return tiny.make_model(tiny.GPT3, 50257, head, dtype="bfloat16", layers="scan", remat="full")


def abstract_mesh(data, fsdp, tensor, slices=1):
  return AbstractMesh((slices, data, fsdp, tensor), sharding.MESH_AXES)


def tree_shardings(mesh, model):
  return sharding.param_shardings(mesh, models.param_axes(model), models.param_shapes(model))


def test_gpt3_175b_has_its_published_size():
  shapes = models.param_shapes(make_gpt3("lm"))
  layers, d, vocab, length = 96, 12288, 50257, 2048
  # Per layer 12 d^2 weights and 13 d biases and norms; then the final norm and both tables.
  expected = layers * (12 * d**2 + 13 * d) + 2 * d + (vocab + length) * d
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == expected == 174_604_259_328


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 128, 8), (2, 64, 8)])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_gpt3_175b_divides_over_pods(shape, head):
  mesh, model = abstract_mesh(*shape), make_gpt3(head)
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
  model = tiny.make_model(TINY, VOCAB)
  message = (
    "sharding: parameter layers/0/attention/b_qkv_GQK: kv_heads=2 must be divisible by mesh axis"
    f" tensor=4. Nearest mesh that fits: {flags(1, 2, 2, 2)}"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    tree_shardings(abstract_mesh(1, 2, 4), model)


def leaf(**sizes):
  """A parameter of these logical axes: (its axes, its shape)."""
  return tuple(sizes), jax.ShapeDtypeStruct(tuple(sizes.values()), float)


@pytest.mark.parametrize(
  ("params", "rows", "mesh", "words"),
  [
    # What fits one parameter is no help: 6 and 4 divide together by 2 only.
    (
      {"a": leaf(embed=6), "b": leaf(embed=4)},
      {},
      (1, 4, 1),
      f"parameter a: embed=6 .* fsdp=4. Nearest mesh that fits: {flags(1, 2, 2, 1)}",
    ),
    # Slices stay what they are, and the batch has to divide too: by 2 of them, data 2 and fsdp 2.
    (
      {"a": leaf(embed=6, mlp=12)},
      {"config.sft.batch_size": 24},
      (2, 1, 4, 2),
      f"embed=6 .* fsdp=4. Nearest mesh that fits: {flags(2, 2, 2, 2)}",
    ),
    # Tensor alone can take what neither the batch nor embed can.
    (
      {"a": leaf(embed=6, mlp=12)},
      {"config.sft.batch_size": 2},
      (1, 8, 1),
      f"embed=6 .* fsdp=8. Nearest mesh that fits: {flags(1, 1, 2, 4)}",
    ),
    # Nothing takes both: the parameters' mesh, and the batch is the next to be told.
    (
      {"a": leaf(embed=6, mlp=7)},
      {"config.sft.batch_size": 2},
      (1, 8, 1),
      f"embed=6 .* fsdp=8. Nearest mesh that fits: {flags(1, 4, 2, 1)}",
    ),
    (
      {"a": leaf(embed=6, mlp=12)},
      {"config.rm.batch_size": 8, "config.sft.batch_size": 12},
      (8, 1, 1),
      r"sharding: config.sft.batch_size=12 must be divisible by mesh slice \* data \* fsdp = 8. Set"
      f" --config.sft.batch_size to a multiple, or the mesh to {flags(1, 4, 1, 2)}",
    ),
    # Fewer slices would do, but they are there.
    (
      {"a": leaf(mlp=12)},
      {"config.sft.batch_size": 2},
      (4, 1, 1, 2),
      "batch_size=2 .* fsdp = 4. Set --config.sft.batch_size to a multiple",
    ),
    (
      {"a": leaf(mlp=7)},
      {"config.sft.batch_size": 12},
      (8, 1, 1),
      "batch_size=12 .* fsdp = 8. Set --config.sft.batch_size to a multiple",
    ),
  ],
)
def test_the_nearest_mesh_fits_all_parameters_and_batches(params, rows, mesh, words):
  axes, shapes = ({name: pair[which] for name, pair in params.items()} for which in (0, 1))
  *slices, data, fsdp, tensor = mesh
  mesh = abstract_mesh(data, fsdp, tensor, *slices)
  with pytest.raises(ValueError, match=words + "$"):
    sharding.require_fit(mesh, axes, shapes, rows)


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
    ((1, 1, 16, 1), (1, 1, 8, 1)),
    ((1, 3, 1, 2), (1, 4, 1, 2)),
    ((1, -1, 3, 1), (1, 2, 4, 1)),
    ((1, 1, 1, 1), (1, 8, 1, 1)),
    ((3, 1, 1, 2), (4, 1, 1, 2)),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest(asked, nearest):
  with pytest.raises(ValueError, match=f"got 8. Nearest that fits: {flags(*nearest)}$"):
    sharding.make_mesh(MeshConfig(*asked))


def test_two_free_axes_or_a_zero_are_refused():
  for asked in ((1, -1, -1, 1), (-1, -1, 1, 1), (1, 0, 8, 1), (1, -2, 8, 1), (0, 1, 8, 1)):
    with pytest.raises(ValueError, match="must be positive sizes, with -1 at most once"):
      sharding.make_mesh(MeshConfig(*asked))


def test_mesh_fills_the_free_axis_over_given_devices():
  sizes = lambda *asked, **kwargs: tuple(
    sharding.make_mesh(MeshConfig(*asked), **kwargs).shape.items()
  )
  assert sizes(1, 1, -1, 2) == (("slice", 1), ("data", 1), ("fsdp", 4), ("tensor", 2))
  assert dict(sizes(-1, 1, 2, 2))["slice"] == 2
  assert dict(sizes(1, -1, 1, 1, devices=jax.devices()[:3]))["data"] == 3
  mesh = sharding.make_mesh(MeshConfig(1, -1, 1, 1))
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_where_there_are_no_slices_the_axis_takes_blocks_of_devices():
  mesh = sharding.make_mesh(MeshConfig(2, 1, 2, 2))
  assert [list(block.flat) for block in mesh.devices] == [jax.devices()[:4], jax.devices()[4:]]


def slice_devices(platform="tpu"):
  """Eight devices in two slices, as far as the mesh looks at them."""
  return [types.SimpleNamespace(platform=platform, slice_index=i // 4) for i in range(8)]


@pytest.mark.parametrize(
  ("asked", "words"),
  [
    (
      (1, -1, 1, 1),
      f"slices as the devices lie in, got 2. .*: {flags(2, 4, 1, 1)}",
    ),
    (
      (4, 1, 1, 2),
      f"slices as the devices lie in, got 2. .*: {flags(2, 2, 1, 2)}",
    ),
    (
      (-1, 1, 2, 1),
      f"slices as the devices lie in, got 2. .*: {flags(2, 2, 2, 1)}",
    ),
    (
      (1, 1, 16, 1),
      f"number of devices, got 8. .*: {flags(2, 1, 4, 1)}",
    ),
  ],
)
def test_slices_must_be_those_that_the_devices_lie_in(asked, words):
  with pytest.raises(ValueError, match=f"{words}$"):
    sharding.make_mesh(MeshConfig(*asked), slice_devices())


@pytest.mark.parametrize(("platform", "expected"), [("tpu", (2, 2)), ("gpu", (1, 2))])
def test_only_tpu_slices_have_a_network_between_them(monkeypatch, platform, expected):
  """A GPU's `slice_index` is its host's: the axis is free there."""
  calls = []

  def hybrid(mesh_shape, dcn_mesh_shape, devices, **_):
    calls.append((mesh_shape, dcn_mesh_shape, devices))
    return np.array(jax.devices()).reshape(np.multiply(mesh_shape, dcn_mesh_shape))

  def flat(mesh_shape, devices, **_):
    return np.array(jax.devices()).reshape(mesh_shape)

  monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", hybrid)
  monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", flat)
  slices, data = expected
  devices = slice_devices(platform)
  mesh = sharding.make_mesh(MeshConfig(slices, data, -1, 1), devices)
  assert tuple(mesh.shape.values()) == (slices, data, 8 // slices // data, 1)
  assert calls == ([((1, 2, 2, 1), (2, 1, 1, 1), devices)] if platform == "tpu" else [])


def test_weights_are_whole_in_every_slice_and_batches_are_split_over_them():
  mesh, model = sharding.make_mesh(MeshConfig(2, 1, 2, 2)), tiny.make_model(TINY, VOCAB)
  specs = [s.spec for s in jax.tree.leaves(tree_shardings(mesh, model))]
  assert not any("slice" in jax.tree.leaves(tuple(spec)) for spec in specs)
  batch = sharding.place_batch(mesh, np.arange(8))
  first = {shard.device: int(shard.data[0]) for shard in batch.addressable_shards}
  assert [first[device] for device in mesh.devices[:, 0, :, 0].flat] == [0, 2, 4, 6]


def test_the_platform_is_that_of_the_devices_and_of_this_process_without_any(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  tpu = AbstractDevice("TPU v4", None, platform="tpu")
  meshes = [AbstractMesh((1,), ("data",), abstract_device=device) for device in (tpu, None)]
  on_cpu = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])
  asked = [*meshes, None, on_cpu, jax.sharding.get_abstract_mesh()]
  assert [sharding.platform_of(mesh) for mesh in asked] == ["tpu", "gpu", "gpu", "cpu", "gpu"]
  assert sharding.platform_of_arrays({"a": jnp.zeros(2)}) == "cpu"


def test_batches_are_placed_by_rows_or_refused():
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  batch = {"token_BL": np.arange(24).reshape(8, 3), "index_B": np.arange(8)}
  placed = sharding.place_batch(mesh, batch)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert placed["token_BL"].sharding == sharding.batch_sharding(mesh)
  assert {shard.data.shape for shard in placed["token_BL"].addressable_shards} == {(2, 3)}
  with pytest.raises(
    ValueError, match=r"batch: 6 rows must be divisible by .* slice \* data \* fsdp = 4"
  ):
    sharding.place_batch(mesh, np.zeros((6, 3)))


def pod_mesh(shape, processes):
  """A mesh of devices of which nothing but their process is known, `processes` in order of mesh position."""
  devices = np.array([types.SimpleNamespace(process_index=p) for p in processes]).reshape(shape)
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  return types.SimpleNamespace(devices=devices, shape=sizes)


@pytest.mark.parametrize(
  ("shape", "processes", "rows"),
  [
    ((1, 4, 1, 1), [0, 0, 1, 1], {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
    (
      (1, 2, 2, 1),
      [0, 1, 0, 1],
      {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]},
    ),  # hosts are squares of a slice
    (
      (1, 1, 2, 2),
      [0, 1, 2, 3],
      {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 3: [4, 5, 6, 7]},
    ),  # tensor across
    ((1, 1, 1, 4), [0, 0, 1, 1], {0: list(range(8)), 1: list(range(8))}),
  ],
)
def test_a_process_brings_the_rows_that_its_devices_hold(shape, processes, rows):
  mesh = pod_mesh(shape, processes)
  for process, expected in rows.items():
    with mock.patch.object(jax, "process_index", return_value=process):
      assert sharding.own_rows(mesh, 8).tolist() == expected
  with pytest.raises(
    ValueError, match=r"batch: 7 rows must be divisible by the mesh's slice \* data \* fs"
  ):
    sharding.own_rows(mesh if shape[:2] != (1, 1) else pod_mesh((1, 1, 2, 1), [0, 1]), 7)


def test_rows_of_shards_that_are_no_neighbours_are_placed_each_on_its_own():
  mesh = pod_mesh((1, 2, 2, 1), [0, 1, 0, 1])
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
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  for rows, shard_rows in ((8, 2), (6, 6)):
    array = np.arange(rows * 3).reshape(rows, 3)
    placed = sharding.place_rows(mesh, (array,))[0]
    np.testing.assert_array_equal(placed, array)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(shard_rows, 3)}


def test_moments_lie_as_their_parameters_do():
  mesh, model = sharding.make_mesh(MeshConfig(1, 1, 4, 2)), tiny.make_model(TINY, VOCAB)
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


@pytest.mark.parametrize(("layout", "share"), [("tensor", 1 / 2), ("2d", 1 / 8)])
@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_decoding_weights_are_split_as_their_layout_says(how, layout, share):
  mesh = sharding.make_mesh(MeshConfig(1, 1, 4, 2))
  model = tiny.make_model(TINY, VOCAB, layers=how, decode_layout=layout)
  with jax.set_mesh(mesh):
    params = place(mesh, model, _model_params_tokens()[1])
    weights = jax.jit(functools.partial(models.decode_weights, model))(params)
  trained, layer = (
    tree["layers"][0] if how == "unroll" else tree["layers"] for tree in (params, weights)
  )
  held = lambda x: x.addressable_shards[0].data.size / x.size
  assert held(trained["mlp"]["w_up_DF"]) == 1 / 8
  assert held(layer["mlp"]["w_up_DF"]) == held(layer["attention"]["w_qkv_DGQK"]) == share
  # Unlike the trained table, the copy is split by vocabulary, in blocks of 256 tokens.
  table_VD = weights["embedding"]["token_VD"]
  assert table_VD.shape == (512, TINY.d_model) and held(table_VD) == share


@functools.cache
def _model_params_tokens():
  model = tiny.make_model(TINY, VOCAB)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: np.asarray(rng.normal(0, 0.3, x.shape), np.float32), models.param_shapes(model)
  )
  is_token_BL = np.arange(6)[None] >= rng.integers(0, 3, (8, 1))
  return model, params, rng.integers(0, VOCAB, (8, 6)).astype(np.int32), is_token_BL


def place(mesh, model, params):
  return jax.device_put(models.arrange(model, params), tree_shardings(mesh, model))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _loss_and_decode(model, params, token_BL, is_token_BL):
  """Gradient of a loss, and the logits of the last of three cached decode steps."""
  position_BL = models.positions_from_mask(is_token_BL)

  def loss(params):
    logits_BLV = models.apply(
      model, params, token_BL, segment_BL=is_token_BL.astype(jnp.int32), position_BL=position_BL
    )
    return jnp.sum(jnp.where(is_token_BL[:, :, None], jnp.sin(logits_BLV), 0.0))

  weights, cache = _prefill(model, params, token_BL, is_token_BL)
  return jax.value_and_grad(loss)(params), _decode(model, weights, cache, token_BL, is_token_BL)


def _prefill(model, params, token_BL, is_token_BL):
  weights = models.decode_weights(model, params)
  cache = models.init_cache(model, 8, 6)
  return weights, models.prefill(model, weights, token_BL[:, :3], is_token_BL[:, :3], cache)[1]


def _decode(model, weights, cache, token_BL, is_token_BL):
  position_BL = models.positions_from_mask(is_token_BL)

  def step(t, carry):
    _, cache = carry
    known_BT = is_token_BL & (jnp.arange(6) <= t)[None]
    fed = token_BL[:, t], position_BL[:, t], t, known_BT
    logits_BV, cache = models.decode_step(model, weights, *fed, cache)
    return logits_BV[:, : model.vocab_size], cache  # longer where the vocabulary is split

  empty_BV = jnp.zeros((8, model.vocab_size))
  return jax.lax.fori_loop(3, 6, step, (empty_BV, cache))[0]


@pytest.fixture(scope="module")
def one_device():
  return _loss_and_decode(*_model_params_tokens())


@pytest.mark.parametrize(
  "how, attention", [("unroll", "plain"), ("scan", "plain"), ("scan", "splash")]
)
def test_eight_devices_equal_one(one_device, how, attention):
  model, params, token_BL, is_token_BL = _model_params_tokens()
  model = tiny.make_model(TINY, VOCAB, layers=how, attention=attention)
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  with jax.set_mesh(mesh):
    params = place(mesh, model, params)
    batch = sharding.place_batch(mesh, (token_BL, is_token_BL))
    traced = _loss_and_decode.trace(model, params, *batch)
    assert ("pallas_call" in str(traced.jaxpr)) == (attention == "splash")
    result = traced.lower().compile()(params, *batch)
  expected, result = (stacking.relay(tree, stacking.stacked) for tree in (one_device, result))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), result, expected
  )
  w_qkv = stacking.stacked(params["layers"])["attention"]["w_qkv_DGQK"]
  assert w_qkv.addressable_shards[0].data.size * 4 == w_qkv.size


@pytest.mark.parametrize("layout", ["tensor", "2d"])
@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_a_decode_step_moves_no_weights(monkeypatch, one_device, how, layout):
  monkeypatch.setattr(constraints, "VOCAB_BLOCK", 10)  # 20 logits in place of 512
  _, params, token_BL, is_token_BL = _model_params_tokens()
  model = tiny.make_model(TINY, VOCAB, layers=how, decode_layout=layout)
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  with jax.set_mesh(mesh):
    params = place(mesh, model, params)
    batch = sharding.place_batch(mesh, (token_BL, is_token_BL))
    quick_jit = functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    weights, cache = quick_jit(_prefill)(model, params, *batch)
    compiled = quick_jit(_decode).lower(model, weights, cache, *batch).compile()
    logits_BV = compiled(weights, cache, *batch)
  np.testing.assert_allclose(logits_BV, one_device[1], atol=1e-5)
  collective = r"(?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
  moved = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]* {collective}\(", compiled.as_text())
  sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in moved]
  # On one of two tensor devices w_out_GRKD, the smallest matrix, has 2 * 4 * 32 elements; 8 rows of logits have 8 * 20.
  assert sizes and max(sizes) <= 8 * 20 < 2 * 4 * 32


def local_shapes(text: str, operation: str) -> set[tuple[int, ...]]:
  """Of a compiled program's results, a device's part; dimensions of size 1 left out."""
  found = re.findall(rf"= \w+\[([\d,]*)\][^ ]* {operation}\(", text)
  return {tuple(int(n) for n in dims.split(",") if n != "1") for dims in found if dims}


@pytest.fixture(scope="module")
def split_step():
  """Text of a loss and its gradient, compiled for fsdp=2, tensor=4: 4 rows of 8 columns, d=16, F=24, V=19."""
  changes = dict(d_model=16, num_kv_heads=4, layers="scan", remat="products")
  model, mesh = tiny.make_model(TINY, VOCAB, **changes), sharding.make_mesh(MeshConfig(1, 1, 2, 4))

  def loss(params, token_BL):
    column_BL = jnp.broadcast_to(jnp.arange(8), token_BL.shape)
    logits_BTV = models.apply(
      model,
      params,
      token_BL,
      segment_BL=jnp.ones_like(token_BL),
      position_BL=column_BL,
      dropout_rate=0.5,
      dropout_key_B=jax.random.split(jax.random.key(0), 4),
      window=(0, 7),
    )
    return jnp.sum(jnp.sin(logits_BTV))

  shardings = tree_shardings(mesh, model)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  params = jax.tree.map(place, models.param_shapes(model), shardings)
  token_BL = place(jax.ShapeDtypeStruct((4, 8), jnp.int32), sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, token_BL)
    return lowered.compile(compiler_options=QUICK).as_text()


def test_norms_are_computed_once_for_each_column(split_step):
  # Two of the eight columns each, and of the window's seven.
  assert local_shapes(split_step, "rsqrt") == {(2, 2)}


def test_dropout_is_drawn_once_for_each_column(split_step):
  words = set(re.findall(r"u32\[(\d+,\d+,8)\]", split_step))
  assert words == {"2,2,8"}


def test_products_are_computed_once(split_step):
  heads, mlp, logits = 4, 6, 5  # a quarter of 16, 24 and, rounded up, 19
  expected = {
    # Projections, and the gradients of their weights.
    *((16, 3 * heads), (16, heads), (heads, 16), (3 * heads, 16)),
    *((2, 8, 8), (2, 8, 4), (2, 4, 8)),  # attention: scores, and sums over them
    *((16, mlp), (mlp, 16)),
    *((14, logits), (14, 16), (logits, 16)),  # the window's 2 * 7 columns; what flows back
    (16, 16),  # what flows back into the 2 * 8 columns of a device
  }
  assert local_shapes(split_step, "dot") <= expected
  assert (14, logits) in local_shapes(split_step, "dot")


def test_masks_are_not_sent(split_step):
  assert not re.search(r"= pred\[[\d,]*8,8\]\S* all-gather\(", split_step)


def test_only_large_networks_on_a_cpu_want_the_order_of_least_memory():
  on = lambda platform: types.SimpleNamespace(
    devices=np.array([types.SimpleNamespace(platform=platform)])
  )
  half = {"w": jax.ShapeDtypeStruct((sharding.LARGE // 8,), jnp.float32)}
  (option,) = sharding.step_options(on("cpu"), half, half).items()
  assert (
    sharding.step_options(on("cpu"), half) == sharding.step_options(on("tpu"), half, half) == {}
  )
  double = jax.jit(
    lambda x: 2 * x, compiler_options=dict([option])
  )  # refused if XLA did not know it
  assert double(jnp.float32(3)) == 6
  with pytest.raises(Exception, match="no_such_order"):
    jax.jit(lambda x: 2 * x, compiler_options={option[0]: "no_such_order"})(jnp.float32(3))
