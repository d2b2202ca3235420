"""Prefill and cached decoding give the logits of the whole forward pass and copy no cache."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.models import decoding, positions
from instructjax.parallel import stacking
from tests.models.conftest import SWITCHES

VOCAB, PROMPT, LENGTH = 19, 5, 11
QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time of tiny programs
# Left-padded prompts of 5, 2 and 1 tokens; the second row ends after 3 more, the others never.
NUM_PAD_B, STOP_B = np.array([[0], [3], [4]]), np.array([[11], [8], [11]])
COLUMN_L = np.arange(LENGTH)[None]
IS_TOKEN_BL = (COLUMN_L >= NUM_PAD_B) & (COLUMN_L < STOP_B)
TOKEN_BL = np.where(IS_TOKEN_BL, np.random.default_rng(2).integers(0, VOCAB, (3, LENGTH)), VOCAB)


def decode_all(model, weights, cache_length, num_rows=3, has_rings=False):
  """Logits of the first rows after columns PROMPT - 1 .. LENGTH - 1, one column at a time; jittable."""
  token_BL = jnp.asarray(TOKEN_BL[:num_rows], jnp.int32)
  is_token_BL = jnp.asarray(IS_TOKEN_BL[:num_rows])
  band_length = model.network.attention_window if has_rings else None
  cache = models.init_cache(model, num_rows, cache_length, band_length)
  first_BV, cache = models.prefill(
    model, weights, token_BL[:, :PROMPT], is_token_BL[:, :PROMPT], cache
  )
  position_BL = models.positions_from_mask(is_token_BL)
  is_slot_BT = jnp.pad(is_token_BL, ((0, 0), (0, cache_length - LENGTH)))

  def step(cache, slot):
    known_BT = is_slot_BT & (jnp.arange(cache_length) <= slot)[None]
    logits_BV, cache = models.decode_step(
      *(model, weights, token_BL[:, slot], position_BL[:, slot], slot, known_BT, cache),
      num_columns=LENGTH if has_rings else None,
      ring_step=slot if has_rings else None,
    )
    return cache, logits_BV

  _, logits_TBV = jax.lax.scan(step, cache, jnp.arange(PROMPT, LENGTH))
  return jnp.concatenate([first_BV[:, None], logits_TBV.swapaxes(0, 1)], axis=1)


def full_forward(model, params):
  is_token_BL = jnp.asarray(IS_TOKEN_BL)
  return models.apply(
    model,
    params,
    jnp.asarray(TOKEN_BL, jnp.int32),
    segment_BL=is_token_BL.astype(jnp.int32),
    position_BL=models.positions_from_mask(is_token_BL),
    window=(PROMPT - 1, LENGTH),
  )


@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_cached_decode_equals_the_whole_forward(cfg, make, how):
  model, params = make(cfg, layers=how, num_layers=2)

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(params):
    weights = models.decode_weights(model, params)
    decoded = [decode_all(model, weights, LENGTH + 2, num_rows) for num_rows in (3, 1)]
    return *decoded, full_forward(model, params)

  decoded_BTV, first_row_BTV, expected_BTV = both(params)
  real_BT = IS_TOKEN_BL[:, PROMPT - 1 :]
  np.testing.assert_allclose(decoded_BTV[real_BT], expected_BTV[real_BT], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(first_row_BTV, expected_BTV[:1], rtol=1e-4, atol=1e-4)
  assert np.all(np.isfinite(decoded_BTV))


@pytest.mark.parametrize("window", [3, 7])  # shorter and longer than the prompt
@pytest.mark.parametrize("name", ["gpt3", "gemma3"])
def test_rings_hold_what_banded_layers_read(make, name, window):
  # Five layers: some are left over, whether the period is 2 or 3.
  cfg = dataclasses.replace(SWITCHES[name], num_layers=5, attention_window=window)
  model, params = make(cfg, layers="scan")
  assert decoding.ring_length(model, LENGTH) == window
  assert decoding.ring_length(model, window) is None

  @functools.partial(jax.jit, compiler_options=QUICK)
  def both(params):
    weights = models.decode_weights(model, params)
    return decode_all(model, weights, LENGTH + 2, has_rings=True), full_forward(model, params)

  decoded_BTV, expected_BTV = both(params)
  real_BT = IS_TOKEN_BL[:, PROMPT - 1 :]
  np.testing.assert_allclose(decoded_BTV[real_BT], expected_BTV[real_BT], rtol=1e-4, atol=1e-4)
  cache = jax.eval_shape(lambda: models.init_cache(model, 3, LENGTH, window))
  kinds = positions.layer_kinds(cfg)
  assert len(cache) == len(kinds) and sum(len(keys) for keys, _ in cache) == 5
  for kind, (keys, _) in zip(kinds, cache):
    assert keys.shape[3] == (window if kind == "L" else LENGTH)


@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_bfloat16_weights_are_prepared_once(llama, make, how):
  model, params = make(llama, layers=how, dtype="bfloat16")
  weights = jax.eval_shape(functools.partial(models.decode_weights, model), params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
    dtype = "float32" if "norm" in jax.tree_util.keystr(path) else "bfloat16"
    assert leaf.dtype == dtype, path
  cache = models.init_cache(model, 2, 8)
  step = jax.make_jaxpr(functools.partial(models.decode_step, model))(
    weights, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32), 3, jnp.ones((2, 8), bool), cache
  )
  layer = stacking.unstacked_shapes(jax.eval_shape(lambda: params["layers"]))[0]
  shapes = [leaf.shape for leaf in jax.tree.leaves(layer) if leaf.ndim > 1]
  for shape in [*shapes, (VOCAB, llama.d_model)]:  # no weight is cast from float32 inside a step
    assert f"bf16[{','.join(map(str, shape))}]" in str(step)
    assert not re.search(rf"\bf32\[{','.join(map(str, shape))}\]", str(step))


@pytest.mark.parametrize(("how", "num_rows"), [("unroll", 3), ("unroll", 1), ("scan", 3)])
def test_decoding_never_copies_the_cache(llama, make, how, num_rows):
  model, params = make(llama, layers=how, num_layers=2)
  length = 37  # a size that nothing else has

  def run(params):
    return decode_all(model, models.decode_weights(model, params), length, num_rows)

  text = jax.jit(run).lower(params).compile().as_text()
  columns = rf"{llama.num_kv_heads},{length},{llama.head_dim}\]"
  cache_shape = rf"f32\[(?:2,)?{max(num_rows, 2)},{columns}"
  assert re.search(rf"= {cache_shape}\S* dynamic-update-slice\(", text)
  assert not re.findall(rf"= f32\[(?:\d,)*{columns}\S* copy(?:-start)?\(.*", text)
