"""Scalar heads, initialisation, and the shapes of the largest model of the paper."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.parallel import stacking
from tests import tiny

VOCAB = 19
TOKEN_BL = np.random.default_rng(0).integers(0, VOCAB, (2, 6)).astype(np.int32)


QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time of tiny programs
init = jax.jit(models.init_params, static_argnums=0, compiler_options=QUICK)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def score(model, params):
  return models.apply(
    model,
    params,
    TOKEN_BL,
    segment_BL=np.ones((2, 6), np.int32),
    position_BL=np.tile(np.arange(6, dtype=np.int32), (2, 1)),
  )


def test_details_17_shift_bias_lowers_every_score(gpt2, make):
  model, params = make(gpt2, "scalar", num_layers=1)
  before = score(model, params)
  shifted = models.shift_bias(params, before.mean())
  np.testing.assert_allclose(score(model, shifted), before - before.mean(), atol=1e-5)
  assert abs(score(model, shifted).mean()) < 1e-5
  np.testing.assert_allclose(score(model, params), before)  # the old ones are untouched


def test_reward_model_starts_from_a_language_model(llama, make):
  reward, fresh = make(llama, "scalar")
  _, lm_params = make(llama)
  params = models.scalar_params_from_lm(lm_params, fresh)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  assert params["head"] is fresh["head"]  # and the language model's untied head is gone
  for name in ("embedding", "layers", "final_norm"):
    assert params[name] is lm_params[name]
  _, smaller = make(dataclasses.replace(llama, num_layers=2))
  with pytest.raises(ValueError, match="trunk must have the reward model's shapes"):
    models.scalar_params_from_lm(smaller, fresh)


def test_details_14_initialisation(gpt2):
  cfg = dataclasses.replace(
    gpt2, d_model=256, d_mlp=1024, num_layers=2, max_length=64, init_std=0.02
  )
  params = init(tiny.make_model(cfg, 512, "scalar"), jax.random.key(0))
  embedding, layer = params["embedding"], stacking.stacked(params["layers"])
  std = lambda x: float(np.std(x))
  assert std(embedding["token_VD"]) == pytest.approx(0.02, rel=0.02)
  assert std(embedding["position_TD"]) == pytest.approx(0.01, rel=0.05)
  assert std(layer["attention"]["w_qkv_DGQK"]) == pytest.approx(0.02, rel=0.02)
  assert std(layer["mlp"]["w_up_DF"]) == pytest.approx(0.02, rel=0.02)
  for residual in (layer["attention"]["w_out_GRKD"], layer["mlp"]["w_down_FD"]):
    assert std(residual) == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.02)
  assert not np.any(layer["attention"]["b_qkv_GQK"]) and not np.any(params["head"]["bias"])
  assert np.all(layer["attention_norm"]["scale_D"] == 1)
  # Var = 1 / (d + 1); 256 draws: 9% is one standard error of the variance.
  assert np.var(params["head"]["w_D"]) == pytest.approx(1 / 257, rel=0.3)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_parameters_depend_on_the_key_only(llama):
  model = tiny.make_model(llama, VOCAB, "lm")
  one, same, other = (init(model, jax.random.key(seed)) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert np.any(one["head"]["w_VD"] != other["head"]["w_VD"])
  assert np.any(one["head"]["w_VD"] != one["embedding"]["token_VD"])  # no draw is used twice


def test_axes_name_every_dimension(cfg):
  for head in ("lm", "scalar"):
    model = tiny.make_model(cfg, VOCAB, head)
    axes, shapes = models.param_axes(model), models.param_shapes(model)
    jax.tree.map(
      lambda names, leaf: np.testing.assert_equal(len(names), leaf.ndim),
      axes,
      shapes,
      is_leaf=lambda node: isinstance(node, tuple),
    )


def test_model_is_hashable_by_value(gpt2):
  one, same = (tiny.make_model(gpt2, VOCAB, "lm") for _ in range(2))
  assert one == same and hash(one) == hash(same)
  assert one != tiny.make_model(gpt2, VOCAB, "scalar")
