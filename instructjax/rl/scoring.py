"""Log-probabilities, values and reward-model scores of given tokens, by full forward passes.

Called by step.py and experience.py, by stages/rm.py and stages/answers.py, and by serve/speaker.py. Columns are those
of a rollout: a left-padded prompt of P columns, then the response. The network predicts, and values, a response token
in column t from column t - 1 (details item 21), so the heads are computed for columns P - 1 .. L - 2 only.

`segment_BL` says which columns hold tokens. If a row holds one sequence, it may be booleans. If it holds several
(shared_rows.py), it has their numbers from 1, and 0 at pads. If it holds trees (shared_prompts.py), it is a `Trees`. In
both cases pass a prompt length of 1, which includes every column but the first.
"""

import jax.numpy as jnp

from instructjax.core.structs import Array, Params, Trees
from instructjax.models import lm_head, positions, transformer


def _inputs(segment_BL: Array | Trees, window) -> dict:
  """Keyword arguments of a forward pass; booleans become segment 1."""
  if isinstance(segment_BL, Trees):
    return dict(
      segment_BL=segment_BL.segment_BL,
      position_BL=segment_BL.position_BL,
      last_BL=segment_BL.last_BL,
      window=window,
    )
  segment_BL = segment_BL.astype(jnp.int32)
  position_BL = positions.from_segments(segment_BL)
  return dict(segment_BL=segment_BL, position_BL=position_BL, window=window)


def response_logprob(
  model: transformer.Model,
  params: Params,
  token_BL: Array,
  segment_BL: Array | Trees,
  *,
  prompt_length: int,
  temperature: float,
) -> Array:
  """Log-probability of each response token.

  Args:
    model, params: with an 'lm' head.
    token_BL, segment_BL: see the module's docstring.
    prompt_length: P, static.
    temperature: the one that the tokens were sampled at, by which logits are divided (details item 19). With another
      one the KL is wrong from the first step.
  Returns:
    float32 [B, R], in nats; zero at pads.
  """
  window = (prompt_length - 1, token_BL.shape[1] - 1)
  inputs = _inputs(segment_BL, window)
  h_BRD, params = transformer.hidden(model, params, token_BL, **inputs)
  token_BR, is_token_BR = token_BL[:, prompt_length:], inputs["segment_BL"][:, prompt_length:] > 0
  return lm_head.token_logprob(model, params, h_BRD, token_BR, is_token_BR, temperature)


def response_value(
  model: transformer.Model,
  params: Params,
  token_BL: Array,
  segment_BL: Array | Trees,
  *,
  prompt_length: int,
) -> Array:
  """The value network's estimate before each response token, float32 [B, R], in units of reward."""
  # Token t's value is read at column t - 1: before the token is known (details item 21).
  window = (prompt_length - 1, token_BL.shape[1] - 1)
  return transformer.apply(model, params, token_BL, **_inputs(segment_BL, window))


def column_score(
  model: transformer.Model, params: Params, token_BL: Array, segment_BL: Array | Trees
) -> Array:
  """Reward-model score read at every column, float32 [B, L]; `at_last_token` picks the one of each row."""
  return transformer.apply(model, params, token_BL, **_inputs(segment_BL, None))


def sequence_score(
  model: transformer.Model,
  params: Params,
  token_BL: Array,
  is_token_BL: Array,
  skips: int | None = None,
) -> Array:
  """Reward-model score of each row, read at its last real token, which is the EOS if there is one (details item 13).

  Args:
    model, params: with a 'scalar' head.
    token_BL: int32 ids.
    is_token_BL: True on real tokens. Rows may be padded on the left, on the right or on both sides.
    skips: see `is_read`.
  Returns:
    float32 [B].
  """
  score_BL = column_score(model, params, token_BL, is_token_BL)
  return at_last_token(score_BL, is_read(token_BL, is_token_BL, skips))


def is_read(token_BL: Array, is_token_BL: Array, skips: int | None) -> Array:
  """Where the score of a row may be read: at its tokens, without those of the id `skips`.

  Hugging Face's classifiers read it at the last token that is not their pad token. If that is the EOS, as it often is,
  they read it just before the end.
  """
  return is_token_BL if skips is None else is_token_BL & (token_BL != skips)


def at_last_token(score_BL: Array, is_token_BL: Array) -> Array:
  """The score at each row's last real token, float32 [B]."""
  # argmax of booleans is the first True: counted from the end, that is the last token.
  last_B = score_BL.shape[1] - 1 - jnp.argmax(is_token_BL[:, ::-1], axis=1)
  return jnp.take_along_axis(score_BL, last_B[:, None], axis=1)[:, 0]
