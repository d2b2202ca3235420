"""The forward pass: against plain NumPy, by gradient, and with pads that must not matter."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.models import layers, positions
from tests import tiny

VOCAB, LENGTH = 19, 12
TOKEN_BL = np.random.default_rng(1).integers(1, VOCAB - 1, (2, LENGTH)).astype(np.int32)
QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time of tiny programs
# Row 0 packs sequences of 5 and 4 tokens and ends in pads; row 1 is one left-padded sequence.
SEGMENT_BL = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10], np.int32)
POSITION_BL = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [0, 0, *range(10)]], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 5), compiler_options=QUICK)
def forward(model, params, token_BL, segment_BL, position_BL, window=None):
  return models.apply(
    model, params, token_BL, segment_BL=segment_BL, position_BL=position_BL, window=window
  )


def reference(cfg, params, tokens, positions):
  """Logits of one sequence, token by token and head by head, in float64 NumPy."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, weights):
    if cfg.norm != "layernorm":
      scale = next(iter(weights.values())) + (1 if cfg.norm == "rmsnorm_1p" else 0)
      return x / np.sqrt(np.mean(x * x) + cfg.norm_eps) * scale
    return (x - x.mean()) / np.sqrt(x.var() + cfg.norm_eps) * weights["scale_D"] + weights["bias_D"]

  def rotate(x, position, kind):
    half = (cfg.rotary_dim or cfg.head_dim) // 2
    base = cfg.rope_local_base if kind == "L" and cfg.rope_local_base else cfg.rope_base
    out = x.copy()
    for i in range(half):
      angle = position * base ** (-i / half)
      out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
      out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
    return out

  def attention(x_T, weights, index):
    queries = cfg.num_heads // cfg.num_kv_heads
    out_T = [np.zeros(cfg.d_model) for _ in x_T]
    for head in range(cfg.num_heads):
      group, which = divmod(head, queries)
      project = lambda x, i, group=group: (
        x @ weights["w_qkv_DGQK"][:, group, i]
        + (weights["b_qkv_GQK"][group, i] if "b_qkv_GQK" in weights else 0)
      )
      kind = cfg.layer_pattern[index % len(cfg.layer_pattern)]

      def turn(x, name, position, kind=kind):
        x = norm(x, weights[name]) if cfg.qk_norm else x
        return rotate(x, position, kind) if cfg.position == "rope" and kind != "N" else x

      for t, x in enumerate(x_T):
        query = turn(project(x, which), "q_norm", positions[t])
        banded = cfg.attention_window and kind == "L"
        seen = range(max(0, t - cfg.attention_window + 1) if banded else 0, t + 1)
        score = [query @ turn(project(x_T[s], queries), "k_norm", positions[s]) for s in seen]
        prob = np.exp(np.array(score) / np.sqrt(cfg.query_pre_attn_scalar or cfg.head_dim))
        value = sum(p * project(x_T[s], queries + 1) for p, s in zip(prob / prob.sum(), seen))
        out_T[t] += value @ weights["w_out_GRKD"][group, which]
    return [x + weights.get("b_out_D", 0) for x in out_T]

  def mlp(x, weights):
    if cfg.mlp in ("swiglu", "geglu"):
      gate, up = x @ weights["w_gate_up_D2F"][:, 0], x @ weights["w_gate_up_D2F"][:, 1]
      gate = gate / (1 + np.exp(-gate)) if cfg.mlp == "swiglu" else gelu(gate)
      return (gate * up) @ weights["w_down_FD"]
    x = x @ weights["w_up_DF"] + weights["b_up_F"]
    exact = lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    x = gelu(x) if cfg.mlp == "gelu" else exact(x)
    return x @ weights["w_down_FD"] + weights["b_down_D"]

  gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
  after = lambda y, layer, name: norm(y, layer[name]) if cfg.sandwich_norm else y

  embedding = params["embedding"]
  h_T = [embedding["token_VD"][token] for token in tokens]
  if cfg.scale_embeddings:
    h_T = [h * np.sqrt(cfg.d_model) for h in h_T]
  if cfg.position == "learned":
    h_T = [h + embedding["position_TD"][p] for h, p in zip(h_T, positions)]
  for index in range(cfg.num_layers):
    layer = params["layers"][index]
    mixed_T = attention([norm(h, layer["attention_norm"]) for h in h_T], layer["attention"], index)
    added_T = [h + after(x, layer, "attention_out_norm") for h, x in zip(h_T, mixed_T)]
    h_T = h_T if cfg.parallel_residual else added_T
    y_T = [mlp(norm(h, layer["mlp_norm"]), layer["mlp"]) for h in h_T]
    h_T = [h + after(y, layer, "mlp_out_norm") for h, y in zip(added_T, y_T)]
  table = embedding["token_VD"] if cfg.tie_embeddings else params["head"]["w_VD"]
  return np.array([table @ norm(h, params["final_norm"]) for h in h_T])


