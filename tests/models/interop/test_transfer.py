"""Every number of a model goes to one place in Hugging Face's tensors and comes back from there."""

import dataclasses
import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.models.interop import tensor_table, transfer
from instructjax.parallel import sharding
from tests import tiny

VOCAB = 19


def assert_trees_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(params=["gpt2", "gpt2_untied", "llama", "llama_biases", "qwen2", *tiny.FAMILIES])
def cfg(request, gpt2, llama):
  change = dataclasses.replace
  return {
    "gpt2": gpt2,
    "gpt2_untied": change(gpt2, tie_embeddings=False),
    "llama": llama,
    "llama_biases": change(llama, use_bias=True, head_dim=6),
    "qwen2": change(llama, qkv_bias=True, tie_embeddings=True),
    **tiny.FAMILIES,
  }[request.param]


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_round_trip_is_bit_for_bit(cfg, head, make, make_source, one_device):
  model, params = make(cfg, head)
  if head == "scalar":
    params["head"]["bias"] = jnp.zeros(())
  source, _, _ = make_source(model, params)
  assert_trees_equal(transfer.load_params(source, model, one_device(model)), params)


def test_every_number_is_exported_once(cfg):
  model = tiny.make_model(cfg, VOCAB, "lm")
  shapes = models.param_shapes(model)
  leaves, treedef = jax.tree.flatten(shapes)
  offsets = np.cumsum([0, *(leaf.size for leaf in leaves)])
  numbers = [
    np.arange(start, start + leaf.size, dtype=np.float32).reshape(leaf.shape)
    for start, leaf in zip(offsets, leaves)
  ]
  params = jax.tree.unflatten(treedef, numbers)
  exported = [(shape, make()) for _, shape, make in transfer.named_tensors(model, params)]
  assert all(shape == array.shape for shape, array in exported)
  every = np.sort(np.concatenate([array.ravel() for _, array in exported]))
  np.testing.assert_array_equal(every, np.arange(offsets[-1]))


