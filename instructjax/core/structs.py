"""Dimension key, and the pytree dataclasses that travel between the parts. Imports nothing of the project.

Arrays end in dimension letters (`logprob_BR`):

  B batch (rows)      L prompt + response      P prompt         R response       T generic time
  C answers of one prompt (comparisons)        V vocabulary     N layers         D model width
  H query heads       G key/value heads        K head width     F mlp width
  S rows that several sequences share

The pad id is always `vocab_size` (one past the last real token): pads have no embedding and no logit, so a policy
cannot emit one, and EOS is never mistaken for padding (Departs from the common pad = EOS on purpose).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax

_Struct = TypeVar("_Struct")

Array = jax.Array
Params = Any  # nested dict of arrays


@dataclass_transform(frozen_default=True)  # for type checkers: what dataclasses.dataclass is
def pytree(cls: type[_Struct]) -> type[_Struct]:
  """Frozen dataclass registered as a JAX pytree; every field is a child."""
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def tree_of(struct: Callable[..., _Struct], **leaves: Any) -> _Struct:
  """One of a pytree dataclass that holds something else than JAX's arrays, in the same places.

  A batch is made of NumPy's arrays, and what `jax.jit` is told of a state holds a sharding for each array. The fields
  say Array, as most of the code sees them, so a type checker takes these two apart only where they are made: here.
  """
  return struct(**leaves)


@pytree
class PackedBatch:
  """Rows of packed token sequences for language modelling.

  Attributes:
    token_BL: int32 ids; `vocab_size` where there is no token.
    segment_BL: int32; 0 is padding, 1.. number the sequences of a row. Attention stays inside a segment.
    position_BL: int32 position inside the segment, from 0.
    weight_BL: float32 weight of predicting token_BL[:, t] from what precedes it in its segment: 0 for the first token
      of a segment, for pads and for prompts whose loss is masked.
  """

  token_BL: Array
  segment_BL: Array
  position_BL: Array
  weight_BL: Array


@pytree
class RankedBatch:
  """Prompts with up to C ranked answers each. An answer lies, behind its prompt, somewhere in S rows.

  Attributes:
    token_SL: int32 prompt + answer (with EOS when it has one), several to a row or one; `vocab_size` where there is no
      token.
    segment_SL: int32, 1.. for each answer of a row, 0 where there is no token.
    last_BC: int32 cell of each answer's last token, the rows taken as one; 0 where there is no answer.
    rank_BC: int32, 1 is best, equal ranks are ties; 0 where there is no answer.
    is_answer_BC: True where there is an answer.
  """

  token_SL: Array
  segment_SL: Array
  last_BC: Array
  rank_BC: Array
  is_answer_BC: Array


@pytree
class PromptBatch:
  """Left-padded prompts, so that all responses start at the same column.

  Attributes:
    token_BP: int32, left-padded with `vocab_size`.
    is_prompt_BP: True on real tokens.
    index_B: int32 row number in the global batch: the sampling key of a row is folded from it, so that what is sampled
      does not depend on how the batch is sharded.
  """

  token_BP: Array
  is_prompt_BP: Array
  index_B: Array


@pytree
class Rollout:
  """Sampled responses.

  Attributes:
    token_BL: int32 prompt (left-padded to P) and response (R, right-padded after the EOS).
    is_token_BL: True on real tokens.
    is_response_BR: True on response tokens, the EOS included: a prefix of each row.
    behaviour_logprob_BR: float32 log-probability of each response token under the distribution it was drawn from.
    num_steps: int32 scalar, decode steps taken (fewer than R when every row ended early).
    slot_steps: int32 scalar, tokens that these steps could have sampled: rows decoded at once, added up over the steps.
  """

  token_BL: Array
  is_token_BL: Array
  is_response_BR: Array
  behaviour_logprob_BR: Array
  num_steps: Array
  slot_steps: Array

  @property
  def prompt_length(self) -> int:
    """P, the columns before the response."""
    return self.token_BL.shape[1] - self.is_response_BR.shape[1]


@pytree
class Samples:
  """What a PPO iteration shows of its rollout.

  Attributes:
    rollout: the answers.
    score_B: float32 reward-model score of each, before what the config makes of a missing EOS.
    kl_B: float32 log-probability of each under the policy minus that under the reference, nats.
  """

  rollout: Rollout
  score_B: Array
  kl_B: Array


@pytree
class TrainState:
  """State of a supervised stage (pretrain, sft, ppo_init, rm)."""

  step: Array
  params: Params
  opt_state: Any
  key: Array


@pytree
class PPOState:
  """All that one PPO iteration changes and the next one needs.

  Attributes:
    step: int32 iterations done.
    params, opt_state: policy (float32 master weights) and its Adam state.
    value_params, value_opt_state: the separate value network.
    ema_params: exponential moving average of the policy's weights; None where the decay is 0: they are their average.
    kl_coef: float32 beta, constant or adapted.
    key: typed root key; iteration t uses fold_in(key, t).
  """

  step: Array
  params: Params
  opt_state: Any
  value_params: Params
  value_opt_state: Any
  ema_params: Params | None
  kl_coef: Array
  key: Array
