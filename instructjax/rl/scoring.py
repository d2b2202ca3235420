"""Log-probabilities, values and rewards of given tokens: the full forward passes of PPO, collecting and evaluation.

Columns follow the rollout's layout: left-padded prompt of P columns, then the response. A response token at column t is
predicted, and valued, from column t - 1 (details item 21), so heads run on columns P-1 .. L-2 only.

`segment_BL` says which columns are tokens: booleans where a row holds one sequence, or, where it holds several
(shared_rows.py), the number of each from 1, and 0 at pads. The prompt length then is 1: every column but the first
counts.
"""

import jax.numpy as jnp

from instructjax.core.structs import Array, Params
from instructjax.models import lm_head, transformer


def _inputs(segment_BL: Array, window) -> dict:
  segment_BL = segment_BL.astype(jnp.int32)
  position_BL = transformer.positions_from_segments(segment_BL)
  return dict(segment_BL=segment_BL, position_BL=position_BL, window=window)


def response_logprob(
  model: transformer.Model,
  params: Params,
  token_BL: Array,
  segment_BL: Array,
  *,
  prompt_length: int,
  temperature: float,
) -> Array:
  """Log-probability of each response token, float32 [B, R]; zero at pads.

  Logits are divided by the temperature: scoring at another one than sampling's makes the KL wrong from the first step
  (details item 19).
  """
  window = (prompt_length - 1, token_BL.shape[1] - 1)
  h_BRD, params = transformer.hidden(model, params, token_BL, **_inputs(segment_BL, window))
  token_BR, is_token_BR = token_BL[:, prompt_length:], segment_BL[:, prompt_length:] > 0
  return lm_head.token_logprob(model, params, h_BRD, token_BR, is_token_BR, temperature)


def response_value(
  model: transformer.Model,
  params: Params,
  token_BL: Array,
  segment_BL: Array,
  *,
  prompt_length: int,
) -> Array:
  """Value of the state before each response token, float32 [B, R]."""
  window = (prompt_length - 1, token_BL.shape[1] - 1)
  return transformer.apply(model, params, token_BL, **_inputs(segment_BL, window))


def column_score(
  model: transformer.Model, params: Params, token_BL: Array, segment_BL: Array
) -> Array:
  """Reward-model score read at every column, float32 [B, L]; `at_last_token` picks a row's."""
  return transformer.apply(model, params, token_BL, **_inputs(segment_BL, None))


def sequence_score(
  model: transformer.Model, params: Params, token_BL: Array, is_token_BL: Array
) -> Array:
  """Reward-model score read at each row's last real token (its EOS when it has one), float32 [B]. Details item 13.

  Rows may be padded on the left, on the right or both.
  """
  return at_last_token(column_score(model, params, token_BL, is_token_BL), is_token_BL)


def at_last_token(score_BL: Array, is_token_BL: Array) -> Array:
  """The score at each row's last real token, float32 [B]."""
  last_B = score_BL.shape[1] - 1 - jnp.argmax(is_token_BL[:, ::-1], axis=1)
  return jnp.take_along_axis(score_BL, last_B[:, None], axis=1)[:, 0]