def test_forward_equals_plain_numpy(cfg, make):
  model, params = make(cfg)
  logits_BLV = np.asarray(forward(model, params, TOKEN_BL, SEGMENT_BL, POSITION_BL))
  for row, columns in ((0, slice(0, 5)), (0, slice(5, 9)), (1, slice(2, 12))):
    expected = reference(cfg, params, TOKEN_BL[row, columns], POSITION_BL[row, columns])
    np.testing.assert_allclose(logits_BLV[row, columns], expected, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_only_earlier_tokens_of_the_same_segment(few, make):
  model, params = make(few)
  # Distinct ids, and the logit of an id no column holds: a tied table then counts as input only.
  token_L = jnp.arange(LENGTH)

  def logit_L(table_VD):
    embedding = params["embedding"] | {"token_VD": table_VD}
    return models.apply(
      model,
      params | {"embedding": embedding},
      token_L[None],
      segment_BL=SEGMENT_BL[:1],
      position_BL=POSITION_BL[:1],
    )[0, :, VOCAB - 1]

  jacobian_LVD = jax.jit(jax.jacrev(logit_L), compiler_options=QUICK)(
    params["embedding"]["token_VD"]
  )
  reaches_LL = np.abs(jacobian_LVD[:, :LENGTH]).max(-1) > 0
  segment_L = SEGMENT_BL[0]
  real_LL = (segment_L[:, None] == segment_L[None]) & (segment_L > 0)[None]
  np.testing.assert_array_equal(reaches_LL, real_LL & np.tri(LENGTH, dtype=bool))


def test_details_3_padding_on_either_side_changes_nothing(few, make):
  model, params = make(few)
  tokens = TOKEN_BL[0, :7]
  token_BL = np.full((2, LENGTH), VOCAB, np.int32)
  token_BL[0, :7] = token_BL[1, 5:] = tokens
  is_token_BL = token_BL != VOCAB
  position_BL = models.positions_from_mask(jnp.asarray(is_token_BL))
  logits_BLV = forward(model, params, token_BL, is_token_BL.astype(np.int32), position_BL)
  np.testing.assert_allclose(logits_BLV[0, :7], logits_BLV[1, 5:], rtol=1e-4, atol=1e-5)
  assert np.all(np.isfinite(logits_BLV))


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _score_and_gradient(model, params, token_BL, segment_BL, position_BL):
  def total(params):
    score_BL = models.apply(model, params, token_BL, segment_BL=segment_BL, position_BL=position_BL)
    return jnp.sum(jnp.where(SEGMENT_BL > 0, jnp.sin(score_BL), 0.0)), score_BL

  return jax.grad(total, has_aux=True)(params)


def test_details_3_garbage_and_nan_at_pads_change_nothing(few, make):
  model, params = make(few, "scalar", num_layers=2)
  is_token_BL = SEGMENT_BL > 0
  clean = _score_and_gradient(
    model, params, np.where(is_token_BL, TOKEN_BL, VOCAB), SEGMENT_BL, POSITION_BL
  )
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(clean))
  # The first and last row of the table and the last position hold NaN: no real token points there.
  embedding = {name: x.at[-1].set(jnp.nan) for name, x in params["embedding"].items()}
  embedding["token_VD"] = embedding["token_VD"].at[0].set(jnp.nan)
  poisoned = params | {"embedding": embedding}
  garbage = np.array([VOCAB - 1, 7, -5, VOCAB - 1, 10**6], np.int32)
  token_BL, position_BL = TOKEN_BL.copy(), POSITION_BL.copy()
  token_BL[~is_token_BL] = garbage
  position_BL[~is_token_BL] = [15, -3, 10**6, 15, 2]
  dirty = _score_and_gradient(model, poisoned, token_BL, SEGMENT_BL, position_BL)
  for expected, got in zip(jax.tree.leaves(clean[0]), jax.tree.leaves(dirty[0])):
    np.testing.assert_array_equal(expected, got)
  np.testing.assert_array_equal(clean[1][is_token_BL], dirty[1][is_token_BL])


