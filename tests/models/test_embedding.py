"""The embedding: rows of the tables by hand, pads, and the gradient of a table that is tied to the head."""

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import models
from instructjax.models import embedding

VOCAB = 19
TOKEN_BL = np.array([[3, 7, 0, 18, 5], [2, 2, 9, 4, 6]], np.int32)
SEGMENT_BL = np.array([[1, 1, 2, 2, 0], [0, 1, 1, 1, 1]], np.int32)
POSITION_BL = np.array([[0, 1, 0, 1, 0], [0, 0, 1, 2, 3]], np.int32)


def test_a_row_is_the_sum_of_its_token_and_its_position(gpt2, make):
  model, params = make(gpt2)
  tables = params["embedding"]
  h_BLD, segment_BL, _ = embedding.embed(model, params, TOKEN_BL, SEGMENT_BL, POSITION_BL)
  expected_BLD = tables["token_VD"][TOKEN_BL] + tables["position_TD"][POSITION_BL]
  is_token_BL = SEGMENT_BL > 0
  np.testing.assert_array_equal(h_BLD[is_token_BL], expected_BLD[is_token_BL])
  assert not np.any(h_BLD[~is_token_BL])
  np.testing.assert_array_equal(segment_BL, SEGMENT_BL)


def test_details_2_ids_outside_the_vocabulary_are_pads_even_inside_a_segment(gpt2, make):
  model, params = make(gpt2)
  token_BL = TOKEN_BL.copy()
  token_BL[0, 1], token_BL[1, 3] = VOCAB, -1
  h_BLD, segment_BL, _ = embedding.embed(model, params, token_BL, SEGMENT_BL, POSITION_BL)
  without_BL = SEGMENT_BL.copy()
  without_BL[0, 1] = without_BL[1, 3] = 0
  np.testing.assert_array_equal(segment_BL, without_BL)
  expected_BLD, _, _ = embedding.embed(model, params, TOKEN_BL, without_BL, POSITION_BL)
  np.testing.assert_array_equal(h_BLD, expected_BLD)


def test_a_learned_position_past_the_table_is_nan_not_clipped(gpt2, make):
  model, params = make(gpt2)  # 16 positions
  h_BLD, _, _ = embedding.embed(model, params, TOKEN_BL, SEGMENT_BL, POSITION_BL + 13)
  last_BL = np.isnan(h_BLD).any(-1)
  np.testing.assert_array_equal(np.argwhere(last_BL), [[1, 4]])


def test_a_tied_table_gets_the_gradient_of_both_its_uses(gpt2, make):
  tied, params = make(gpt2)
  untied, _ = make(gpt2, tie_embeddings=False)
  tables = params | {"head": {"w_VD": params["embedding"]["token_VD"]}}

  def gradient(model, params):
    inputs = dict(segment_BL=SEGMENT_BL, position_BL=POSITION_BL)
    total = lambda params: jnp.sum(jnp.sin(models.apply(model, params, TOKEN_BL, **inputs)))
    return jax.grad(total)(params)

  parts = gradient(untied, tables)
  both = parts["embedding"]["token_VD"] + parts["head"]["w_VD"]
  got = gradient(tied, params)["embedding"]["token_VD"]
  np.testing.assert_allclose(got, both, rtol=1e-5, atol=1e-5)
  assert np.abs(parts["embedding"]["token_VD"]).max() > 0.1 < np.abs(parts["head"]["w_VD"]).max()
