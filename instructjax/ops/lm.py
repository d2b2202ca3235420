"""Log-probabilities of given tokens, and the language-model loss.

Called by models/lm_head.py. Imports no config and no model.
"""

import functools

import chex
import jax
import jax.numpy as jnp


def token_logprob(logits_BTV: jax.Array, token_BT: jax.Array) -> jax.Array:
  """log softmax(logits)[token] at every position, in nats.

  It is computed in float32 whatever the dtype of the logits. A position whose result is not used (its cotangent is 0)
  passes no gradient back, even if its logits are NaN or inf, so padding may hold anything. If tokens were sampled at a
  temperature, divide the logits by it first.

  Args:
    logits_BTV: unnormalised, float32 or bfloat16.
    token_BT: integer ids in [0, V); an id outside (the pad id is V) gives NaN, so mask it.
  Returns:
    float32 [B, T].
  """
  chex.assert_rank([logits_BTV, token_BT], [3, 2])
  chex.assert_equal_shape_prefix([logits_BTV, token_BT], 2)
  chex.assert_type([logits_BTV, token_BT], [float, int])
  return _token_logprob(logits_BTV, token_BT)


# The gradient is written by hand for two reasons. Autodiff multiplies a cotangent of 0 by the softmax of whatever is in
# the padding, and 0 * NaN is NaN. With bfloat16 logits it also needs one more float32 array of [B, T, V].
@jax.custom_vjp
def _token_logprob(logits_BTV, token_BT):
  return _token_logprob_fwd(logits_BTV, token_BT)[0]


def _token_logprob_fwd(logits_BTV, token_BT):
  lse_BT = jax.nn.logsumexp(logits_BTV.astype(jnp.float32), axis=-1)
  picked_BT1 = jnp.take_along_axis(logits_BTV, token_BT[..., None], axis=-1)
  logprob_BT = picked_BT1[..., 0].astype(jnp.float32) - lse_BT
  return logprob_BT, (logits_BTV, token_BT, lse_BT)


def _token_logprob_bwd(residuals, g_BT):
  logits_BTV, token_BT, lse_BT = residuals
  vocab_V = jnp.arange(logits_BTV.shape[-1], dtype=token_BT.dtype)
  onehot_BTV = (token_BT[..., None] == vocab_V[None, None]).astype(jnp.float32)
  prob_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - lse_BT[..., None])
  g_BT1 = g_BT[..., None]
  grad_BTV = jnp.where(g_BT1 != 0, g_BT1 * (onehot_BTV - prob_BTV), 0)
  return grad_BTV.astype(logits_BTV.dtype), None


_token_logprob.defvjp(_token_logprob_fwd, _token_logprob_bwd)


