"""What a language model's head says of given tokens, from what `transformer.hidden` returned.

Called by supervised.py and scoring.py. On one device a batch's logits never stand whole where they would be large: they
are taken in blocks of tokens.
"""

import jax.numpy as jnp

from instructjax.core.structs import Array, Params
from instructjax.models import transformer
from instructjax.ops import lm
from instructjax.parallel import constraints


def _num_blocks(model: transformer.Model, token_BT: Array) -> int:
  """In how many blocks the head's product is taken.

  One on a mesh of several devices: they hold a part of the logits each, split by rows and vocabulary, and would sum the
  table's gradient over the rows once a block instead of once.
  """
  if not constraints.on_one_device():
    return 1
  return lm.num_blocks(token_BT.size, model.vocab_size, model.network.d_model)


def token_logprob(
  model: transformer.Model,
  params: Params,
  h_BTD: Array,
  token_BT: Array,
  is_token_BT: Array,
  temperature: float = 1.0,
) -> Array:
  """log softmax(logits / temperature)[token], float32 [B, T], in nats; 0 where `is_token_BT` is False."""
  blocks = _num_blocks(model, token_BT)
  if blocks > 1:
    table_VD = transformer.lm_table(model, params)
    return lm.blocked_logprob(h_BTD, table_VD, token_BT, is_token_BT, blocks, temperature)
  logits_BTV = transformer.apply_head(model, params, h_BTD) / temperature
  return jnp.where(is_token_BT, lm.token_logprob(logits_BTV, token_BT), 0.0)


def loss_sums(
  model: transformer.Model, params: Params, h_BTD: Array, token_BT: Array, weight_BT: Array
) -> tuple[Array, Array]:
  """(sum of the tokens' negative log-likelihoods by weight, sum of weights), in nats."""
  blocks = _num_blocks(model, token_BT)
  if blocks == 1:
    return lm.lm_loss(transformer.apply_head(model, params, h_BTD), token_BT, weight_BT)
  table_VD = transformer.lm_table(model, params)
  return lm.blocked_lm_loss(h_BTD, table_VD, token_BT, weight_BT, blocks)
