"""Which of a layer's weights are used in the compute dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.models import layers


def test_a_layers_norms_stay_float32_wherever_they_are_nested():
  ones = np.ones(4, np.float32)
  layer = {
    "attention": {"w_out_GRKD": ones, "b_out_D": ones, "q_norm": {"scale_D": ones}},
    "mlp_norm": {"scale_D": ones, "bias_D": ones},
  }
  dtypes = jax.tree.map(lambda x: x.dtype.name, layers.cast(layer, jnp.bfloat16))
  assert dtypes == {
    "attention": {
      "w_out_GRKD": "bfloat16",
      "b_out_D": "bfloat16",
      "q_norm": {"scale_D": "float32"},
    },
    "mlp_norm": {"scale_D": "float32", "bias_D": "float32"},
  }


def test_a_weight_whose_name_says_nothing_is_not_cast_in_silence():
  with pytest.raises(ValueError, match="'gain_D'.* must start with w_ or b_, or be in FLOAT32"):
    layers.cast({"mlp": {"gain_D": np.ones(4, np.float32)}}, jnp.bfloat16)