def test_queries_keys_and_values_by_hand(llama, make):
  """Rows of q_proj are heads in order; head h shares key/value head h // 2 of the two there are."""
  model, params = make(llama)
  exported = {name: made() for name, _, made in transfer.named_tensors(model, params)}
  fused = np.asarray(params["layers"][1]["attention"]["w_qkv_DGQK"])
  q = exported["model.layers.1.self_attn.q_proj.weight"]
  k = exported["model.layers.1.self_attn.k_proj.weight"]
  v = exported["model.layers.1.self_attn.v_proj.weight"]
  assert (q.shape, k.shape, v.shape) == ((16, 16), (8, 16), (8, 16))
  for head in range(4):
    np.testing.assert_array_equal(q[4 * head : 4 * head + 4].T, fused[:, head // 2, head % 2])
  for head in range(2):
    np.testing.assert_array_equal(k[4 * head : 4 * head + 4].T, fused[:, head, 2])
    np.testing.assert_array_equal(v[4 * head : 4 * head + 4].T, fused[:, head, 3])


def test_sharded_equals_unsharded_and_reads_once(mesh, llama, make, make_source):
  model, params = make(llama)
  source, tensors, names_read = make_source(model, params)
  shardings, _ = models.param_shardings(mesh, model)
  loaded = transfer.load_params(source, model, shardings)
  assert sorted(names_read) == sorted(tensors)
  assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
  assert_trees_equal(loaded, params)


def test_a_process_reads_only_what_its_shards_hold(llama, make, make_source):
  """A sharding over layers stands in for other hosts: here they are on devices that are ours too."""
  model, params = make(llama)
  source, _, names_read = make_source(model, params)
  parts = [t for t in tensor_table.tensors(model) if t.param == "layers/mlp/w_down_FD"]

  class SecondLayerOnly:
    is_fully_addressable = True

    def addressable_devices_indices_map(self, shape):
      return {"device": (slice(1, 2), slice(0, shape[1]), slice(4, 8))}

  with pytest.raises(TypeError):  # no real sharding to make an array of
    transfer._assemble(source, parts, (3, 24, 16), SecondLayerOnly())
  assert names_read == ["model.layers.1.mlp.down_proj.weight"]


def test_host_memory_is_the_shards_and_one_tensor(llama, one_device):
  cfg = dataclasses.replace(llama, num_layers=6, d_model=128, d_mlp=256)
  model = tiny.make_model(cfg, 512, "lm")
  tensors = {tensor.name: tensor.shape for tensor in tensor_table.tensors(model)}
  read_rows = lambda name, start, stop: np.ones((stop - start, *tensors[name][1:]), "f")
  source = transfer.Source("weights", {}, tensors, read_rows, (), ())
  places = one_device(model)
  transfer.load_params(source, model, places)  # compiles and imports whatever is done once
  total = sum(4 * leaf.size for leaf in jax.tree.leaves(models.param_shapes(model)))
  largest_tensor = 4 * 512 * 128
  tracemalloc.start()
  params = transfer.load_params(source, model, places)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < total + 1.3 * largest_tensor, "copies of shards, or of tensors, are kept"
  assert peak > total, "the CPU backend copied the shards: are they aligned?"
  del params


# --- what files hold besides, and what they lack ----------------------------------------------------


def edited(source, **changes):
  """The source with tensors added or (None) taken away; dots spelled __."""
  shapes = dict(source.shapes)
  extra = {}
  for name, value in changes.items():
    name = name.replace("__", ".")
    shapes.pop(name, None)
    if value is not None:
      shapes[name], extra[name] = value.shape, value

  def read_rows(name, start, stop):
    return extra[name][start:stop].copy() if name in extra else source.read_rows(name, start, stop)

  return dataclasses.replace(source, shapes=shapes, read_rows=read_rows)


def renamed(source, old, new):
  there = {name.replace(old, new, 1): name for name in source.shapes}
  return dataclasses.replace(
    source,
    shapes={name: source.shapes[was] for name, was in there.items()},
    read_rows=lambda name, start, stop: source.read_rows(there[name], start, stop),
  )


def test_names_without_prefix_and_buffers(gpt2, llama, make, make_source, one_device):
  for cfg, prefix in ((gpt2, "transformer."), (llama, "model.")):
    model, params = make(cfg)
    source = renamed(make_source(model, params)[0], prefix, "")
    one = np.ones((1, 1, 4, 4), np.float32)
    source = edited(
      source,
      h__0__attn__bias=one,
      h__2__attn__masked_bias=one,
      layers__0__self_attn__rotary_emb__inv_freq=one,
    )
    assert_trees_equal(transfer.load_params(source, model, one_device(model)), params)


def test_padded_vocabulary_is_dropped(llama, make, make_source, one_device, monkeypatch):
  lines = []
  monkeypatch.setattr(transfer.logging, "warning", lambda text, *args: lines.append(text % args))
  model, params = make(llama)
  source, tensors, _ = make_source(model, params)
  table = lambda name: np.pad(tensors[name], ((0, 5), (0, 0)), constant_values=np.nan)
  padded = edited(
    source,
    model__embed_tokens__weight=table("model.embed_tokens.weight"),
    lm_head__weight=table("lm_head.weight"),
  )
  assert_trees_equal(transfer.load_params(padded, model, one_device(model)), params)
  assert lines == ["weights: 5 rows of the embedding past the vocabulary dropped"]


def test_tied_copy_of_the_head(gpt2, make, make_source, one_device):
  model, params = make(gpt2)
  source, tensors, _ = make_source(model, params)
  table = tensors["transformer.wte.weight"]
  copied = edited(source, lm_head__weight=table)
  assert_trees_equal(transfer.load_params(copied, model, one_device(model)), params)
  with pytest.raises(
    ValueError, match="weights: tensor lm_head.weight differs from transformer.wte.weight"
  ):
    transfer.load_params(edited(source, lm_head__weight=table + 1), model, one_device(model))


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"model__layers__2__mlp__up_proj__weight": None},
      "weights lacks tensor model.layers.2.mlp.up_proj.weight; the config must fit the weights",
    ),
    (
      {"model__norm__weight": None, "lm_head__weight": None},
      "weights lacks tensor model.norm.weight and 1 more; the config must fit the weights",
    ),
    (
      {"model__layers__3__mlp__up_proj__weight": np.zeros((24, 16))},
      "weights has, and this model has no place for, tensor model.layers.3.mlp.up_proj.weight;"
      " the config must fit the weights",
    ),
    (
      {"model__layers__0__self_attn__q_proj__bias": np.zeros(16)},
      "weights has, and this model has no place for, tensor model.layers.0.self_attn.q_proj.bias;"
      " the config must fit the weights",
    ),
    (
      {"model__layers__0__mlp__up_proj__weight": np.zeros((16, 24))},
      "weights: tensor model.layers.0.mlp.up_proj.weight has shape [16, 24], and the model needs"
      " [24, 16]",
    ),
    (
      {"model__layers__0__mlp__up_proj__weight": np.zeros((25, 16))},
      "weights: tensor model.layers.0.mlp.up_proj.weight has shape [25, 16], and the model needs"
      " [24, 16]",
    ),
    (
      {"model__embed_tokens__weight": np.zeros((18, 16))},
      "weights: tensor model.embed_tokens.weight has shape [18, 16], and the model needs [19, 16]"
      " or more rows",
    ),
    (
      {"lm_head__weight": np.zeros((19, 17))},
      "weights: tensor lm_head.weight has shape [19, 17], and the model needs [19, 16] or more rows",
    ),
  ],
)
def test_tensors_that_do_not_fit(changes, message, llama, make, make_source, one_device):
  model, params = make(llama)
  source, _, names_read = make_source(model, params)
  with pytest.raises(ValueError) as error:
    transfer.load_params(edited(source, **changes), model, one_device(model))
  assert str(error.value) == message
  assert names_read == [], "refused before anything is read"