def test_attention_has_the_gradient_of_its_definition():
  G, R, T, S, K = 2, 3, 4, 5, 6
  keys = jax.random.split(jax.random.key(0), 4)
  q_BTGRK = jax.random.normal(keys[0], (2, T, G, R, K))
  k_BGSK, v_BGSK = (jax.random.normal(key, (2, G, S, K)) for key in keys[1:3])
  mask_BTS = np.random.default_rng(0).random((2, T, S)) < 0.6
  mask_BTS[1, 2] = False

  def definition(q_BTGRK, k_BGSK, v_BGSK):
    exp_BGRTS = jnp.exp(jnp.einsum("btgrk,bgsk->bgrts", q_BTGRK, k_BGSK) / K**0.5)
    exp_BGRTS = exp_BGRTS * mask_BTS[:, None, None]
    sum_BGRT1 = exp_BGRTS.sum(-1, keepdims=True)
    return jnp.einsum(
      "bgrts,bgsk->btgrk", exp_BGRTS / jnp.where(sum_BGRT1 > 0, sum_BGRT1, 1), v_BGSK
    )

  operands = q_BTGRK, k_BGSK, v_BGSK
  expected, pull = jax.vjp(definition, *operands)
  got, pull_ours = jax.vjp(lambda *operands: layers.attend(*operands, mask_BTS), *operands)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  dx_BTGRK = jax.random.normal(keys[3], got.shape)
  for ours, theirs in zip(pull_ours(dx_BTGRK), pull(dx_BTGRK), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_row_that_may_look_at_nothing_gets_zero():
  q_BTGRK, kv_BGSK = jnp.ones((1, 2, 1, 1, 4)), jnp.ones((1, 1, 3, 4))
  mask_BTS = jnp.array([[[False] * 3, [True, False, False]]])
  mixed_BTGRK = layers.attend(q_BTGRK, kv_BGSK, kv_BGSK, mask_BTS)
  np.testing.assert_array_equal(mixed_BTGRK[0, :, 0, 0, 0], [0, 1])


def test_window_is_a_slice_of_the_whole(gpt2, make):
  for head in ("lm", "scalar"):
    model, params = make(gpt2, head)
    whole = forward(model, params, TOKEN_BL, SEGMENT_BL, POSITION_BL)
    part = forward(model, params, TOKEN_BL, SEGMENT_BL, POSITION_BL, (3, 8))
    np.testing.assert_allclose(part, whole[:, 3:8], rtol=1e-5, atol=1e-6)
    assert whole.shape == (2, LENGTH) + ((VOCAB,) if head == "lm" else ())


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def loss_gradient(model, params, key=None):
  """(gradient, logits), with dropout where there is a key."""

  def loss(params):
    logits_BLV = models.apply(
      model,
      params,
      TOKEN_BL,
      segment_BL=SEGMENT_BL,
      position_BL=POSITION_BL,
      dropout_rate=0.0 if key is None else 0.2,
      dropout_key_B=None if key is None else jax.random.split(key, len(TOKEN_BL)),
    )
    return jnp.sum(jnp.sin(logits_BLV)), logits_BLV

  return jax.grad(loss, has_aux=True)(params)


def count_in_forward(name, model, params):
  run = lambda p: models.apply(model, p, TOKEN_BL, segment_BL=SEGMENT_BL, position_BL=POSITION_BL)
  return len(re.findall(rf"\b{name}\b.*\[", str(jax.make_jaxpr(run)(params))))


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)


