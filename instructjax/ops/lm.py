"""Log-probabilities of given tokens and the language-model loss.

Called wherever logits are turned into numbers. Imports no config and no model.
"""

import functools

import chex
import jax
import jax.numpy as jnp


def token_logprob(logits_BTV: jax.Array, token_BT: jax.Array) -> jax.Array:
  """log softmax(logits)[token] at every position, in nats.

  Computed in float32 whatever the type of the logits. A position whose result is not used (its
  cotangent is 0) passes no gradient back even if its logits are NaN or inf, so padding may hold
  anything. Divide the logits by the sampling temperature before, where there is one.

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


# The gradient is by hand for two reasons. Autodiff multiplies a cotangent of 0 by the softmax of
# whatever stands in the padding, and 0 * NaN is NaN. And with bfloat16 logits it needs one more
# float32 array of [B, T, V].
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

  The mean is their quotient. They come apart so that a mean over several microbatches is right.

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
  return jnp.sum(weight_BT * jnp.where(weight_BT != 0, nll_BT, 0)), jnp.sum(weight_BT)


LOGITS_BYTES = 128 * 2**20  # of float32 logits that stand at once where a loss is taken in blocks


def num_blocks(num_tokens: int, vocab_size: int, width: int) -> int:
  """In how many blocks of tokens a loss is taken: as few as keep a block's float32 logits in bounds.

  The bound is LOGITS_BYTES, or the size of the table where that is more: each block adds to the table's gradient, which
  takes as long as the products where blocks are small, and has to stand anyhow.
  """
  return -(-num_tokens * vocab_size * 4 // max(LOGITS_BYTES, vocab_size * width * 4))


def blocked_lm_loss(
  h_BTD: jax.Array,
  table_VD: jax.Array,
  token_BT: jax.Array,
  weight_BT: jax.Array,
  num_blocks: int,
) -> tuple[jax.Array, jax.Array]:
  """`lm_loss` of the logits h_BTD @ table_VD.T, of which only those of a block of tokens stand at once.

  The sum is linear in each token's loss, so the pass that computes a block's logits turns them into gradients at once:
  nothing is computed twice. Weights are constants here: no gradient reaches them.

  Args:
    h_BTD: what the head multiplies with, float32 or bfloat16; where the weight is 0 it may hold anything.
    table_VD: the head's rows. They are multiplied in the dtype of h, and get their gradient in their own.
    token_BT, weight_BT: as `lm_loss` has them.
    num_blocks: of equally many tokens, save for padding.
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
  """`token_logprob` of the logits h_BTD @ table_VD.T / temperature, of which only those of a block stand at once.

  What becomes of a log-probability is not known here, so that a gradient has to compute a block's logits again.

  Args:
    h_BTD, table_VD, token_BT, num_blocks: as `blocked_lm_loss` has them.
    is_token_BT: where it is False, the rest may hold anything.
    temperature: static.
  Returns:
    float32 [B, T]; 0 where there is no token.
  """
  weight_BT = is_token_BT.astype(jnp.float32)

  one = functools.partial(_block_logprob, table_VD, h_BTD.dtype, temperature)
  one = jax.checkpoint(one, prevent_cse=False)  # a loop's body has no subexpressions in common
  logprob_NT = jax.lax.map(one, _blocks(h_BTD, token_BT, weight_BT, num_blocks))
  return logprob_NT.reshape(-1)[: token_BT.size].reshape(token_BT.shape)


def _blocks(h_BTD, token_BT, weight_BT, num_blocks):
  """(h, token, weight) with tokens in order, as [blocks, tokens of a block]; what fills the last one weighs 0."""
  chex.assert_rank([h_BTD, token_BT], [3, 2])
  chex.assert_equal_shape([token_BT, weight_BT])
  chex.assert_equal_shape_prefix([h_BTD, token_BT], 2)
  chex.assert_type([h_BTD, token_BT, weight_BT], [float, int, float])
  weight_BT = weight_BT.astype(jnp.float32)
  # A gradient of 0 times NaN would be NaN in the table's.
  h_BTD = jnp.where(weight_BT[..., None] != 0, h_BTD, 0)
  size = -(-token_BT.size // num_blocks)

  def split(x):
    x = x.reshape(token_BT.size, *x.shape[2:])
    fill = (0, size * num_blocks - token_BT.size)
    return jnp.pad(x, (fill, *((0, 0),) * (x.ndim - 1))).reshape(num_blocks, size, *x.shape[1:])

  return split(h_BTD), split(token_BT), split(weight_BT)


def _logits(h_TD, table_VD):
  # Contracted as the table lies: a transposed copy costs 1.7 times as much on CPU.
  return jnp.einsum("TD,VD->TV", h_TD, table_VD, preferred_element_type=jnp.float32)


def _block_logprob(table_VD, dtype, temperature, block):
  h_TD, token_T, weight_T = block
  logits_TV = _logits(h_TD.astype(dtype), table_VD.astype(dtype)) / temperature
  return jnp.where(weight_T != 0, token_logprob(logits_TV[None], token_T[None])[0], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_nll(dtype, table_VD, h_NTD, token_NT, weight_NT):
  one = functools.partial(_block_logprob, table_VD, dtype, 1.0)
  return -jnp.sum(weight_NT * jax.lax.map(one, (h_NTD, token_NT, weight_NT)))


def _sum_nll_fwd(dtype, table_VD, h_NTD, token_NT, weight_NT):
  low_VD = table_VD.astype(dtype)
  vocab_V = jnp.arange(table_VD.shape[0], dtype=token_NT.dtype)

  def one(d_table_VD, block):
    h_TD, token_T, weight_T = block
    h_TD, token_T1, weight_T1 = h_TD.astype(dtype), token_T[:, None], weight_T[:, None]
    logits_TV = _logits(h_TD, low_VD)
    max_T1 = jnp.max(logits_TV, axis=-1, keepdims=True)
    exp_TV = jnp.exp(logits_TV - max_T1)
    sum_T1 = jnp.sum(exp_TV, axis=-1, keepdims=True)
    picked_T1 = jnp.take_along_axis(logits_TV, token_T1, axis=-1)
    nll_T1 = jnp.log(sum_T1) + max_T1 - picked_T1
    onehot_TV = token_T1 == vocab_V[None]
    d_logits_TV = weight_T1 / sum_T1 * exp_TV - jnp.where(onehot_TV, weight_T1, 0)
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
