"""The call that cuDNN serves, by XLA on this machine, against plain attention: outputs, gradients, all masks.

And a network's gradient, lowered for a GPU that is not there: JAX's checks of shapes and types are made on the way.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo

from instructjax.models import cudnn, layers, transformer
from tests import tiny

# Row 0 packs sequences of 5 and 4 tokens and ends in pads; row 1 is one left-padded sequence.
SEGMENT_BL = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10], np.int32)
POSITION_BL = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [0, 0, *range(10)]], np.int32)
WINDOW = 3


def draw(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("banded", [False, True])
def test_it_computes_what_plain_attention_computes(banded):
  """Two key/value heads with three query heads each, so that a wrong order of heads would show."""
  cfg = dataclasses.replace(tiny.GPT2, attention_window=WINDOW)
  mask_BLL = layers.attention_masks(jnp.asarray(SEGMENT_BL), jnp.asarray(POSITION_BL), cfg)[banded]
  qkv = draw(2, 12, 2, 3, 8), draw(2, 2, 12, 8), 2 * draw(2, 2, 12, 8)

  @functools.partial(jax.jit, static_argnums=0)
  def gradients_and_output(attend, qkv):
    def total(qkv):
      x_BTGRK = attend(*qkv, mask_BLL)
      return jnp.sum(jnp.sin(x_BTGRK)), x_BTGRK

    return jax.grad(total, has_aux=True)(qkv)

  expected = gradients_and_output(layers.attend, qkv)
  got = gradients_and_output(functools.partial(cudnn.attend, implementation="xla"), qkv)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(got[1][SEGMENT_BL == 0], 0.0)


def test_the_setting_reaches_every_layer(gpt2, make, monkeypatch):
  """Each layer's attention is the call for cuDNN, with its own mask: banded and dense ones by turns."""
  masks = []

  def attend(*qkv):
    masks.append(qkv[-1])
    return layers.attend(*qkv)

  monkeypatch.setattr(cudnn, "attend", attend)
  changes = dict(attention_window=WINDOW, layer_pattern="LG")
  plain, params = make(gpt2, "scalar", **changes)
  model, _ = make(gpt2, "scalar", **changes, attention="cudnn")
  inputs = dict(segment_BL=jnp.asarray(SEGMENT_BL), position_BL=jnp.asarray(POSITION_BL))
  token_BL = jnp.ones((2, 12), jnp.int32)
  got = transformer.apply(model, params, token_BL, **inputs)
  np.testing.assert_array_equal(got, transformer.apply(plain, params, token_BL, **inputs))
  banded, dense = masks[:2]
  assert int(banded.sum()) < int(dense.sum()) and len(masks) == gpt2.num_layers


@pytest.mark.parametrize(
  "layers, remat, calls", [("unroll", "none", (2, 2)), ("scan", "products", (2, 1))]
)
def test_a_network_is_lowered_to_cudnns_calls(gpt2, make, monkeypatch, layers, remat, calls):
  """Forward and backward kernels, two query heads for each key; with remat, the forward one in both passes."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda at_least: True)
  monkeypatch.setattr(
    fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda which: False
  )
  changes = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
  execution = dict(attention="cudnn", dtype="bfloat16", layers=layers, remat=remat)
  model, params = make(gpt2, "scalar", **changes, **execution)

  def total(params):
    score_BL = transformer.apply(
      model,
      params,
      jnp.ones((2, 12), jnp.int32),
      segment_BL=jnp.asarray(SEGMENT_BL),
      position_BL=jnp.asarray(POSITION_BL),
    )
    return score_BL.sum()

  names = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"
  allowed = [export.DisabledSafetyCheck.custom_call(name) for name in names]
  lowered = export.export(jax.jit(jax.grad(total)), platforms=["cuda"], disabled_checks=allowed)
  text = lowered(params).mlir_module()
  assert tuple(len(re.findall(rf"@{re.escape(name)}\(", text)) for name in names) == calls
  assert "2x4x12x12" not in text and "2x2x24x12" not in text  # no scores of all heads