def test_scan_equals_unrolled(cfg, make):
  """Three layers: of two kinds by turns, one is left over."""
  unrolled, params = make(cfg)
  scanned, _ = make(cfg, layers="scan")
  assert count_in_forward("scan", unrolled, params) == 0
  assert count_in_forward("scan", scanned, params) == 1
  assert_same(loss_gradient(unrolled, params), loss_gradient(scanned, params))


def count_in_gradient(name, model, params):
  run = functools.partial(loss_gradient.__wrapped__, model)
  return len(re.findall(rf"\b{name}\[", str(jax.make_jaxpr(run)(params))))


def test_remat_and_scan_change_no_number_and_no_dropout_mask(llama, make):
  changes = {"num_layers": 2, "attention_window": 3}
  plain, params = make(llama, **changes)
  unrolled, _ = make(llama, **changes, remat="full")
  scanned, _ = make(llama, **changes, remat="products", layers="scan")
  expected = loss_gradient(plain, params, jax.random.key(0))
  assert_same(expected, loss_gradient(unrolled, params, jax.random.key(0)))
  assert_same(expected, loss_gradient(scanned, params, jax.random.key(0)))


@pytest.mark.parametrize("how", ["unroll", "scan"])
def test_what_a_layer_computes_again_for_its_gradient(cfg, make, how):
  def products(remat):
    model, params = make(cfg, num_layers=2, layers=how, remat=remat)
    return count_in_gradient("dot_general", model, params)

  # A turn of the scan holds two layers where two kinds of them alternate.
  bodies = 1 if how == "scan" and len(positions.layer_kinds(cfg)) == 1 else 2
  # The scores, no product with weights; or also qkv, the values' mean, its projection, the mlp's first. Parallel
  # branches do not start from attention's projection; a norm after the mlp starts from its last product.
  assert products("products") == products("none") + bodies
  again = 5 - cfg.parallel_residual + cfg.sandwich_norm
  assert products("full") == products("none") + again * bodies


def test_weights_and_gradients_of_unrolled_layers_are_never_stacked(gpt2, make):
  model, params = make(gpt2)
  jaxpr = str(jax.make_jaxpr(functools.partial(loss_gradient.__wrapped__, model))(params))
  assert f"f32[{gpt2.d_mlp},{gpt2.d_model}]" in jaxpr
  assert f"f32[{gpt2.num_layers},{gpt2.d_mlp},{gpt2.d_model}]" not in jaxpr


