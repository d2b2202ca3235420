"""Tests of models/adapters.py: against peft's recorded numbers, and what holds by definition."""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig, NetworkConfig
from instructjax.core.structs import PackedBatch
from instructjax.models import adapters, decoding, interop, transformer
from instructjax.models.interop import peft_factors
from instructjax.models.interop.source import Source
from instructjax.parallel import sharding
from instructjax.train import supervised
from tests import tiny

VOCAB = 19
ALL = ("q", "k", "v", "out", "gate", "up", "down")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "adapters.json"
RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
MATRICES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "gate_proj": "gate"}
MATRICES |= {"up_proj": "up", "down_proj": "down"}


def wave(name: str, shape) -> np.ndarray:
  """The numbers that tests/golden/adapters_by_peft.py fills a tensor with."""
  phase = zlib.crc32(name.encode()) % 1000
  wave = np.sin(phase + 1.7 * np.arange(np.prod(shape)), dtype=np.float64).reshape(shape)
  is_norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
  return (1 + 0.1 * wave if is_norm else 0.2 * wave).astype(np.float32)


def adapted(network: NetworkConfig, head="lm", layers="unroll", **changes):
  """A tiny adapted model, its base and an adapter, all random."""
  cfg = tiny.adapter(**(dict(rank=2, alpha=3.0) | changes))
  model = tiny.make_model(network, VOCAB, head, layers=layers).clone(adapter=cfg)
  rng = np.random.default_rng(0)
  noise = lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32)
  full = jax.tree.map(noise, models.param_shapes(model))
  return model, adapters.base_of(model, full), jax.tree.map(noise, adapters.trained_shapes(model))


def tokens():
  token_BL = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 7)), jnp.int32)
  return token_BL, dict(
    segment_BL=jnp.ones_like(token_BL), position_BL=jnp.tile(jnp.arange(7), (2, 1))
  )


apply = jax.jit(transformer.apply, static_argnums=0)


