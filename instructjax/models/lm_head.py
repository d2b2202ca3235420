"""Log-probabilities and losses of given tokens, from the hidden states that `transformer.hidden` returns.

Called by train/supervised.py and rl/scoring.py. A large batch is taken in blocks of tokens, so that the logits of the
whole batch never exist. On a mesh the vocabulary is split as well: see split_table.py.
"""

import jax.numpy as jnp

from instructjax.core.structs import Array, Params
from instructjax.models import split_table, transformer
from instructjax.ops import lm
from instructjax.parallel import constraints


def _num_blocks(model: transformer.Model, token_BT: Array) -> int:
  """Number of blocks of tokens in which one device computes the head's product."""
  return lm.num_blocks(token_BT.size, model.vocab_size, model.network.d_model)


def token_logprob(
  model: transformer.Model,
  params: Params,
  h_BTD: Array,
  token_BT: Array,
  is_token_BT: Array,
  temperature: float = 1.0,
) -> Array:
  """Log-probability of each token: log softmax(logits / temperature)[token].

  Args:
    model: with an 'lm' head.
    params, h_BTD: as `transformer.hidden` returns them.
    token_BT: int32 ids, each at the column that predicts it.
    is_token_BT: False at pads; there h and token may hold anything.
    temperature: static; the one that the tokens were sampled at.
  Returns:
    float32 [B, T], in nats; 0 where `is_token_BT` is False.
  """
  table_VD = transformer.lm_table(model, params)
  if not constraints.on_one_device():
    table_VD = table_VD.astype(h_BTD.dtype)
    return split_table.token_logprob(h_BTD, table_VD, token_BT, is_token_BT, temperature)
  blocks = _num_blocks(model, token_BT)
  if blocks > 1:
    return lm.blocked_logprob(h_BTD, table_VD, token_BT, is_token_BT, blocks, temperature)
  logits_BTV = transformer.apply_head(model, params, h_BTD) / temperature
  return jnp.where(is_token_BT, lm.token_logprob(logits_BTV, token_BT), 0.0)


def loss_sums(
  model: transformer.Model, params: Params, h_BTD: Array, token_BT: Array, weight_BT: Array
) -> tuple[Array, Array]:
  """Language-model loss of given tokens: the weighted sum of their negative log-likelihoods, in nats.

  Args:
    model, params, h_BTD, token_BT: as for `token_logprob`.
    weight_BT: weight of each token; 0 at prompts and pads.
  Returns:
    (sum_nll, sum_weight), float32 scalars. Their quotient is the mean.
  """
  table_VD = transformer.lm_table(model, params)
  if not constraints.on_one_device():
    return split_table.loss_sums(h_BTD, table_VD.astype(h_BTD.dtype), token_BT, weight_BT)
  blocks = _num_blocks(model, token_BT)
  if blocks == 1:
    return lm.lm_loss(transformer.apply_head(model, params, h_BTD), token_BT, weight_BT)
  return lm.blocked_lm_loss(h_BTD, table_VD, token_BT, weight_BT, blocks)
