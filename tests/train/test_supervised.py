"""The language-model step of pretrain, sft and ppo_init: its loss, its dropout, its layout."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.core.structs import PackedBatch
from instructjax.ops import lm
from instructjax.parallel import sharding
from instructjax.train import supervised
from instructjax.train.optim import make_optimizer
from tests import tiny

VOCAB, ROWS, LENGTH = 23, 8, 9
KEY = jax.random.key(0)
LOGITS_BYTES = lm.LOGITS_BYTES  # which most tests here make small


def packed(seed):
  """Two sequences a row and pads at its end; prompts, first tokens and pads weigh nothing."""
  rng = np.random.default_rng(seed)
  segment_BL, position_BL, weight_BL = (np.zeros((ROWS, LENGTH), int) for _ in range(3))
  for row in range(ROWS):
    cut, stop = 3 + row % 3, LENGTH - row % 2
    for number, (start, end) in enumerate(((0, cut), (cut, stop)), 1):
      segment_BL[row, start:end] = number
      position_BL[row, start:end] = np.arange(end - start)
      weight_BL[row, start + 1 + row % 2 : end] = 1
  token_BL = np.where(segment_BL > 0, rng.integers(0, VOCAB, (ROWS, LENGTH)), VOCAB)
  ids = (x.astype(np.int32) for x in (token_BL, segment_BL, position_BL))
  return PackedBatch(*ids, weight_BL.astype(np.float32))


@pytest.fixture(scope="module", autouse=True)
def three_blocks():
  """Logits of 64 tokens in three blocks: on one device, for several take one."""
  with mock.patch.object(lm, "LOGITS_BYTES", 22 * VOCAB * 4):
    yield


@pytest.fixture(scope="module")
def model(tiny_config):
  return tiny.make_model(tiny_config, VOCAB, "lm")


@pytest.fixture(scope="module")
def params(model, random_params):
  return random_params(model, 1)


@pytest.fixture(scope="module")
def tx(adam_config):
  return make_optimizer(adam_config, 100)


@pytest.fixture(scope="module")
def start(quick_jit, model, tx, params):
  """start(mesh, dropout_rate) -> (train step, fresh state) on that mesh."""

  @functools.cache
  def compiled_step(mesh, dropout_rate, microbatches):
    with mock.patch.object(jax, "jit", quick_jit):
      shardings = supervised.create_state(mesh, model, tx, params, KEY)[1]
      return supervised.make_lm_train_step(
        model,
        tx,
        dropout_rate=dropout_rate,
        state_shardings=shardings,
        microbatches=microbatches,
      )

  def one(mesh, dropout_rate=0.0, microbatches=1):
    placed = jax.device_put(jax.tree.map(jnp.copy, params), models.param_shardings(mesh, model)[0])
    state, _ = supervised.create_state(mesh, model, tx, placed, jax.random.clone(KEY))
    return compiled_step(mesh, dropout_rate, microbatches), state

  return one


@pytest.fixture(scope="module")
def one_device():
  return sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def expected_nll_BL(quick_jit, model, params):
  """-log p of every token from what precedes it in its segment, each segment scored alone, by NumPy."""
  batch = packed(0)
  forward = quick_jit(
    lambda tokens: models.apply(
      model,
      params,
      tokens,
      segment_BL=(tokens < VOCAB).astype(jnp.int32),
      position_BL=jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape),
    )
  )
  alone = np.full((2 * ROWS, LENGTH), VOCAB, np.int32)
  places = [(row, number) for row in range(ROWS) for number in (1, 2)]
  for line, (row, number) in enumerate(places):
    tokens = batch.token_BL[row][batch.segment_BL[row] == number]
    alone[line, : len(tokens)] = tokens
  logits = np.asarray(forward(alone), np.float64)
  logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll_BL = np.zeros((ROWS, LENGTH))
  for line, (row, number) in enumerate(places):
    columns = np.flatnonzero(batch.segment_BL[row] == number)
    for step in range(1, len(columns)):
      nll_BL[row, columns[step]] = -logprob[line, step - 1, alone[line, step]]
  return nll_BL


def test_loss_is_the_mean_over_weighted_tokens(start, one_device, expected_nll_BL):
  batch = packed(0)
  step, state = start(one_device)
  _, metrics = step(state, batch)
  expected = np.sum(expected_nll_BL * batch.weight_BL) / np.sum(batch.weight_BL)
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("logits_bytes", [22 * VOCAB * 4, 2**20], ids=["blocks", "whole"])
def test_rows_and_evaluation_add_up_by_token(
  quick_jit, model, params, one_device, expected_nll_BL, logits_bytes, monkeypatch
):
  monkeypatch.setattr(lm, "LOGITS_BYTES", logits_bytes)
  batch = packed(0)
  nll_B, weight_B = quick_jit(functools.partial(supervised.lm_row_sums, model))(params, batch)
  weighted_BL = expected_nll_BL * batch.weight_BL
  np.testing.assert_allclose(nll_B, weighted_BL.sum(1), rtol=1e-5)
  np.testing.assert_array_equal(weight_B, batch.weight_BL.sum(1))
  # A batch of few tokens weighs little: the mean is over tokens, not over batches.
  few = PackedBatch(
    batch.token_BL,
    batch.segment_BL,
    batch.position_BL,
    batch.weight_BL * (np.arange(ROWS)[:, None] < 1).astype(np.float32),
  )
  with mock.patch.object(jax, "jit", quick_jit):
    evaluate = supervised.make_lm_evaluation(model, one_device)
  total = weighted_BL.sum() + weighted_BL[0].sum()
  expected = total / (batch.weight_BL.sum() + few.weight_BL.sum())
  np.testing.assert_allclose(evaluate(params, [batch, few]), expected, rtol=1e-5)


def test_a_batch_without_weight_is_no_division_by_zero(start, one_device):
  batch = packed(0)
  step, state = start(one_device)
  empty = PackedBatch(batch.token_BL, batch.segment_BL, batch.position_BL, 0 * batch.weight_BL)
  state, metrics = step(state, empty)
  assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_training_learns_counts_steps_and_donates(start, one_device):
  step, state = start(one_device)
  before, key_before = state, np.array(jax.random.key_data(state.key))
  losses = []
  for _ in range(30):
    state, metrics = step(state, packed(0))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.6 * losses[0] and metrics["grad_norm"] > 0
  assert metrics["tokens"] == np.sum(packed(0).segment_BL > 0)  # prompts too, and no padding
  assert int(state.step) == 30 and np.array_equal(jax.random.key_data(state.key), key_before)
  moments = jax.tree.leaves((before.params, before.opt_state))
  assert all(leaf.is_deleted() for leaf in moments)
  assert step._cache_size() == 1


def test_dropout_differs_by_step_and_repeats_by_seed(start, one_device):
  def losses(at):
    step, state = start(one_device, 0.3)
    state = supervised.TrainState(jnp.int32(at), state.params, state.opt_state, state.key)
    return float(step(state, packed(0))[1]["loss"])

  assert losses(0) == losses(0) != losses(1)


def ragged(seed):
  """As `packed`, but rows differ in how much they weigh, from nothing at all."""
  batch = packed(seed)
  keep_BL = np.arange(LENGTH)[None] < np.array([0, 9, 4, 2, 9, 0, 7, 3])[:, None]
  return dataclasses.replace(batch, weight_BL=batch.weight_BL * keep_BL.astype(np.float32))


def assert_one_batch(got, expected):
  """The gradient (Adam's first moment) to 1e-6 of its size, as are the metrics."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_are_one_batch_and_draw_its_dropout(start, one_device, microbatches):
  def run(microbatches):
    step, state = start(one_device, 0.3, microbatches)
    state, metrics = step(state, ragged(0))
    return metrics, optax.tree.get(state.opt_state, "mu")

  whole = run(1)
  assert whole[0]["loss"] > 0 and whole[0]["grad_norm"] > 0.1
  assert_one_batch(run(microbatches), whole)


def test_a_held_out_loss_in_microbatches(quick_jit, model, params, one_device):
  with mock.patch.object(jax, "jit", quick_jit):
    whole, parts = (
      supervised.make_lm_evaluation(model, one_device, count)(params, [packed(0), ragged(1)])
      for count in (1, 4)
    )
  np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_microbatches_on_several_devices(start, one_device):
  mesh = sharding.make_mesh(MeshConfig(1, 1, 4, 2))
  with jax.set_mesh(mesh):
    step, state = start(mesh, 0.3, 2)
    got = step(state, sharding.place_batch(mesh, ragged(0)))
  step, state = start(one_device, 0.3)
  expected = step(state, ragged(0))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_eight_devices_equal_one(start, one_device, mesh):
  def run(mesh):
    with jax.set_mesh(mesh):
      step, state = start(mesh, dropout_rate=0.3)
      layout = jax.tree.map(lambda x: x.sharding, state)
      for seed in range(2):
        state, metrics = step(state, sharding.place_batch(mesh, packed(seed)))
      if mesh.size > 1:
        # Rows that are not split are not moved in silence.
        with pytest.raises(ValueError, match="does not match the sharding"):
          step(state, jax.device_put(packed(0), sharding.replicated(mesh)))
    assert jax.tree.all(
      jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, layout)
    )
    return metrics, state.params

  for got, expected in zip(
    jax.tree.leaves(run(mesh)), jax.tree.leaves(run(one_device)), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def products(text: str) -> list[str]:
  """The shapes of what a traced function multiplies matrices to."""
  return re.findall(r"(\S+\[[\d,]+\]) = dot_general", text)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_in_blocks_and_a_device_has_its_own_rows(
  tied, model, random_params, one_device, mesh
):
  model = dataclasses.replace(
    model, network=dataclasses.replace(model.network, tie_embeddings=tied)
  )
  params, batch = random_params(model), packed(0)
  whole, block = f"f32[{ROWS},{LENGTH - 1},{VOCAB}]", f"f32[22,{VOCAB}]"
  tokens = ROWS // sharding.num_row_shards(mesh) * (LENGTH - 1)
  own = f"f32[{tokens},{-(-VOCAB // mesh.shape['tensor'])}]"
  for where, shape in ((one_device, block), (mesh, own)):
    with jax.set_mesh(where):
      for sums in (supervised.lm_loss_sums, supervised.lm_row_sums):
        text = str(jax.make_jaxpr(functools.partial(sums, model))(params, batch))
        assert {block, whole, own} & {name.split(":")[1] for name in products(text)} == {shape}


def test_a_step_at_a_real_vocabulary_holds_no_logits(tiny_config, tx, one_device):
  vocab, rows, length = 50257, 8, 193
  model = tiny.make_model(tiny_config, vocab, "lm", max_length=length)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), models.param_shapes(model))
  state, shardings = supervised.create_state(one_device, model, tx, params, jax.random.clone(KEY))
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  batch = PackedBatch(ids, ids, ids, jax.ShapeDtypeStruct((rows, length), jnp.float32))
  logits = rows * (length - 1) * vocab
  with mock.patch.object(lm, "LOGITS_BYTES", LOGITS_BYTES):
    step = supervised.make_lm_train_step(model, tx, dropout_rate=0.0, state_shardings=shardings)
    compiled = step.lower(state, batch).compile()
  arrays = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
  assert max(math.prod(map(int, sizes.split(","))) for sizes in arrays) <= LOGITS_BYTES / 4
  assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * 4 * logits


def test_the_step_uses_the_optimiser_it_is_given(model, params, quick_jit, one_device):
  """One step of plain gradient descent on the sum that lm_loss_sums gives."""
  batch, tx = packed(0), optax.sgd(0.5)
  with mock.patch.object(jax, "jit", quick_jit):
    state, shardings = supervised.create_state(
      one_device, model, tx, jax.tree.map(jnp.copy, params), jax.random.clone(KEY)
    )
    step = supervised.make_lm_train_step(model, tx, dropout_rate=0.0, state_shardings=shardings)
  weight = np.sum(batch.weight_BL)
  grads = quick_jit(jax.grad(lambda p: supervised.lm_loss_sums(model, p, batch)[0] / weight))(
    params
  )
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
  got = step(state, batch)[0].params
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)