@pytest.mark.parametrize(
  "name, layers", [("gpt2", "scan"), ("llama", "unroll"), ("llama, q and v only", "scan")]
)
def test_loss_and_gradients_are_pefts(name, layers):
  case = RECORDED["models"][name]
  targets = ALL if "c_attn" in case["targets"] else tuple(MATRICES[t] for t in case["targets"])
  found = interop.hf_config.model_config(case["config"], name)
  cfg = tiny.adapter(rank=RECORDED["rank"], alpha=RECORDED["alpha"], targets=targets)
  model = tiny.make_model(found.cfg, found.vocab_size, layers=layers).clone(adapter=cfg)
  shapes = {t.name: t.shape for t in interop.tensor_table.tensors(model)}
  read = lambda tensor, start, stop: wave(tensor, shapes[tensor])[start:stop]
  source = Source(pathlib.Path(name), case["config"], shapes, read, (), ())
  places = jax.tree.map(
    lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), models.param_shapes(model)
  )
  base = interop.load_params(source, model, places)
  factor = lambda f: wave(f.name, f.shape)
  trained = jax.tree.map(jnp.asarray, {"layers": peft_factors.to_params(model, factor)})
  token_BL = jnp.asarray((np.arange(24) * 7 % 39).reshape(2, 12), jnp.int32)
  weight_BL = jnp.ones(token_BL.shape).at[:, 0].set(0)
  position_BL = jnp.tile(jnp.arange(12), (2, 1))
  batch = PackedBatch(token_BL, jnp.ones_like(token_BL), position_BL, weight_BL)

  def loss(trained):
    total, weight = supervised.lm_loss_sums(model, adapters.join(model, base, trained), batch)
    return total / weight

  value, grads = jax.jit(jax.value_and_grad(loss))(trained)
  assert float(value) == pytest.approx(case["loss"], rel=1e-5)
  theirs = {f.name: array for f, array in peft_factors.from_params(model, grads)}
  assert theirs.keys() == case["gradients"].keys()
  for key, array in theirs.items():
    wanted = case["gradients"][key]
    assert np.linalg.norm(array) == pytest.approx(wanted["norm"], rel=1e-5), key
    np.testing.assert_allclose(array.reshape(-1)[:6], wanted["first"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "family, head, layers",
  [("gpt_neox", "lm", "scan"), ("gemma3", "scalar", "scan"), ("qwen3", "lm", "unroll")],
)
def test_merged_weights_compute_the_same(family, head, layers):
  model, base, trained = adapted(tiny.FAMILIES[family], head, layers)
  token_BL, inputs = tokens()
  joined = apply(model, adapters.join(model, base, trained), token_BL, **inputs)
  merged = apply(model, adapters.merge(model, base, trained), token_BL, **inputs)
  np.testing.assert_allclose(joined, merged, rtol=2e-5, atol=2e-5)
  plain = adapters.merge(model, base, jax.tree.map(jnp.zeros_like, trained))
  assert jax.tree.structure(plain) == jax.tree.structure(models.param_shapes(model))
  assert not np.allclose(joined, apply(model, plain, token_BL, **inputs))


def test_a_fresh_adapter_is_nothing_and_is_drawn_as_pefts(llama):
  model, base, _ = adapted(llama, targets=("k", "gate", "out"))
  fresh = adapters.init(model, jax.random.key(0))
  token_BL, inputs = tokens()
  with_it = apply(model, adapters.join(model, base, fresh), token_BL, **inputs)
  np.testing.assert_array_equal(with_it, apply(model, base, token_BL, **inputs))
  assert fresh["layers"]["attention"].keys() == {"k", "out"}
  # Uniform within 1 / sqrt(inputs), and different in every layer and matrix.
  drawn = [layer for x in jax.tree.leaves(fresh) if np.any(x) for layer in x]
  assert len(drawn) == 3 * llama.num_layers
  for leaf in drawn:
    bound = (leaf.size / leaf.shape[-1]) ** -0.5
    assert 0.8 * bound < np.abs(leaf).max() <= bound
  assert len({float(leaf.ravel()[0]) for leaf in drawn}) == len(drawn)


@pytest.mark.parametrize("family, layers", [("gpt_neox", "scan"), ("gemma3", "unroll")])
def test_cached_decoding_reads_the_adapter(family, layers):
  model, base, trained = adapted(tiny.FAMILIES[family], layers=layers)
  params = adapters.join(model, base, trained)
  token_BL, inputs = tokens()
  logits = apply(model, params, token_BL, **inputs)

  @jax.jit
  def decode(params):
    weights = decoding.decode_weights(model, params)
    is_slot = jnp.ones(token_BL.shape, bool)
    cache = decoding.init_cache(model, 2, 7)
    first, cache = decoding.prefill(model, weights, token_BL[:, :6], is_slot[:, :6], cache)
    last, _ = decoding.decode_step(
      model, weights, token_BL[:, 6], jnp.full(2, 6), jnp.int32(6), is_slot, cache
    )
    return first, last

  first, last = decode(params)
  np.testing.assert_allclose(first, logits[:, 5], rtol=2e-4, atol=2e-4)
  np.testing.assert_allclose(last, logits[:, 6], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_axes_are_those_of_the_adapted_weights(cfg, layers):
  model, base, trained = adapted(cfg, "scalar", layers)
  is_names = lambda node: isinstance(node, tuple)
  axes = adapters.trained_axes(model)
  assert jax.tree.map(len, axes, is_leaf=is_names) == jax.tree.map(jnp.ndim, trained)
  joined = adapters.join(model, base, trained)
  of_joined = adapters.base_axes(joined, transformer.param_axes(model))
  assert jax.tree.map(len, of_joined, is_leaf=is_names) == jax.tree.map(jnp.ndim, joined)
  assert axes["layers"]["mlp"]["down"] == {
    "w_a_FE": ("layers", "mlp", "rank"),
    "w_b_ED": ("layers", "rank", "embed"),
  }


def test_a_mesh_computes_what_one_device_does(llama):
  model, base, trained = adapted(llama, layers="scan")
  token_BL, inputs = tokens()
  loss = lambda trained, base: jnp.sum(
    jnp.square(apply(model, adapters.join(model, base, trained), token_BL, **inputs))
  )
  wanted = jax.jit(jax.grad(loss))(trained, base)
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=2, tensor=2), jax.devices()[:4])
  places, _ = adapters.trained_shardings(mesh, model)
  (of_base,) = adapters.base_shardings(mesh, model)
  with jax.set_mesh(mesh):
    found = jax.jit(jax.grad(loss), in_shardings=(places, of_base), out_shardings=places)(
      jax.device_put(trained, places), jax.device_put(base, of_base)
    )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found, wanted)


