"""Scoring: each response token at the column before it, at sampling's temperature, whatever the padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.rl import scoring
from tests import tiny

VOCAB, PROMPT, LENGTH = 23, 4, 10
NUM_PAD_B, STOP_B = np.array([[0], [2], [3]]), np.array([[10], [8], [6]])
IS_TOKEN_BL = (np.arange(LENGTH)[None] >= NUM_PAD_B) & (np.arange(LENGTH)[None] < STOP_B)
# Token 22 stands at no real place.
TOKEN_BL = np.where(IS_TOKEN_BL, np.random.default_rng(0).integers(0, 22, (3, LENGTH)), VOCAB)
MASK_BR = IS_TOKEN_BL[:, PROMPT:]


@pytest.fixture(scope="module")
def policy(tiny_config, random_params):
  cfg = dataclasses.replace(tiny_config, tie_embeddings=False)
  model = tiny.make_model(cfg, VOCAB, "lm")
  return model, random_params(model, 1)


@pytest.fixture(scope="module")
def scalar(tiny_config, random_params):
  model = tiny.make_model(tiny_config, VOCAB, "scalar")
  return model, random_params(model, 2)


@pytest.fixture(scope="module")
def forward(quick_jit):
  """The whole forward pass, no window."""

  def apply(model, params, token_BL, is_token_BL):
    return models.apply(
      model,
      params,
      token_BL,
      segment_BL=is_token_BL.astype(jnp.int32),
      position_BL=models.positions_from_mask(is_token_BL),
    )

  return quick_jit(apply, static_argnums=0)


@pytest.fixture(scope="module")
def logprob(quick_jit):
  jitted = quick_jit(
    functools.partial(scoring.response_logprob, prompt_length=PROMPT),
    static_argnums=0,
    static_argnames="temperature",
  )
  return lambda *args, temperature=1.0: np.asarray(jitted(*args, temperature=temperature))


@pytest.fixture(scope="module")
def value(quick_jit):
  jitted = quick_jit(
    functools.partial(scoring.response_value, prompt_length=PROMPT), static_argnums=0
  )
  return lambda *args: np.asarray(jitted(*args))


@pytest.fixture(scope="module")
def score(quick_jit):
  jitted = quick_jit(scoring.sequence_score, static_argnums=0)
  return lambda *args: np.asarray(jitted(*args))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_details_21_logprobs_are_read_one_column_before_their_token(
  policy, forward, logprob, temperature
):
  logits_BLV = np.asarray(forward(*policy, TOKEN_BL, IS_TOKEN_BL), np.float64) / temperature
  logprob_BLV = logits_BLV - np.log(np.exp(logits_BLV).sum(-1, keepdims=True))
  expected_BR = np.zeros(MASK_BR.shape)
  for row, step in zip(*np.nonzero(MASK_BR)):
    column = PROMPT + step
    expected_BR[row, step] = logprob_BLV[row, column - 1, TOKEN_BL[row, column]]
  got_BR = logprob(*policy, TOKEN_BL, IS_TOKEN_BL, temperature=temperature)
  np.testing.assert_allclose(got_BR, expected_BR, atol=1e-5)


def test_details_21_values_are_of_the_state_before_each_token(scalar, forward, value):
  value_BR = value(*scalar, TOKEN_BL, IS_TOKEN_BL)
  value_BL = np.asarray(forward(*scalar, TOKEN_BL, IS_TOKEN_BL))
  np.testing.assert_allclose(value_BR, value_BL[:, PROMPT - 1 : LENGTH - 1], atol=1e-5)
  changed_BL = TOKEN_BL.copy()
  changed_BL[:, PROMPT + 1] = (changed_BL[:, PROMPT + 1] + 1) % VOCAB
  changed_BR = value(*scalar, changed_BL, IS_TOKEN_BL)
  np.testing.assert_array_equal(
    changed_BR[:, :2], value_BR[:, :2]
  )  # step 1 is valued before it is seen
  assert not np.any(changed_BR[0, 2:] == value_BR[0, 2:])


def test_details_13_scores_are_read_at_the_last_real_token_wherever_pads_are(
  scalar, forward, score
):
  length = 6
  tokens = np.random.default_rng(3).integers(0, VOCAB, length)
  token_BL, is_token_BL = np.full((3, LENGTH), VOCAB), np.zeros((3, LENGTH), bool)
  for row, start in enumerate(
    (LENGTH - length, 0, 2)
  ):  # pads on the left, on the right, on both sides
    token_BL[row, start : start + length] = tokens
    is_token_BL[row, start : start + length] = True
  unpadded_BL = np.asarray(forward(*scalar, tokens[None], np.ones((1, length), bool)))
  expected_B = np.full(3, unpadded_BL[0, -1])
  np.testing.assert_allclose(score(*scalar, token_BL, is_token_BL), expected_B, atol=1e-5)
  last_B = STOP_B[:, 0] - 1
  expected_B = np.asarray(forward(*scalar, TOKEN_BL, IS_TOKEN_BL))[np.arange(3), last_B]
  np.testing.assert_allclose(score(*scalar, TOKEN_BL, IS_TOKEN_BL), expected_B, atol=1e-5)


def test_details_1_scores_and_values_are_of_prompt_and_response(scalar, value, score):
  """The same responses after other prompts: every score and every value is another."""
  prompt_BL = IS_TOKEN_BL & (np.arange(LENGTH)[None] < PROMPT)
  changed_BL = np.where(prompt_BL, (TOKEN_BL + 5) % VOCAB, TOKEN_BL)
  scores, values = (
    [read(*scalar, token_BL, IS_TOKEN_BL) for token_BL in (TOKEN_BL, changed_BL)]
    for read in (score, value)
  )
  assert np.all(np.abs(scores[0] - scores[1]) > 1e-4), scores
  assert np.all(np.abs(values[0] - values[1])[MASK_BR] > 1e-4), values


@pytest.mark.parametrize(
  "garbage", ["random ids", "an id outside", "a token whose weights are NaN"]
)
def test_details_3_what_stands_in_padding_changes_nothing(
  policy, scalar, logprob, value, score, garbage
):
  pad = {
    "random ids": np.random.default_rng(4).integers(0, VOCAB, TOKEN_BL.shape),
    "an id outside": -(2**30),
    "a token whose weights are NaN": VOCAB - 1,
  }[garbage]
  filled_BL = np.where(IS_TOKEN_BL, TOKEN_BL, pad)

  def poison(params):
    if not garbage.endswith("NaN"):
      return params
    table_VD = params["embedding"]["token_VD"].at[VOCAB - 1].set(jnp.nan)
    return params | {"embedding": params["embedding"] | {"token_VD": table_VD}}

  for read, (model, params) in ((logprob, policy), (value, scalar), (score, scalar)):
    clean = read(model, params, TOKEN_BL, IS_TOKEN_BL)
    dirty = read(model, poison(params), filled_BL, IS_TOKEN_BL)
    real = MASK_BR if clean.ndim == 2 else slice(None)
    np.testing.assert_array_equal(dirty[real], clean[real])
    assert np.all(np.isfinite(dirty[real]))
  assert np.all(logprob(*policy, filled_BL, IS_TOKEN_BL)[~MASK_BR] == 0)


def test_no_gradient_comes_from_padding(policy, quick_jit):
  model, params = policy
  filled_BL = np.where(IS_TOKEN_BL, TOKEN_BL, VOCAB - 1)

  def loss(params):
    table_VD = params["embedding"]["token_VD"].at[VOCAB - 1].set(jnp.nan)
    params = params | {"embedding": params["embedding"] | {"token_VD": table_VD}}
    return jnp.sum(
      scoring.response_logprob(
        model, params, filled_BL, IS_TOKEN_BL, prompt_length=PROMPT, temperature=0.7
      )
    )

  grads = quick_jit(jax.grad(loss))(params)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
  assert np.any(grads["head"]["w_VD"] != 0)
