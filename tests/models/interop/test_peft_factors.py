"""Tests of models/interop/peft_factors.py; the values of all factors are compared in models/test_adapters.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.models import adapters
from instructjax.models.interop import peft_factors
from tests import tiny

ALL = ("q", "k", "v", "out", "gate", "up", "down")


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("network", [tiny.GPT2, tiny.LLAMA])
def test_what_is_written_is_read(network, layers):
  cfg = tiny.adapter(rank=3, alpha=1.0, targets=ALL)
  model = tiny.make_model(network, 11, layers=layers).clone(adapter=cfg)
  rng = np.random.default_rng(0)
  noise = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  trained = jax.tree.map(noise, adapters.trained_shapes(model))
  written = {f.name: (f, array) for f, array in peft_factors.from_params(model, trained)}
  assert all(array.shape == f.shape for f, array in written.values())
  read = peft_factors.to_params(model, lambda factor: written[factor.name][1])
  jax.tree.map(np.testing.assert_array_equal, read, trained["layers"])


def test_names_and_shapes_are_pefts():
  cfg = tiny.adapter(rank=3, alpha=1.0, targets=("k", "down"))
  model = tiny.make_model(tiny.LLAMA, 11).clone(adapter=cfg)
  found = {factor.name: factor.shape for factor in peft_factors.factors(model)}
  net = tiny.LLAMA
  stem = "model.layers.1."
  assert found[stem + "self_attn.k_proj.lora_A.weight"] == (3, net.d_model)
  assert found[stem + "self_attn.k_proj.lora_B.weight"] == (net.num_kv_heads * net.head_dim, 3)
  assert found[stem + "mlp.down_proj.lora_A.weight"] == (3, net.d_mlp)
  assert found[stem + "mlp.down_proj.lora_B.weight"] == (net.d_model, 3)
  assert len(found) == 4 * net.num_layers
  assert peft_factors.module_of("model.layers.1.self_attn.k_proj.weight") == "k_proj"
