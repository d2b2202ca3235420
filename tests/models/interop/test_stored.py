"""An adapter that is merged tensor by tensor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.models import adapters, interop
from instructjax.models.interop import stored as interop_stored
from instructjax.models.interop import tensor_table
from tests import tiny

# GPT-2's matrices lie the other way round.
GPT2 = dict(position="learned", parallel_residual=False, rotary_dim=0)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize(
  "cfg", [tiny.FAMILIES["qwen3"], dataclasses.replace(tiny.FAMILIES["gpt_neox"], **GPT2)]
)
def test_a_merged_adapter_is_what_adapters_merge(cfg, head):
  model = tiny.make_model(cfg, 19, head).clone(adapter=tiny.adapter(rank=2, alpha=3.0))
  rng = np.random.default_rng(2)
  noise = lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32)
  params = jax.tree.map(noise, models.param_shapes(model))
  trained = jax.tree.map(noise, adapters.trained_shapes(model))
  bare = model.clone(adapter=None)
  merged = interop_stored.of_params(bare, adapters.merge(model, params, trained))
  streamed = interop.with_adapter(interop_stored.of_params(bare, params), model, trained)
  assert streamed.score_bias == pytest.approx(merged.score_bias)
  for tensor in tensor_table.tensors(bare):
    np.testing.assert_allclose(
      streamed.read(tensor), merged.read(tensor), rtol=1e-6, atol=1e-6, err_msg=tensor.name
    )
