"""Token log-probabilities and the LM loss, whole and in blocks: by hand, against float64, under garbage."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.ops import lm

# Compiled as a whole: op by op the tests would mostly compile.
lm_loss, token_logprob = map(jax.jit, (lm.lm_loss, lm.token_logprob))


def random_logits(seed, shape=(3, 4, 11)):
  rng = np.random.default_rng(seed)
  logits_BTV = (3 * rng.normal(size=shape)).astype(np.float32)
  return logits_BTV, rng.integers(0, shape[-1], size=shape[:2]).astype(np.int32)


def logprob_loop(logits_BTV, token_BT):
  out_BT = np.zeros(token_BT.shape)
  for b, t in np.ndindex(token_BT.shape):
    logits_V = logits_BTV[b, t].astype(np.float64)
    out_BT[b, t] = logits_V[token_BT[b, t]] - np.log(np.sum(np.exp(logits_V)))
  return out_BT


def test_token_logprob_hand_worked():
  logits_BTV = np.log(jnp.array([[[1.0, 3.0], [1.0, 3.0], [2.0, 2.0]]]))
  logprob_BT = token_logprob(logits_BTV, jnp.array([[0, 1, 0]]))
  np.testing.assert_allclose(logprob_BT, np.log([[0.25, 0.75, 0.5]]), rtol=1e-6)


def test_token_logprob_equals_a_loop():
  logits_BTV, token_BT = random_logits(0)
  logprob_BT = token_logprob(logits_BTV, token_BT)
  np.testing.assert_allclose(logprob_BT, logprob_loop(logits_BTV, token_BT), atol=2e-6)


def test_token_logprob_gradient_equals_autodiff():
  logits_BTV, token_BT = random_logits(1)
  weight_BT = np.random.default_rng(2).normal(size=token_BT.shape).astype(np.float32)

  def plain(logits_BTV):
    logprob_BTV = jax.nn.log_softmax(logits_BTV)
    return jnp.sum(weight_BT * jnp.take_along_axis(logprob_BTV, token_BT[..., None], 2)[..., 0])

  def ours(logits_BTV):
    return jnp.sum(weight_BT * token_logprob(logits_BTV, token_BT))

  grad_BTV, plain_grad_BTV = (jax.jit(jax.grad(fn))(logits_BTV) for fn in (ours, plain))
  np.testing.assert_allclose(grad_BTV, plain_grad_BTV, atol=1e-6)


def test_token_logprob_of_bfloat16_logits_is_float32():
  logits_BTV, token_BT = random_logits(3)
  low_BTV = jnp.asarray(logits_BTV, jnp.bfloat16)
  logprob_BT = token_logprob(low_BTV, token_BT)
  assert logprob_BT.dtype == jnp.float32
  # Only the logits were rounded, nothing after.
  expected_BT = logprob_loop(np.asarray(low_BTV, np.float32), token_BT)
  np.testing.assert_allclose(logprob_BT, expected_BT, atol=2e-6)
  grad_BTV = jax.eval_shape(jax.grad(lambda x: jnp.sum(token_logprob(x, token_BT))), low_BTV)
  assert grad_BTV.dtype == jnp.bfloat16


def test_token_logprob_is_stable():
  logits_BTV = jnp.array([[[1e4, 0.0, -1e4], [-1e30, 5.0, -jnp.inf]]])
  np.testing.assert_array_equal(token_logprob(logits_BTV, jnp.array([[0, 1]])), [[0, 0]])
  np.testing.assert_array_equal(token_logprob(logits_BTV, jnp.array([[1, 2]])), [[-1e4, -jnp.inf]])


def test_details_2_pad_id_has_no_logprob():
  # The pad id is one past the vocabulary. A caller that forgets to mask it sees NaN, not a number.
  logprob_BT = token_logprob(np.zeros((1, 2, 5)), jnp.array([[4, 5]]))
  np.testing.assert_array_equal(np.isnan(logprob_BT), [[False, True]])


def test_unused_positions_pass_no_gradient_even_if_nan():
  logits_BTV, token_BT = random_logits(4)
  is_used_BT = np.arange(4) < np.array([4, 2, 0])[:, None]
  token_BT = np.where(is_used_BT, token_BT, np.int32(11))  # the pad id

  def total(logits_BTV):
    return jnp.sum(jnp.where(is_used_BT, token_logprob(logits_BTV, token_BT), 0))

  value_and_grad = jax.jit(jax.value_and_grad(total))
  clean = jax.device_get(value_and_grad(logits_BTV))
  for filler in (np.nan, np.inf, -np.inf):
    garbage_BTV = np.where(is_used_BT[..., None], logits_BTV, np.float32(filler))
    garbage = value_and_grad(garbage_BTV)
    jax.tree.map(np.testing.assert_array_equal, clean, garbage)
  np.testing.assert_array_equal(clean[1][~is_used_BT], 0)
  assert np.all(np.any(clean[1][is_used_BT] != 0, axis=-1))


def test_details_19_temperature_divides_logits():
  # Odds 1 : 3 at temperature 1 are 1 : 9 at temperature 1/2.
  logits_BTV = np.log(jnp.array([[[1.0, 3.0]]])) / 0.5
  np.testing.assert_allclose(token_logprob(logits_BTV, jnp.array([[1]])), np.log(0.9), rtol=1e-5)


def test_token_logprob_keeps_no_second_logits():
  # float32 logits: neither pass may hold another [B, T, V] array besides its input and output.
  logits_BTV = jax.ShapeDtypeStruct((4, 8, 4096), jnp.float32)
  token_BT = jax.ShapeDtypeStruct((4, 8), jnp.int32)
  for fn in (token_logprob, jax.grad(lambda x, token: jnp.sum(token_logprob(x, token)))):
    memory = jax.jit(fn).lower(logits_BTV, token_BT).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 8 * 4096 * 4 / 2


def test_vocabulary_may_be_sharded():
  # Logits split over the vocabulary are never gathered, forward or backward.
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  logits_BTV, token_BT = random_logits(5, (4, 3, 64))
  split, rows = (NamedSharding(mesh, spec) for spec in (PS("data", None, "tensor"), PS("data")))
  args = jax.device_put(logits_BTV, split), jax.device_put(token_BT, rows)
  for fn in (token_logprob, jax.grad(lambda x, token: jnp.sum(token_logprob(x, token)))):
    compiled = jax.jit(fn).lower(*args).compile()
    text = compiled.as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
    np.testing.assert_allclose(compiled(*args), jax.jit(fn)(logits_BTV, token_BT), atol=1e-5)
  assert compiled(*args).sharding.is_equivalent_to(split, 3)


def test_lm_loss_hand_worked():
  # -log(1/4) * 2 - log(3/4) * .5, third token ignored although its logits are NaN.
  logits_BTV = np.log(jnp.array([[[1.0, 3.0], [1.0, 3.0], [np.nan, 1.0]]]))
  weight_BT = jnp.array([[2.0, 0.5, 0.0]])
  sum_nll, sum_weight = lm_loss(logits_BTV, jnp.array([[0, 1, 0]]), weight_BT)
  np.testing.assert_allclose(sum_nll, -2 * np.log(0.25) - 0.5 * np.log(0.75), rtol=1e-6)
  assert sum_weight == 2.5


def test_lm_loss_ignores_unweighted_positions():
  logits_BTV, token_BT = random_logits(6)
  weight_BT = (np.arange(4) < np.array([3, 1, 0])[:, None]).astype(np.float32)

  def loss(logits_BTV, token_BT):
    return lm_loss(logits_BTV, token_BT, weight_BT)[0]

  value_and_grad = jax.jit(jax.value_and_grad(loss))
  clean = jax.device_get(value_and_grad(logits_BTV, token_BT))
  garbage_BTV = np.where(weight_BT[..., None] > 0, logits_BTV, np.float32(np.nan))
  garbage = value_and_grad(garbage_BTV, np.where(weight_BT > 0, token_BT, np.int32(11)))
  jax.tree.map(np.testing.assert_array_equal, clean, garbage)
  assert np.isfinite(clean[0]) and not np.any(clean[1][weight_BT == 0])


def test_details_34_reduction_is_left_to_the_caller():
  # Sums add up over microbatches of unequal weight, where a mean of means would not.
  logits_BTV, token_BT = random_logits(7, (4, 5, 11))
  weight_BT = (np.arange(5) < np.array([5, 4, 1, 0])[:, None]).astype(np.float32)
  whole = lm_loss(logits_BTV, token_BT, weight_BT)
  parts = [lm_loss(logits_BTV[i], token_BT[i], weight_BT[i]) for i in (slice(0, 2), slice(2, 4))]
  for k in (0, 1):
    np.testing.assert_allclose(whole[k], parts[0][k] + parts[1][k], rtol=1e-6)
  nothing, no_weight = lm_loss(logits_BTV, token_BT, np.zeros_like(weight_BT))
  assert nothing == no_weight == 0


def hidden_and_table(seed, shape, dtype=np.float32):
  """(h_BTD, table_VD, token_BT, weight_BT) of (B, T, D, V); a third of the weights are 0, the others differ."""
  rng = np.random.default_rng(seed)
  b, t, d, v = shape
  h_BTD, table_VD = rng.normal(size=(b, t, d)), rng.normal(size=(v, d))
  weight_BT = rng.uniform(0.5, 2, (b, t)) * (rng.uniform(size=(b, t)) > 0.33)
  token_BT = rng.integers(0, v, (b, t)).astype(np.int32)
  h_BTD, table_VD = jnp.asarray(h_BTD, dtype), table_VD.astype(np.float32)
  return h_BTD, table_VD, token_BT, weight_BT.astype(np.float32)


def scaled(h_BTD, table_VD, token_BT, weight_BT, num_blocks):
  """A loss whose gradient is not that of the sum."""
  sum_nll, sum_weight = lm.blocked_lm_loss(h_BTD, table_VD, token_BT, weight_BT, num_blocks)
  return 0.7 * sum_nll / sum_weight


blocked_gradient = jax.jit(jax.value_and_grad(scaled, (0, 1)), static_argnums=4)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("shape", "num_blocks"),
  [((2, 3, 5, 7), 1), ((2, 3, 5, 7), 6), ((3, 5, 4, 11), 4), ((1, 13, 8, 300), 3)],
)
def test_blocked_loss_equals_float64(shape, num_blocks, dtype):
  h_BTD, table_VD, token_BT, weight_BT = args = hidden_and_table(8, shape, dtype)
  h64_BTD = np.asarray(h_BTD, np.float64)
  low_VD = np.asarray(jnp.asarray(table_VD, dtype), np.float64)  # as it is multiplied
  logits_BTV = np.einsum("BTD,VD->BTV", h64_BTD, low_VD)
  exp_BTV = np.exp(logits_BTV)
  prob_BTV = exp_BTV / exp_BTV.sum(-1, keepdims=True)
  onehot_BTV = np.eye(shape[-1])[token_BT]
  nll_BT = -weight_BT * np.log(np.sum(prob_BTV * onehot_BTV, -1))
  scale = 0.7 / weight_BT.sum(dtype=np.float64)
  d_logits_BTV = scale * weight_BT[..., None] * (prob_BTV - onehot_BTV)

  loss, (d_h_BTD, d_table_VD) = blocked_gradient(*args, num_blocks)
  sum_nll, sum_weight = jax.jit(lm.blocked_lm_loss, static_argnums=4)(*args, num_blocks)
  np.testing.assert_allclose(loss, scale * nll_BT.sum(), rtol=1e-6)
  np.testing.assert_allclose((sum_nll, sum_weight), (nll_BT.sum(), weight_BT.sum()), rtol=1e-6)
  assert d_h_BTD.dtype == dtype and d_table_VD.dtype == np.float32
  rtol = 1e-5 if dtype == np.float32 else 2**-8  # one rounding to bfloat16
  expected_BTD = np.einsum("BTV,VD->BTD", d_logits_BTV, low_VD)
  expected_VD = np.einsum("BTV,BTD->VD", d_logits_BTV, h64_BTD)
  np.testing.assert_allclose(np.asarray(d_h_BTD, np.float64), expected_BTD, rtol=rtol, atol=1e-7)
  np.testing.assert_allclose(d_table_VD, expected_VD, rtol=1e-5, atol=1e-7)


def test_blocked_loss_ignores_unweighted_positions():
  h_BTD, table_VD, token_BT, weight_BT = hidden_and_table(9, (3, 4, 5, 11))
  h_BTD = np.asarray(h_BTD)
  clean = jax.device_get(blocked_gradient(h_BTD, table_VD, token_BT, weight_BT, 5))
  for filler in (np.nan, np.inf):
    garbage_BTD = np.where(weight_BT[..., None] > 0, h_BTD, np.float32(filler))
    pads_BT = np.where(weight_BT > 0, token_BT, np.int32(11))
    garbage = blocked_gradient(garbage_BTD, table_VD, pads_BT, weight_BT, 5)
    jax.tree.map(np.testing.assert_array_equal, clean, garbage)
  np.testing.assert_array_equal(clean[1][0][weight_BT == 0], 0)
  nothing, no_weight = lm.blocked_lm_loss(h_BTD, table_VD, token_BT, 0 * weight_BT, 5)
  assert nothing == no_weight == 0


def test_blocked_loss_is_stable():
  # Logits 3e4 apart: exp of them is no float32.
  h_BTD, table_VD = np.full((1, 2, 1), 1e4, np.float32), np.array([[1.0], [-2.0]], np.float32)
  weight_BT = np.array([[1.0, 1.0]], np.float32)
  token_BT = np.array([[0, 1]], np.int32)
  loss, (d_h_BTD, _) = blocked_gradient(h_BTD, table_VD, token_BT, weight_BT, 2)
  np.testing.assert_allclose(loss, 0.35 * 3e4, rtol=1e-6)
  np.testing.assert_allclose(d_h_BTD, [[[0], [0.35 * 3]]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("shape", "num_blocks", "temperature"),
  [((2, 3, 5, 7), 1, 1.0), ((2, 3, 5, 7), 6, 0.7), ((3, 5, 4, 11), 4, 1.3)],
)
def test_blocked_logprob_equals_float64(shape, num_blocks, temperature, dtype):
  h_BTD, table_VD, token_BT, g_BT = hidden_and_table(11, shape, dtype)
  is_token_BT = g_BT != 0
  h64_BTD = np.asarray(h_BTD, np.float64)
  low_VD = np.asarray(jnp.asarray(table_VD, dtype), np.float64)
  exp_BTV = np.exp(np.einsum("BTD,VD->BTV", h64_BTD, low_VD) / temperature)
  prob_BTV = exp_BTV / exp_BTV.sum(-1, keepdims=True)
  onehot_BTV = np.eye(shape[-1])[token_BT]
  d_logits_BTV = g_BT[..., None] * (onehot_BTV - prob_BTV) / temperature

  # What no token is at may be anything.
  given_BTD = jnp.where(is_token_BT[..., None], h_BTD, np.nan)
  given_BT = np.where(is_token_BT, token_BT, shape[-1])

  @jax.jit
  def run(h_BTD, table_VD):
    args = h_BTD, table_VD, given_BT, is_token_BT, num_blocks, temperature
    return lm.blocked_logprob(*args)

  logprob_BT, pull = jax.vjp(run, given_BTD, table_VD)
  d_h_BTD, d_table_VD = pull(jnp.asarray(g_BT))
  expected_BT = np.where(is_token_BT, np.log(np.sum(prob_BTV * onehot_BTV, -1)), 0)
  np.testing.assert_allclose(logprob_BT, expected_BT, rtol=1e-5, atol=1e-6)
  assert d_h_BTD.dtype == dtype and d_table_VD.dtype == np.float32
  low = dtype != np.float32
  expected_BTD = np.einsum("BTV,VD->BTD", d_logits_BTV, low_VD)
  expected_VD = np.einsum("BTV,BTD->VD", d_logits_BTV, h64_BTD)
  # In bfloat16 each block's part of the table's gradient is rounded, as it is without blocks.
  np.testing.assert_allclose(
    np.asarray(d_h_BTD, np.float64), expected_BTD, rtol=2**-8 if low else 1e-5, atol=1e-6
  )
  np.testing.assert_allclose(
    d_table_VD, expected_VD, rtol=2**-7 if low else 1e-5, atol=2e-2 if low else 1e-6
  )


def logprob_sum(h_BTD, table_VD, token_BT, weight_BT, num_blocks):
  return jnp.sum(lm.blocked_logprob(h_BTD, table_VD, token_BT, weight_BT > 0, num_blocks) ** 2)


def test_blocked_loss_computes_nothing_twice():
  args = hidden_and_table(10, (2, 3, 5, 7))
  products = lambda fn: str(jax.make_jaxpr(lambda *a: fn(*a, 2))(*args)).count("dot_general")
  assert products(lm.blocked_lm_loss) == products(logprob_sum) == 1
  assert products(jax.value_and_grad(scaled, (0, 1))) == 3  # logits, and a gradient each
  assert products(jax.value_and_grad(logprob_sum, (0, 1))) == 4  # logits once more


def test_blocked_loss_holds_one_block_of_logits():
  b, t, d, v = 4, 32, 8, 2048
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, t, d), (v, d), (b, t), (b, t))]
  shapes[2] = jax.ShapeDtypeStruct((b, t), jnp.int32)
  gradients = jax.grad(scaled, (0, 1)), jax.grad(logprob_sum, (0, 1))
  for fn in (lm.blocked_lm_loss, logprob_sum, *gradients):
    compiled = jax.jit(fn, static_argnums=4).lower(*shapes, 8).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * b * t * v * 4 / 8
    arrays = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
    assert max(math.prod(map(int, sizes.split(","))) for sizes in arrays) <= b * t * v / 8


def test_blocks_are_as_few_as_keep_the_logits_in_bounds():
  vocab = 50257
  for width, most in ((64, lm.LOGITS_BYTES // (4 * vocab)), (4096, 4096)):
    numbers = [lm.num_blocks(n, vocab, width) for n in (1, most, most + 1, 3 * most, 4 * most)]
    assert numbers == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("fn", [token_logprob, lambda x, t: lm_loss(x, t, np.ones(t.shape))])
def test_refuses_wrong_shapes(fn):
  with pytest.raises(AssertionError):
    fn(np.zeros((2, 3, 5)), np.zeros((2, 4), int))
  with pytest.raises(AssertionError):
    fn(np.zeros((2, 3, 5)), np.zeros((2, 3)))
