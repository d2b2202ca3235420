"""A plain Flax linen step as a worker of benchmarks.sft_step: GPT-2's shape as one would write it in an hour.

flax.linen's own layers, optax.adam, jax.jit with the state donated. Imports nothing of instructjax.
"""

import argparse

import worker

worker.claim_stdout()  # before libraries that print

import flax  # noqa: E402
import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

LAYERS, WIDTH, HEADS, VOCAB, POSITIONS = 12, 768, 12, 50257, 1024
NORMAL = nn.initializers.normal(0.02)


class Block(nn.Module):
  """Attention, then two dense layers, each after a norm and added to what came in."""

  @nn.compact
  def __call__(self, h_BLD, mask_B1LL):
    x_BLD = nn.LayerNorm(epsilon=1e-5)(h_BLD)
    h_BLD = h_BLD + nn.MultiHeadDotProductAttention(HEADS, kernel_init=NORMAL)(
      x_BLD, mask=mask_B1LL
    )
    x_BLF = nn.Dense(4 * WIDTH, kernel_init=NORMAL)(nn.LayerNorm(epsilon=1e-5)(h_BLD))
    return h_BLD + nn.Dense(WIDTH, kernel_init=NORMAL)(nn.gelu(x_BLF))


class GPT2(nn.Module):
  """Logits of the next token."""

  @nn.compact
  def __call__(self, token_BL):
    table = nn.Embed(VOCAB, WIDTH, embedding_init=NORMAL)
    position = nn.Embed(POSITIONS, WIDTH, embedding_init=nn.initializers.normal(0.01))
    h_BLD = table(token_BL) + position(jnp.arange(token_BL.shape[1]))[None]
    mask_B1LL = nn.make_causal_mask(token_BL)
    for _ in range(LAYERS):
      h_BLD = Block()(h_BLD, mask_B1LL)
    return table.attend(nn.LayerNorm(epsilon=1e-5)(h_BLD))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", required=True, help="int32 [rows, length] in an .npy file")
  token_BL = jnp.asarray(np.load(parser.parse_args().tokens))
  model = GPT2()
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-5, b1=0.9, b2=0.95))

  def loss_fn(params):
    logits_BTV = model.apply(params, token_BL)[:, :-1]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, token_BL[:, 1:])
    return losses_BT.mean()

  def step(params, opt_state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  params = jax.jit(model.init)(jax.random.key(0), token_BL)
  opt_state = jax.jit(tx.init)(params)
  step = jax.jit(step, donate_argnums=(0, 1))

  def train() -> float:
    nonlocal params, opt_state
    params, opt_state, loss = step(params, opt_state)
    jax.block_until_ready((params, opt_state))
    return float(loss)

  def once() -> dict:
    train()
    return {}

  first_loss = train()
  train()
  worker.serve(
    once,
    {
      "parameters": sum(x.size for x in jax.tree.leaves(params)),
      "tokens": token_BL.size,
      "first_loss": first_loss,
      "libraries": f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}",
    },
  )


if __name__ == "__main__":
  main()