def test_dropout_follows_its_key(llama, make):
  model, params = make(llama, num_layers=2, attention_window=3)
  one, again, other = (loss_gradient(model, params, jax.random.key(seed))[1] for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 0.1


def test_dropout_is_off_by_default_and_needs_a_key(gpt2, make):
  model, params = make(gpt2)
  run = functools.partial(
    models.apply, model, params, TOKEN_BL, segment_BL=SEGMENT_BL, position_BL=POSITION_BL
  )
  key_B = jax.random.split(jax.random.key(0), len(TOKEN_BL))
  off = jax.make_jaxpr(lambda key_B: run(dropout_key_B=key_B))(key_B)
  assert "random_bits" not in str(off)
  with pytest.raises(ValueError, match="dropout_rate=0.1 must come with dropout_key_B"):
    run(dropout_rate=0.1)


def test_bfloat16_compute_keeps_float32_outputs_and_gradients(llama, make):
  wide, params = make(llama, num_layers=2)
  narrow, _ = make(llama, num_layers=2, dtype="bfloat16")
  grads, logits_BLV = loss_gradient(narrow, params)
  expected = loss_gradient(wide, params)[1]
  assert {x.dtype for x in jax.tree.leaves((grads, logits_BLV))} == {jnp.dtype("float32")}
  error = np.abs(logits_BLV - expected).mean() / np.abs(expected).mean()
  assert 1e-4 < error < 0.05  # bfloat16 has 8 bits: not equal, not far


@pytest.mark.parametrize("layout", ["unroll", "scan"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_frozen_weights_are_half_the_size_and_give_the_same_bits(few, make, head, layout):
  model, params = make(few, head, dtype="bfloat16", layers=layout, tie_embeddings=False)
  frozen = models.frozen_weights(model, params)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  for path, leaf in jax.tree_util.tree_leaves_with_path(frozen["layers"]):
    is_of_norm = "norm" in jax.tree_util.keystr(path)
    assert leaf.dtype == (jnp.float32 if is_of_norm else jnp.bfloat16), path
  assert size(frozen["layers"]) < 0.6 * size(params["layers"])
  inputs = TOKEN_BL, SEGMENT_BL, POSITION_BL
  np.testing.assert_array_equal(forward(model, frozen, *inputs), forward(model, params, *inputs))
  wide, _ = make(few, head, layers=layout, tie_embeddings=False)
  jax.tree.map(np.testing.assert_array_equal, models.frozen_weights(wide, params), params)


def test_strict_dtypes(few, make):
  model, params = make(few, dtype="bfloat16")
  with jax.numpy_dtype_promotion("strict"):
    jax.eval_shape(
      lambda p: models.apply(
        model,
        p,
        jnp.asarray(TOKEN_BL),
        segment_BL=jnp.asarray(SEGMENT_BL),
        position_BL=jnp.asarray(POSITION_BL),
      ),
      params,
    )


def test_branches_of_a_tree_are_sequences_with_a_common_beginning(cfg, make):
  """Three answers of 2, 3 and 1 tokens after a prompt of 3, then a pad, beside each alone with its prompt."""
  model, params = make(cfg)
  tokens = TOKEN_BL[:1, :10]
  position_BL = np.array([[0, 1, 2, 3, 4, 3, 4, 5, 3, 0]], np.int32)
  last_BL = np.array([[8, 8, 8, 4, 4, 7, 7, 7, 8, -1]], np.int32)
  inputs = dict(segment_BL=(last_BL >= 0).astype(np.int32), position_BL=position_BL)
  tree_LV = models.apply(model, params, tokens, **inputs, last_BL=last_BL)[0]
  for branch in (range(3, 5), range(5, 8), range(8, 9)):
    columns = [0, 1, 2, *branch]
    alone = np.arange(len(columns))[None]
    whole = models.apply(
      model, params, tokens[:, columns], segment_BL=np.ones_like(alone), position_BL=alone
    )
    np.testing.assert_allclose(tree_LV[np.array(columns)], whole[0], rtol=1e-5, atol=1e-5)


def test_trees_need_attention_that_takes_any_mask(gpt2, make):
  model, params = make(gpt2, attention="splash")
  ones = np.ones_like(TOKEN_BL)
  with pytest.raises(ValueError, match="takes segments, not trees"):
    models.apply(model, params, TOKEN_BL, segment_BL=ones, position_BL=ones, last_BL=ones)


def test_unknown_head_is_refused(gpt2):
  with pytest.raises(ValueError, match="head='value' must be 'lm' or 'scalar'"):
    tiny.make_model(gpt2, VOCAB, "value")


def test_a_description_holds_a_network_and_no_auto():
  with pytest.raises(ValueError, match="must be a NetworkConfig, got ModelConfig"):
    tiny.make_model(tiny.CONFIG.model, VOCAB)
  with pytest.raises(ValueError, match="nothing may be left to 'auto'"):
    tiny.make_model(tiny.GPT2, VOCAB, layers="auto")