# --- scalar heads ---------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def scores(model, params):
  token_BL = jnp.asarray([[3, 1, 4, 1, 5]])
  ones_BL = jnp.ones_like(token_BL)
  position_BL = jnp.arange(5)[None]
  return models.apply(model, params, token_BL, segment_BL=ones_BL, position_BL=position_BL)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scalar_head_keeps_its_scores(family, request, make, make_source, one_device):
  model, params = make(request.getfixturevalue(family), "scalar", num_layers=1)
  params["head"]["bias"] = jnp.float32(0.7)
  source, tensors, _ = make_source(model, params)
  embedding = tensors["transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"]
  assert embedding.shape == (VOCAB + 1, 16) and not embedding[-1].any(), "the pad token"
  assert tensors["score.weight"].shape == (1, 16)
  loaded = transfer.load_params(source, model, one_device(model))
  in_the_tensors = 0.7 if family == "gpt2" else 0.0
  np.testing.assert_allclose(
    scores(model, loaded), scores(model, params) - 0.7 + in_the_tensors, rtol=1e-5, atol=1e-5
  )
  biased = dataclasses.replace(source, config={**source.config, "instructjax_score_bias": 0.25})
  again = transfer.load_params(biased, model, one_device(model))
  assert again["head"]["bias"].dtype == jnp.float32
  np.testing.assert_allclose(
    scores(model, again), scores(model, loaded) + 0.25, rtol=1e-5, atol=1e-5
  )


def test_a_reward_model_has_no_language_head(gpt2, make, make_source, one_device):
  model, params = make(gpt2, "scalar")
  source = edited(make_source(model, params)[0], lm_head__weight=np.zeros((VOCAB, 16)))
  with pytest.raises(ValueError, match="no place for, tensor lm_head.weight"):
    transfer.load_params(source, model, one_device(model))


def test_exported_pad_row_is_dropped_silently(llama, make, make_source, one_device, monkeypatch):
  monkeypatch.setattr(transfer.logging, "warning", lambda *_: pytest.fail("said what it need not"))
  model, params = make(llama, "scalar")
  source, _, _ = make_source(model, params)
  transfer.load_params(source, model, one_device(model))


def test_export_from_a_mesh(llama, make):
  """Sharded parameters give the same tensors."""
  model, params = make(llama)
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  placed = jax.device_put(params, models.param_shardings(mesh, model)[0])
  for (name, _, mine), (_, _, theirs) in zip(
    transfer.named_tensors(model, placed), transfer.named_tensors(model, params)
  ):
    np.testing.assert_array_equal(mine(), theirs(), err_msg=name)
