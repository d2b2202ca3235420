"""Sampling: an exact draw, independent of layout and neighbours, that stops when every row has ended."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.core.structs import PromptBatch
from instructjax.parallel import sharding
from instructjax.rl import sampling, scoring
from tests import tiny

VOCAB, EOS, ROWS, PROMPT, RESPONSE, TEMPERATURE = 23, 0, 8, 4, 6, 0.7
KEY = jax.random.key(0)


def softmax(logits):
  mass = np.exp(np.asarray(logits, np.float64) - np.max(logits))
  return mass / mass.sum()


@pytest.fixture(scope="module")
def draw(quick_jit):
  """draw(logits_V, uniform_B, temperature, top_p): many draws from one distribution."""
  sample = quick_jit(sampling.sample_token, static_argnums=(2, 3))

  def one(logits_V, uniform_B, temperature=1.0, top_p=1.0):
    logits_BV = np.broadcast_to(np.float32(logits_V), (len(uniform_B), len(logits_V)))
    return jax.tree.map(np.asarray, sample(logits_BV, np.float32(uniform_B), temperature, top_p))

  return one


@pytest.mark.parametrize("vocab_size", [23, 256, 300, 1024])
def test_draws_invert_the_cumulative_distribution(draw, vocab_size):
  logits_V = np.random.default_rng(vocab_size).normal(0, 2, vocab_size)
  num_draws = 4096
  token_B, logprob_B = draw(logits_V, (np.arange(num_draws) + 0.5) / num_draws)
  # Evenly spread uniforms: a token that owns an interval of length p gets p * N of them, to within one.
  counts_V = np.bincount(token_B, minlength=vocab_size)
  np.testing.assert_array_less(np.abs(counts_V - softmax(logits_V) * num_draws), 1.02)
  assert np.all(np.diff(token_B) >= 0)
  np.testing.assert_allclose(logprob_B, np.log(softmax(logits_V))[token_B], atol=1e-5)


def test_draws_pass_a_chi_square_test(draw):
  logits_V, num_draws = np.random.default_rng(1).normal(0, 1, 300), 4096
  uniform_BR = sampling.row_uniforms(KEY, jnp.arange(num_draws // 8), 8)
  counts_V = np.bincount(draw(logits_V, np.ravel(uniform_BR))[0], minlength=300)
  expected_V = softmax(logits_V) * num_draws
  chi_square = np.sum((counts_V - expected_V) ** 2 / expected_V)
  assert chi_square < 299 + 4 * np.sqrt(2 * 299)  # four standard deviations over its mean


@pytest.mark.parametrize("vocab_size", [23, 600])
def test_a_token_without_mass_is_never_drawn(draw, vocab_size):
  rng = np.random.default_rng(2)
  logits_V = rng.normal(0, 2, vocab_size)
  logits_V[rng.random(vocab_size) < 0.5] = -np.inf
  logits_V[[0, -1]] = -1e30
  logits_V[256:512] = -np.inf  # a whole block, where there is one
  edges_V = np.float32(np.cumsum(softmax(logits_V)))
  edges = np.concatenate([edges_V, np.nextafter(edges_V, 0), np.nextafter(edges_V, 2)])
  uniform_B = np.concatenate(
    [[0.0, 1 - 2.0**-24], np.clip(edges, 0, np.nextafter(np.float32(1), 0))]
  )
  token_B, logprob_B = draw(logits_V, uniform_B)
  assert np.all(logits_V[token_B] > -1e29) and np.all(np.isfinite(logprob_B))
  has_mass_V = np.flatnonzero(logits_V > -1e29)
  assert (token_B[0], token_B[1]) == (has_mass_V[0], has_mass_V[-1])


def test_temperature_sharpens_and_zero_is_greedy(draw):
  logits_V, num_draws = np.random.default_rng(3).normal(0, 1, 23), 1024
  uniform_B = (np.arange(num_draws) + 0.5) / num_draws
  token_B, logprob_B = draw(logits_V, uniform_B, 0.5)
  prob_V = softmax(logits_V / 0.5)
  np.testing.assert_array_less(
    np.abs(np.bincount(token_B, minlength=23) - prob_V * num_draws), 1.02
  )
  np.testing.assert_allclose(logprob_B, np.log(prob_V)[token_B], atol=1e-5)
  token_B, logprob_B = draw(logits_V, uniform_B, 0.0)
  assert set(token_B) == {np.argmax(logits_V)}
  np.testing.assert_allclose(logprob_B, np.log(softmax(logits_V).max()), atol=1e-5)


def in_nucleus(logits_V, top_p):
  """True on the nucleus: sorted, the likeliest first, equal ones by id."""
  order = np.argsort(-logits_V, kind="stable")
  before = np.cumsum(softmax(logits_V)[order]) - softmax(logits_V)[order]
  is_in_V = np.zeros(len(logits_V), bool)
  is_in_V[order[before < top_p - 1e-7]] = True  # the one that crosses top_p is in
  return is_in_V


@pytest.mark.parametrize("vocab_size", [23, 300])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_draws_from_the_nucleus(draw, vocab_size, top_p):
  rng = np.random.default_rng(vocab_size)
  # Rows that are smooth, that tie (a few values only), that are flat, that have one token, or holes.
  logits_BV = rng.normal(0, 2, (5, vocab_size)).astype(np.float32)
  logits_BV[1] = np.round(logits_BV[1])
  logits_BV[2] = 1.0
  logits_BV[3] = np.where(np.arange(vocab_size) == 7, 0.0, -np.inf)
  logits_BV[4, rng.random(vocab_size) < 0.5] = -np.inf
  num_draws = 1024
  for logits_V in logits_BV:
    token_B, logprob_B = draw(logits_V, (np.arange(num_draws) + 0.5) / num_draws, 1.0, top_p)
    prob_V = np.where(in_nucleus(logits_V, top_p), softmax(logits_V), 0.0)
    prob_V /= prob_V.sum()
    counts_V = np.bincount(token_B, minlength=vocab_size)
    np.testing.assert_array_less(np.abs(counts_V - prob_V * num_draws), 1.02)
    np.testing.assert_allclose(logprob_B, np.log(prob_V[token_B]), atol=1e-5)


def test_top_p_of_one_is_the_plain_program():
  program = lambda *top_p: str(
    jax.make_jaxpr(lambda x_BV, u_B: sampling.sample_token(x_BV, u_B, 0.7, *top_p))(
      jnp.zeros((2, 300)), jnp.zeros(2)
    )
  )
  assert program() == program(1.0) != program(0.9)
  assert "while" not in program()


def test_uniforms_belong_to_key_row_and_step():
  uniforms = functools.partial(sampling.row_uniforms, num_steps=5)
  uniform_BR = np.asarray(uniforms(KEY, jnp.arange(6)))
  assert len(np.unique(uniform_BR)) == uniform_BR.size and np.all(
    (0 <= uniform_BR) & (uniform_BR < 1)
  )
  np.testing.assert_array_equal(uniforms(KEY, jnp.array([4, 1])), uniform_BR[[4, 1]])
  assert not np.any(uniform_BR == uniforms(jax.random.fold_in(KEY, 1), jnp.arange(6)))


def left_padded(prompts, length):
  token_BP = np.full((len(prompts), length), VOCAB, np.int32)
  for row_P, prompt in zip(token_BP, prompts):
    row_P[length - len(prompt) :] = prompt
  return PromptBatch(token_BP, token_BP != VOCAB, np.arange(len(prompts), dtype=np.int32))


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(4)
  lists = [rng.integers(1, VOCAB, 1 + row % PROMPT).tolist() for row in range(ROWS)]
  return left_padded(lists, PROMPT)


@pytest.fixture(scope="module")
def policy(tiny_config):
  cfg = dataclasses.replace(tiny_config, num_layers=2, attention_window=3)
  return tiny.make_model(cfg, VOCAB, "lm")


@pytest.fixture(scope="module")
def params(policy, random_params):
  """Random weights under which about a tenth of the tokens end the row."""
  return random_params(policy, 5)


@pytest.fixture(scope="module")
def generate(quick_jit, policy):
  return _jitted(quick_jit, policy)


def _jitted(quick_jit, policy, stop_ids=(EOS,)):
  kwargs = dict(max_new_tokens=RESPONSE, stop_ids=stop_ids)
  return quick_jit(
    lambda params, prompts, key, temperature: sampling.generate(
      policy, params, prompts, key, temperature=temperature, **kwargs
    ),
    static_argnums=3,
  )


@pytest.fixture(scope="module")
def rollout(generate, params, prompts):
  return jax.tree.map(np.asarray, generate(params, prompts, KEY, TEMPERATURE))


def test_details_5_no_id_beyond_the_vocabulary_has_a_logit_or_is_drawn(
  draw, policy, params, prompts
):
  weights = models.decode_weights(policy, params)
  cache = models.init_cache(policy, ROWS, PROMPT + 1)
  prefill = functools.partial(models.prefill, policy)
  logits_BV, cache = jax.eval_shape(prefill, weights, prompts.token_BP, prompts.is_prompt_BP, cache)
  assert logits_BV.shape == (ROWS, VOCAB)
  step = functools.partial(models.decode_step, policy)
  mask_BL = np.ones((ROWS, PROMPT + 1), bool)
  token_B = position_B = np.zeros(ROWS, np.int32)
  logits_BV, _ = jax.eval_shape(step, weights, token_B, position_B, PROMPT, mask_BL, cache)
  assert logits_BV.shape == (ROWS, VOCAB)
  for vocab_size in (VOCAB, 300):  # the draw works in blocks of 256: the last is not full
    highest, _ = draw(np.zeros(vocab_size), [1 - 2.0**-24])
    assert highest == vocab_size - 1


def test_details_4_eos_is_kept_and_pads_follow(rollout, prompts):
  response_BR, mask_BR = rollout.token_BL[:, PROMPT:], rollout.is_response_BR
  length_B = mask_BR.sum(1)
  np.testing.assert_array_equal(mask_BR, np.arange(RESPONSE)[None] < length_B[:, None])
  assert np.all(response_BR[~mask_BR] == VOCAB) and np.all(response_BR[mask_BR] < VOCAB)
  for row_R, length in zip(response_BR, length_B):
    assert EOS not in row_R[: length - 1]
    assert length == RESPONSE or row_R[length - 1] == EOS
  assert 1 <= length_B.min() < length_B.max()  # the weights do show both cases
  np.testing.assert_array_equal(rollout.token_BL[:, :PROMPT], prompts.token_BP)
  np.testing.assert_array_equal(rollout.is_token_BL, np.hstack([prompts.is_prompt_BP, mask_BR]))
  assert np.all(rollout.behaviour_logprob_BR[~mask_BR] == 0)


def test_a_row_ends_at_any_stop_token_and_is_the_same_until_then(
  quick_jit, policy, params, prompts, rollout
):
  length_B = rollout.is_response_BR.sum(1)
  longest = rollout.token_BL[np.argmax(length_B), PROMPT:]
  other = int(longest[1])  # a second stop token, which at least this row draws early
  assert other != EOS
  generate = _jitted(quick_jit, policy, (EOS, other))
  both = jax.tree.map(np.asarray, generate(params, prompts, KEY, TEMPERATURE))
  for row, (now_R, before_R) in enumerate(
    zip(both.token_BL[:, PROMPT:], rollout.token_BL[:, PROMPT:])
  ):
    stops = np.flatnonzero(np.isin(before_R, (EOS, other)))
    length = stops[0] + 1 if len(stops) else RESPONSE
    np.testing.assert_array_equal(now_R[:length], before_R[:length])
    assert np.all(now_R[length:] == VOCAB)
    assert both.is_response_BR[row].sum() == length
  assert both.is_response_BR.sum() < rollout.is_response_BR.sum()


def test_behaviour_logprob_is_what_scoring_says(quick_jit, policy, params, rollout):
  score = quick_jit(
    functools.partial(
      scoring.response_logprob, policy, prompt_length=PROMPT, temperature=TEMPERATURE
    )
  )
  logprob_BR = score(params, rollout.token_BL, rollout.is_token_BL)
  np.testing.assert_allclose(rollout.behaviour_logprob_BR, logprob_BR, atol=1e-5)
  assert np.all(rollout.behaviour_logprob_BR[rollout.is_response_BR] < 0)


def test_tokens_do_not_depend_on_the_mesh(generate, policy, params, prompts, rollout, mesh):
  _equal_on(mesh, generate, policy, params, prompts, rollout)


def test_tokens_do_not_depend_on_the_layout(quick_jit, policy, params, prompts, rollout):
  policy = dataclasses.replace(
    policy, execution=dataclasses.replace(policy.execution, decode_layout="2d")
  )
  mesh = sharding.make_mesh(MeshConfig(1, 2, 2, 2))
  _equal_on(mesh, _jitted(quick_jit, policy), policy, params, prompts, rollout)


def _equal_on(mesh, generate, policy, params, prompts, rollout):
  shardings = sharding.param_shardings(mesh, models.param_axes(policy), models.param_shapes(policy))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings), sharding.place_batch(mesh, prompts)
    sharded = generate(*placed, KEY, TEMPERATURE)
  for name in ("token_BL", "is_token_BL", "is_response_BR", "num_steps"):
    np.testing.assert_array_equal(getattr(sharded, name), getattr(rollout, name), err_msg=name)
  np.testing.assert_allclose(sharded.behaviour_logprob_BR, rollout.behaviour_logprob_BR, atol=1e-5)


def test_a_row_does_not_depend_on_the_others(generate, params, prompts, rollout):
  order = np.array([5, 2, 7, 1, 0, 3, 4, 6])
  other = left_padded(np.full((ROWS, PROMPT), 9).tolist(), PROMPT)
  kept = order < 4  # the other rows get another prompt, all rows another place
  mixed = jax.tree.map(
    lambda mine, others: np.where(kept.reshape(-1, *[1] * (mine.ndim - 1)), mine[order], others),
    prompts,
    other,
  )
  mixed = PromptBatch(mixed.token_BP, mixed.is_prompt_BP, order.astype(np.int32))
  again = generate(params, mixed, KEY, TEMPERATURE)
  np.testing.assert_array_equal(np.asarray(again.token_BL)[kept], rollout.token_BL[order[kept]])
  assert not np.array_equal(again.token_BL, rollout.token_BL[order])


def test_details_3_left_padding_changes_nothing(generate, params, prompts, rollout):
  pad = 3
  wide = PromptBatch(
    np.pad(
      prompts.token_BP, ((0, 0), (pad, 0)), constant_values=7
    ),  # what stands in a pad is no matter
    np.pad(prompts.is_prompt_BP, ((0, 0), (pad, 0))),
    prompts.index_B,
  )
  moved = generate(params, wide, KEY, TEMPERATURE)
  np.testing.assert_array_equal(
    np.asarray(moved.token_BL)[:, pad + PROMPT :], rollout.token_BL[:, PROMPT:]
  )
  np.testing.assert_allclose(moved.behaviour_logprob_BR, rollout.behaviour_logprob_BR, atol=1e-5)


def test_details_7_rows_and_keys_sample_differently(generate, params, rollout):
  same = left_padded([[3, 4]] * ROWS, PROMPT)
  first, second = (
    np.asarray(generate(params, same, key, TEMPERATURE).token_BL)[:, PROMPT:]
    for key in (KEY, jax.random.fold_in(KEY, 1))
  )
  assert len(np.unique(first, axis=0)) > ROWS // 2
  assert np.mean(np.any(first != second, axis=1)) > 0.5


def _with_eos_logit(params, logit):
  """Weights whose logits are `logit` for EOS and 0 for every other token, whatever the input."""
  bias_D, table_VD = np.zeros(16, np.float32), np.array(params["embedding"]["token_VD"])
  bias_D[0], table_VD[:, 0], table_VD[EOS, 0] = 1.0, 0.0, logit
  final_norm = {"scale_D": jnp.zeros(16), "bias_D": jnp.asarray(bias_D)}
  embedding = params["embedding"] | {"token_VD": jnp.asarray(table_VD)}
  return params | {"final_norm": final_norm, "embedding": embedding}


@pytest.mark.parametrize(
  ("eos_logit", "steps"), [(50.0, {1}), (3.5, {2, 3, 4, 5}), (-50.0, {RESPONSE})]
)
def test_decoding_stops_when_every_row_has_ended(generate, params, prompts, eos_logit, steps):
  rollout = generate(_with_eos_logit(params, eos_logit), prompts, KEY, TEMPERATURE)
  length_B = np.sum(rollout.is_response_BR, axis=1)
  # num_steps counts the bodies that ran, and the draw before them: a row of every step is longest.
  assert int(rollout.num_steps) == length_B.max() and int(rollout.num_steps) in steps
  assert np.any(np.asarray(rollout.token_BL)[:, PROMPT:] == EOS) == (eos_logit > -50)


def test_several_decode_loops_are_one(
  quick_jit, monkeypatch, generate, policy, params, prompts, rollout
):
  """Three loops of two steps, and rings for the banded layer; whether the last row ends in the first or the last."""
  monkeypatch.setattr(sampling, "_LEAST_STEPS", 2)
  assert [stop for _, stop in sampling.decode_loops("scan", RESPONSE)] == [2, 4, 6]
  scanned = dataclasses.replace(policy.execution, layers="scan")
  in_loops = _jitted(quick_jit, policy.clone(execution=scanned))
  early = _with_eos_logit(params, 50.0)
  for weights, expected in (
    (params, rollout),
    (early, generate(early, prompts, KEY, TEMPERATURE)),
  ):
    found = in_loops(weights, prompts, KEY, TEMPERATURE)
    for name in ("token_BL", "is_token_BL", "is_response_BR", "num_steps", "slot_steps"):
      np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.behaviour_logprob_BR, expected.behaviour_logprob_BR, atol=1e-5)


def test_greedy_takes_the_best_token_whatever_the_key(generate, params, prompts):
  first, second = (generate(params, prompts, key, 0.0) for key in (KEY, jax.random.key(9)))
  np.testing.assert_array_equal(first.token_BL, second.token_BL)


def test_what_is_left_of_a_uniform_inside_its_block_is_never_negative():
  """Targets at the very edge of a block, where rounding may put them before it.

  A negative rest would pick the block's first token, which may have no mass.
  """
  mass_BT = np.random.default_rng(0).random((64, 300), np.float32)
  target_B = np.asarray(jnp.cumsum(mass_BT, axis=-1))[:, 150]
  index_B, left_B = sampling._pick(mass_BT, target_B)
  assert np.all(index_B == 151)
  assert np.all(left_B >= 0) and np.any(left_B == 0)
