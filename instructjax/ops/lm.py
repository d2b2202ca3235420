"""Log-probabilities of given tokens and the language-model loss.

Called wherever logits are turned into numbers. Imports no config and no model.
"""

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
