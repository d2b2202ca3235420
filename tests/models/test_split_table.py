"""Tables on a mesh: eight devices equal one; no logits are sent, and no rows of others; garbage at pads is ignored."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core.config import MeshConfig
from instructjax.models import split_table
from instructjax.ops import lm
from instructjax.parallel import sharding

# Nothing divides: 3 rows over 4, 5 columns and 19 tokens over 2.
ROWS, COLUMNS, VOCAB, WIDTH = 3, 5, 19, 8
TEMPERATURE = 0.7


def inputs():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  token_BT = rng.integers(0, VOCAB, (ROWS, COLUMNS)).astype(np.int32)
  weight_BT = (normal(ROWS, COLUMNS) * (rng.random((ROWS, COLUMNS)) < 0.7)).astype(np.float32)
  return normal(ROWS, COLUMNS, WIDTH), 2 * normal(VOCAB, WIDTH), token_BT, weight_BT


def loss(h_BTD, table_VD, token_BT, weight_BT):
  return 3 * split_table.loss_sums(h_BTD, table_VD, token_BT, weight_BT)[0]


def logprobs(h_BTD, table_VD, token_BT, weight_BT):
  args = h_BTD, table_VD, token_BT, weight_BT != 0
  return jnp.sum(weight_BT * split_table.token_logprob(*args, TEMPERATURE))


def loss_on_one_device(h_BTD, table_VD, token_BT, weight_BT):
  return 3 * lm.lm_loss(h_BTD @ table_VD.T, token_BT, weight_BT)[0]


def logprobs_on_one_device(h_BTD, table_VD, token_BT, weight_BT):
  return jnp.sum(weight_BT * lm.token_logprob(h_BTD @ table_VD.T / TEMPERATURE, token_BT))


def compiled(fn, *args):
  """The gradient of a function, and the program of it, on eight devices."""
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 2, 2))):
    return jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*args).compile()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
  ("fn", "expected"), [(loss, loss_on_one_device), (logprobs, logprobs_on_one_device)]
)
def test_eight_devices_equal_one(monkeypatch, fn, expected, blocks):
  monkeypatch.setattr(lm, "num_blocks", lambda *sizes: blocks)
  h_BTD, table_VD, token_BT, weight_BT = inputs()
  value, gradients = jax.value_and_grad(expected, (0, 1))(h_BTD, table_VD, token_BT, weight_BT)
  # Where the weight is 0, h and the token may be anything.
  h_BTD = np.where(weight_BT[..., None] != 0, h_BTD, np.nan)
  args = h_BTD, table_VD, np.where(weight_BT != 0, token_BT, VOCAB), weight_BT
  program = compiled(fn, *args)
  found, found_gradients = program(*args)
  np.testing.assert_allclose(found, value, rtol=1e-5)
  for one, other in zip(found_gradients, gradients):
    np.testing.assert_allclose(one, other, atol=2e-5)
  # A device's logits are [1 row * 6 columns, 10 tokens]; nothing of the vocabulary's width is sent but the table.
  sent = re.findall(
    r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce)\(", program.as_text()
  )
  sent = [tuple(map(int, dims.split(","))) for dims in sent if dims]
  assert sent and not [dims for dims in sent if dims[-1] in (10, 19, 20) and len(dims) > 1]


def test_without_a_gradient_the_loss_is_the_same():
  args = inputs()
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 2, 2))):
    sum_nll, sum_weight = jax.jit(split_table.loss_sums)(*args)
  expected = lm.lm_loss(args[0] @ args[1].T, *args[2:])
  np.testing.assert_allclose((sum_nll, sum_weight), expected, rtol=1e-5)


def test_a_token_outside_the_vocabulary_shows():
  h_BTD, table_VD, token_BT, _ = inputs()
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 2, 2))):
    run = jax.jit(
      lambda token_BT: split_table.token_logprob(h_BTD, table_VD, token_BT, token_BT < 99, 1.0)
    )
    found = np.asarray(run(np.where(np.arange(COLUMNS) == 1, VOCAB, token_BT)))
  np.testing.assert_array_equal(np.isnan(found), np.arange(COLUMNS)[None] == [[1]] * ROWS)


def test_lookups_read_a_devices_own_tokens():
  _, table_VD, token_BT, _ = inputs()
  weight_BTD = np.random.default_rng(1).normal(size=(ROWS, COLUMNS, WIDTH)).astype(np.float32)

  def total(look_up, table_VD):
    return jnp.sum(jnp.sin(look_up(table_VD, token_BT)) * weight_BTD)

  value, gradient = jax.value_and_grad(lambda x: total(lambda t, i: t[i], x))(table_VD)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, 2, 2, 2))):
    run = jax.jit(jax.value_and_grad(lambda x: total(split_table.look_up, x)))
    program = run.lower(table_VD).compile()
    found, found_gradient = program(table_VD)
  np.testing.assert_allclose(found, value, rtol=1e-5)
  np.testing.assert_allclose(found_gradient, gradient, atol=1e-5)
  # A device has 1 row of 4, with all 6 columns, and half of the 20 tokens of a table.
  gathers = re.findall(r"= \w+\[([\d,]*)\]\S* gather\(", program.as_text())
  assert gathers and {math.prod(map(int, dims.split(","))) for dims in gathers} <= {6 * WIDTH}