def lm_loss(
  logits_BTV: jax.Array, token_BT: jax.Array, weight_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of the tokens' negative log-likelihoods, in nats, and the sum of the weights.

  Their quotient is the mean. They are returned apart because a mean over microbatches is the quotient of two sums, not
  a mean of means.

  Args:
    logits_BTV: prediction of token_BT at the same index (already shifted).
    token_BT: integer ids in [0, V) where the weight is not 0.
    weight_BT: float; 0 at prompts and padding, where logits may hold anything.
  Returns:
    (sum_nll, sum_weight), float32 scalars.
  """
  chex.assert_equal_shape([token_BT, weight_BT])
  chex.assert_type(weight_BT, float)
  weight_BT = weight_BT.astype(jnp.float32)
  nll_BT = -token_logprob(logits_BTV, token_BT)
  # A select besides the weight: 0 * NaN would be NaN.
  return jnp.sum(weight_BT * jnp.where(weight_BT != 0, nll_BT, 0)), jnp.sum(weight_BT)


# Bytes of float32 logits that exist at once if a loss is computed in blocks.
LOGITS_BYTES = 128 * 2**20


def num_blocks(num_tokens: int, vocab_size: int, width: int) -> int:
  """Number of blocks of tokens in which a loss is computed: the fewest that keep a block's float32 logits in bounds.

  The bound is LOGITS_BYTES, or the table's size if that is more. Each block adds to the table's gradient, so for small
  blocks these additions would take as long as the products. The gradient, of the table's size, is in memory anyway.

  Args:
    num_tokens: tokens of the batch.
    vocab_size: rows of the table.
    width: columns of the table.
  """
  return -(-num_tokens * vocab_size * 4 // max(LOGITS_BYTES, vocab_size * width * 4))


def blocked_lm_loss(
  h_BTD: jax.Array,
  table_VD: jax.Array,
  token_BT: jax.Array,
  weight_BT: jax.Array,
  num_blocks: int,
) -> tuple[jax.Array, jax.Array]:
  """`lm_loss` of the logits h_BTD @ table_VD.T, which exist for one block of tokens at a time.

  The loss is a weighted sum with known weights, so the gradient of a token's logits is known, up to one factor for the
  whole loss, as soon as they are computed. The forward pass therefore turns each block's logits into gradients at once,
  and nothing is computed twice. The weights are constants: no gradient reaches them.

  Args:
    h_BTD: the head's input, float32 or bfloat16. It may hold anything where the weight is 0.
    table_VD: the head's weights. They are multiplied in the dtype of h, and their gradient has their own dtype.
    token_BT, weight_BT: as for `lm_loss`.
    num_blocks: blocks of equally many tokens; the last one is padded.
  Returns:
    (sum_nll, sum_weight), float32 scalars.
  """
  blocks = _blocks(h_BTD.astype(jnp.float32), token_BT, weight_BT, num_blocks)
  sum_nll = _sum_nll(h_BTD.dtype, table_VD.astype(jnp.float32), *blocks)
  return sum_nll, jnp.sum(weight_BT.astype(jnp.float32))


def blocked_logprob(
  h_BTD: jax.Array,
  table_VD: jax.Array,
  token_BT: jax.Array,
  is_token_BT: jax.Array,
  num_blocks: int,
  temperature: float = 1.0,
) -> jax.Array:
  """`token_logprob` of the logits h_BTD @ table_VD.T / temperature, which exist for one block of tokens at a time.

  Unlike the weights of `blocked_lm_loss`, the cotangents are not known in the forward pass. So the backward pass
  computes each block's logits again.

  Args:
    h_BTD, table_VD, token_BT, num_blocks: as for `blocked_lm_loss`.
    is_token_BT: False at pads; there h and token may hold anything.
    temperature: static.
  Returns:
    float32 [B, T], in nats; 0 where `is_token_BT` is False.
  """
  weight_BT = is_token_BT.astype(jnp.float32)

  one = functools.partial(_block_logprob, table_VD, h_BTD.dtype, temperature)
  # Inside a loop, recomputation has no expression in common with the forward pass: no barrier against CSE is needed.
  one = jax.checkpoint(one, prevent_cse=False)
  logprob_NT = jax.lax.map(one, _blocks(h_BTD, token_BT, weight_BT, num_blocks))
  return logprob_NT.reshape(-1)[: token_BT.size].reshape(token_BT.shape)


def _blocks(h_BTD, token_BT, weight_BT, num_blocks):
  """Splits (h, token, weight) into [blocks, tokens of a block], in order. Tokens that fill the last block weigh 0."""
  chex.assert_rank([h_BTD, token_BT], [3, 2])
  chex.assert_equal_shape([token_BT, weight_BT])
  chex.assert_equal_shape_prefix([h_BTD, token_BT], 2)
  chex.assert_type([h_BTD, token_BT, weight_BT], [float, int, float])
  weight_BT = weight_BT.astype(jnp.float32)
  # The table's gradient is a product with h. A logit's gradient of 0 times NaN in h would be NaN there.
  h_BTD = jnp.where(weight_BT[..., None] != 0, h_BTD, 0)
  size = -(-token_BT.size // num_blocks)

  def split(x):
    x = x.reshape(token_BT.size, *x.shape[2:])
    fill = (0, size * num_blocks - token_BT.size)
    return jnp.pad(x, (fill, *((0, 0),) * (x.ndim - 1))).reshape(num_blocks, size, *x.shape[1:])

  return split(h_BTD), split(token_BT), split(weight_BT)


def _logits(h_TD, table_VD):
  # Contracted over the table's last dimension, as it is stored: through a transposed copy this takes 1.7 times as long
  # on a CPU.
  return jnp.einsum("TD,VD->TV", h_TD, table_VD, preferred_element_type=jnp.float32)


def _block_logprob(table_VD, dtype, temperature, block):
  """Log-probabilities of a block (h_TD, token_T, weight_T); 0 where the weight is 0."""
  h_TD, token_T, weight_T = block
  logits_TV = _logits(h_TD.astype(dtype), table_VD.astype(dtype)) / temperature
  return jnp.where(weight_T != 0, token_logprob(logits_TV[None], token_T[None])[0], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_nll(dtype, table_VD, h_NTD, token_NT, weight_NT):
  # Used where no gradient is asked for; with one, JAX calls `_sum_nll_fwd` in its place.
  one = functools.partial(_block_logprob, table_VD, dtype, 1.0)
  return -jnp.sum(weight_NT * jax.lax.map(one, (h_NTD, token_NT, weight_NT)))


def _sum_nll_fwd(dtype, table_VD, h_NTD, token_NT, weight_NT):
  """Returns (sum_nll, residuals); the residuals are the gradients themselves, for a cotangent of 1."""
  low_VD = table_VD.astype(dtype)
  vocab_V = jnp.arange(table_VD.shape[0], dtype=token_NT.dtype)

  def one(d_table_VD, block):
    h_TD, token_T, weight_T = block
    h_TD, token_T1, weight_T1 = h_TD.astype(dtype), token_T[:, None], weight_T[:, None]
    logits_TV = _logits(h_TD, low_VD)
    # One exp serves both the loss, whose logsumexp is log(sum) + max, and the softmax of the gradient.
    max_T1 = jnp.max(logits_TV, axis=-1, keepdims=True)
    exp_TV = jnp.exp(logits_TV - max_T1)
    sum_T1 = jnp.sum(exp_TV, axis=-1, keepdims=True)
    picked_T1 = jnp.take_along_axis(logits_TV, token_T1, axis=-1)
    nll_T1 = jnp.log(sum_T1) + max_T1 - picked_T1
    onehot_TV = token_T1 == vocab_V[None]
    # weight * (softmax - onehot), divided by the sum as a column, which spares a pass over [T, V].
    d_logits_TV = weight_T1 / sum_T1 * exp_TV - jnp.where(onehot_TV, weight_T1, 0)
    # The gradient of the logits stays float32 in these products, even if h and the table are bfloat16.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_h_TD = product("TV,VD->TD", d_logits_TV, low_VD)
    d_table_VD += product("TV,TD->VD", d_logits_TV, h_TD)
    return d_table_VD, (jnp.where(weight_T1 != 0, weight_T1 * nll_T1, 0), d_h_TD)

  d_table_VD, (nll_NT1, d_h_NTD) = jax.lax.scan(
    one, jnp.zeros(table_VD.shape, jnp.float32), (h_NTD, token_NT, weight_NT)
  )
  return jnp.sum(nll_NT1), (d_table_VD, d_h_NTD)


def _sum_nll_bwd(dtype, residuals, g):
  d_table_VD, d_h_NTD = residuals
  return g * d_table_VD, g * d_h_NTD, None, None


_sum_nll.defvjp(_sum_nll_fwd, _sum_nll_bwd)