def test_without_an_adapter_everything_passes(llama):
  model = tiny.make_model(llama, VOCAB)
  params = models.init_params(model, jax.random.key(0))
  assert adapters.join(model, None, params) is params
  assert adapters.joined(model, (), params) is params
  assert adapters.trained_axes(model) == transformer.param_axes(model)
  with pytest.raises(ValueError, match="no adapter"):
    model.require_adapter()


@pytest.mark.parametrize("family, layers", [("gpt2", "scan"), ("llama", "unroll")])
def test_a_base_in_8_bits_is_near_the_base(request, family, layers):
  cfg = request.getfixturevalue(family)
  model, base, trained = adapted(cfg, layers=layers, base="int8")
  rounded = adapters.freeze(model, base)
  layer = rounded["layers"] if layers == "scan" else rounded["layers"][1]
  whole = base["layers"] if layers == "scan" else base["layers"][1]
  for name, weight, outputs in (
    ("attention", "w_qkv_DGQK", 3), ("attention", "w_out_GRKD", 1), ("mlp", "w_down_FD", 1)
  ):  # fmt: skip
    found, wanted = layer[name][weight], whole[name][weight]
    assert found.values.dtype == jnp.int8 and found.shape == wanted.shape
    # A scale for each output of each layer; no number is off by more than half of it.
    stack = cfg.num_layers if layers == "scan" else 1
    assert found.scale.size == stack * np.prod(wanted.shape[-outputs:])
    inputs = tuple(range(layers == "scan", wanted.ndim - outputs))
    scale = np.expand_dims(found.scale, inputs)
    assert np.all(np.abs(found.values * scale - wanted) <= 0.501 * scale)
    assert np.all(np.abs(found.values).max(axis=inputs) == 127)
  token_BL, inputs = tokens()
  near = apply(model, adapters.join(model, rounded, trained), token_BL, **inputs)
  exact = apply(model, adapters.join(model, base, trained), token_BL, **inputs)
  difference = np.abs(near - exact).max()
  assert 0 < difference < 0.1 * np.abs(exact).max()
  # The layout on a mesh has the same tree.
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  (places,) = adapters.base_shardings(mesh, model)
  assert jax.tree.structure(places) == jax.tree.structure(rounded)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_dropout_drops_what_the_factors_read(llama, layers):
  model, base, trained = adapted(llama, layers=layers, dropout=0.5)
  token_BL, inputs = tokens()
  run = jax.jit(
    lambda key: transformer.apply(
      model, adapters.join(model, base, trained, key), token_BL, **inputs
    )
  )
  drawn = [run(jax.random.split(jax.random.key(seed), 2)) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert not np.allclose(drawn[0], drawn[2])
  none = jax.tree.map(jnp.zeros_like, trained)
  joined = adapters.join(model, base, none, jax.random.split(jax.random.key(0), 2))
  plain = apply(
    model, base, token_BL, **inputs
  )  # only the adapter's input is dropped, not the base's
  np.testing.assert_allclose(apply(model, joined, token_BL, **inputs), plain, rtol=1e-5, atol=1e-5)
  unkeyed = apply(model, adapters.join(model, base, trained), token_BL, **inputs)
  still = adapted(llama, layers=layers)[0]
  expected = apply(still, adapters.join(still, base, trained), token_BL, **inputs)
  np.testing.assert_array_equal(unkeyed, expected)
