"""The splash kernel, interpreted, against plain attention: outputs, gradients. On a mesh: parallel/test_sharding.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.models import layers, splash

QUICK = {"xla_backend_optimization_level": 0}
# Row 0 packs sequences of 90 and 70 tokens and ends in pads; row 1 is one left-padded sequence.
LENGTH, WINDOW = 170, 40
SEGMENT_BL = np.array([[1] * 90 + [2] * 70 + [0] * 10, [0] * 45 + [1] * 125], np.int32)
POSITION_BL = np.array([[*range(90), *range(70), *[0] * 10], [*[0] * 45, *range(125)]], np.int32)


def masks(cfg):
  cfg = dataclasses.replace(cfg, attention_window=WINDOW)
  return layers.attention_masks(jnp.asarray(SEGMENT_BL), jnp.asarray(POSITION_BL), cfg)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def gradients_and_output(attend, qkv):
  def total(qkv):
    x_BTGRK = attend(*qkv)
    return jnp.sum(jnp.sin(x_BTGRK)), x_BTGRK

  return jax.grad(total, has_aux=True)(qkv)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_kernel_equals_plain_attention(window, gpt2, monkeypatch):
  """Two blocks a side of the 256 columns that 170 are made up to; two query heads for each of two keys."""
  monkeypatch.setattr(splash, "MAX_BLOCK", 128)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  qkv = draw(2, LENGTH, 2, 2, 8), draw(2, 2, LENGTH, 8), draw(2, 2, LENGTH, 8)
  mask_BLL = masks(gpt2)[1 if window else 0]
  kernel = functools.partial(splash.attend, jnp.asarray(SEGMENT_BL), window=window)
  expected = gradients_and_output(lambda *qkv: layers.attend(*qkv, mask_BLL), qkv)
  got = gradients_and_output(kernel, qkv)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(got[1][SEGMENT_BL == 0], 0.0)


def test_a_band_of_columns_is_the_band_of_positions(gpt2):
  dense_BLL, banded_BLL = masks(gpt2)
  column_L = np.arange(LENGTH)
  near_LL = column_L[:, None] - column_L[None] < WINDOW
  np.testing.assert_array_equal(banded_BLL, np.asarray(dense_BLL) & near_LL)
  assert np.any(banded_BLL != dense_BLL)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _score_and_gradient(model, params, token_BL, segment_BL, position_BL):
  def total(params):
    score_BL = models.apply(model, params, token_BL, segment_BL=segment_BL, position_BL=position_BL)
    return jnp.sum(jnp.where(segment_BL > 0, jnp.sin(score_BL), 0.0)), score_BL

  return jax.grad(total, has_aux=True)(params)


def test_details_3_garbage_and_nan_at_pads_leave_a_model_equal_to_the_plain_one(gpt2, make):
  """Banded and dense layers by turns, in a scan with remat, one layer left over."""
  changes = dict(num_kv_heads=2, attention_window=3, layer_pattern="LG")
  plain, params = make(gpt2, "scalar", **changes)
  model, _ = make(gpt2, "scalar", **changes, attention="splash", layers="scan", remat="full")
  segment_BL = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10], np.int32)
  position_BL = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [0, 0, *range(10)]], np.int32)
  token_BL = np.random.default_rng(1).integers(1, 18, (2, 12)).astype(np.int32)
  is_token_BL = segment_BL > 0
  expected = _score_and_gradient(plain, params, token_BL, segment_BL, position_BL)
  # Row 0 of the table and the last position hold NaN: no real token points there.
  embedding = {
    "token_VD": params["embedding"]["token_VD"].at[0].set(jnp.nan),
    "position_TD": params["embedding"]["position_TD"].at[-1].set(jnp.nan),
  }
  token_BL[~is_token_BL] = [0, 7, -5, 0, 10**6]
  position_BL[~is_token_BL] = [15, -3, 10**6, 15, 2]
  poisoned = params | {"embedding": embedding}
  got = _score_and_gradient(model, poisoned, token_BL, segment_BL, position_BL)
  np.testing.assert_allclose(got[1][is_token_BL], expected[1][is_token_BL], rtol=1e-3, atol=1e-4)
  for one, other in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
  "length, window, block",
  [(2048, 0, 512), (1536, 0, 512), (1280, 0, 256), (1152, 0, 384), (128, 0, 128)]
  + [(2048, 256, 256), (2048, 200, 256), (2048, 4096, 512), (1152, 256, 128), (128, 3, 128)],
)
def test_blocks_divide_the_length_and_are_no_wider_than_a_band_wants(length, window, block):
  assert splash.block_length(length, window) == block
