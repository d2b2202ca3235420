"""Six small episodes of several lengths, and networks to read them. Used by the tests of experience, rows and step."""

import jax
import numpy as np
import optax

from instructjax.core.structs import Rollout
from instructjax.rl.experience import Experience, Frozen, Nets
from tests import tiny

VOCAB, EOS, ROWS, PROMPT, RESPONSE = 23, 0, 6, 3, 5
STOP = 22  # ends an answer too, that of row 4
LENGTH = PROMPT + RESPONSE
RESPONSE_LENGTH_B = np.array([5, 1, 1, 5, 2, 1])
ENDS_B = np.array([True, True, True, False, True, True])  # row 3 is cut off by the limit
MASK_BR = np.arange(RESPONSE)[None] < RESPONSE_LENGTH_B[:, None]


def make_nets(tiny_config) -> Nets:
  policy, scalar = (tiny.make_model(tiny_config, VOCAB, head) for head in ("lm", "scalar"))
  tx = optax.sgd(1.0)
  return Nets(policy, scalar, tx, tx, stop_ids=(EOS, STOP), max_response_length=RESPONSE)


def make_weights(nets: Nets, random_params):
  """Policy and value weights, and the frozen ones: all different."""
  frozen = Frozen(random_params(nets.policy, 3), random_params(nets.scalar, 4))
  return random_params(nets.policy, 1), random_params(nets.scalar, 2), frozen


def tokens_and_mask():
  """(token_BL, is_token_BL); the rows have 8, 3, 3, 6, 5 and 4 tokens in some order."""
  rng = np.random.default_rng(0)
  is_prompt_BP = np.arange(PROMPT)[None] >= rng.integers(0, PROMPT, (ROWS, 1))
  is_token_BL = np.hstack([is_prompt_BP, MASK_BR])
  token_BL = np.minimum(rng.integers(1, VOCAB, (ROWS, LENGTH)), STOP - 1)
  for row in np.flatnonzero(ENDS_B):
    token_BL[row, PROMPT + RESPONSE_LENGTH_B[row] - 1] = STOP if row == 4 else EOS
  return np.where(is_token_BL, token_BL, VOCAB).astype(np.int32), is_token_BL


def make_rollout() -> Rollout:
  token_BL, is_token_BL = tokens_and_mask()
  logprob_BR = np.random.default_rng(1).uniform(-4, 0, MASK_BR.shape).astype(np.float32)
  return Rollout(
    token_BL=token_BL,
    is_token_BL=is_token_BL,
    is_response_BR=MASK_BR,
    behaviour_logprob_BR=np.where(MASK_BR, logprob_BR, 0),
    num_steps=np.int32(RESPONSE),
    slot_steps=np.int32(4 * ROWS),
  )


def make_experience() -> Experience:
  """The episodes with random numbers where a rollout's scores would stand."""
  token_BL, is_token_BL = tokens_and_mask()
  rng = np.random.default_rng(3)
  float_BR = lambda low, high: rng.uniform(low, high, MASK_BR.shape).astype(np.float32)
  return Experience(
    token_BL=token_BL,
    segment_BL=is_token_BL.astype(np.int32),
    is_response_BR=MASK_BR,
    is_actor_BR=MASK_BR & ENDS_B[:, None],
    behaviour_logprob_BR=float_BR(-4, -2),
    value_BR=float_BR(-1, 1),
    advantage_BR=float_BR(-2, 2),
    return_BR=float_BR(-2, 2),
    ref_logprob_BR=None,
  )


def assert_same_gradient(got, expected):
  """Equal in float32, to 1e-6 of the gradient's norm.

  Not to 1e-6 of each number: a number in which positive and negative shares nearly cancel is rounded as they are, so
  that its own size says nothing of its error.
  """
  got, expected = (
    np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]).astype(np.float64)
    for tree in (got, expected)
  )
  assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)
