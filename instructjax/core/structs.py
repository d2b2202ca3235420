"""The key to dimension letters, and the pytree dataclasses that parts pass to each other.

The name of an array ends in its dimensions (`logprob_BR`):

  B batch (rows)      L prompt + response      P prompt         R response       T generic time
  C answers of one prompt (comparisons)        V vocabulary     N layers         D model width
  H query heads       G key/value heads        K head width     F mlp width
  S rows that several sequences share          E rank of an adapter

The pad id is always `vocab_size`, one past the last real token. Pads thus have no embedding and no logit, so a policy
cannot emit one. Many implementations use EOS as the pad; this one does not, so that a sampled EOS is never mistaken for
padding.

This module imports nothing else of the project.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax

_Struct = TypeVar("_Struct")

Array = jax.Array
Params = Any  # nested dict of arrays


@dataclass_transform(frozen_default=True)  # type checkers then treat it like @dataclass
def pytree(cls: type[_Struct]) -> type[_Struct]:
  """Class decorator for frozen dataclasses that JAX treats as pytrees.

  Every field is a child. None is static, so other values never cause a jitted function to compile again.
  """
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def tree_of(struct: Callable[..., _Struct], **leaves: Any) -> _Struct:
  """Builds a pytree dataclass whose leaves are not JAX arrays, such as NumPy arrays or shardings.

  Its fields are declared as Array, because most code sees them as such. A batch on the host holds NumPy arrays, and the
  shardings of a state hold one NamedSharding for each array. Only code that makes these calls this function, so that a
  type checker still refuses them everywhere else.
  """
  return struct(**leaves)


@pytree
class Trees:
  """Rows that hold trees: texts with a common beginning, of which each row has one copy. In place of segments.

  Attributes:
    segment_BL: int32 number of the tree within its row, from 1; 0 at pads.
    position_BL: int32 depth in the tree, from 0.
    last_BL: int32 last column of the row that may see this one, see `layers.tree_mask`; -1 at pads.
  """

  segment_BL: Array
  position_BL: Array
  last_BL: Array


def token_mask(segment_BL: Array | Trees) -> Array:
  """True on the columns of rows that hold a token, by the rows' segments or trees."""
  return (segment_BL.segment_BL if isinstance(segment_BL, Trees) else segment_BL) > 0


@pytree
class PackedBatch:
  """Rows of packed token sequences for language modelling.

  Attributes:
    token_BL: int32 token ids; padding is `vocab_size`.
    segment_BL: int32 number of the sequence within its row, from 1; padding is 0. Attention stays inside a segment.
    position_BL: int32 position inside the segment, from 0.
    weight_BL: float32 loss weight of predicting token_BL[:, t] from the earlier tokens of its segment. It is 0 for the
      first token of a segment, for padding, and for prompts that carry no loss.
  """

  token_BL: Array
  segment_BL: Array
  position_BL: Array
  weight_BL: Array


@pytree
class RankedBatch:
  """Prompts with up to C ranked answers each.

  Every answer forms a sequence together with its prompt. The sequences are packed into S rows in any order, and
  `last_BC` says where each of them ends. Or several answers form a tree with one copy of their prompt, each after it.

  Attributes:
    token_SL: int32 ids of prompt + answer, including the EOS if the answer has one. A row holds one sequence or
      several; padding is `vocab_size`.
    segment_SL: int32 number of the sequence within its row, from 1; padding is 0. Of rows with trees, a `Trees`.
    last_BC: int32 index of each answer's last token in the flattened rows (row * L + column); 0 if there is no answer.
    rank_BC: int32 rank: 1 is best, and equal ranks are ties; 0 if there is no answer.
    is_answer_BC: True if there is an answer.
  """

  token_SL: Array
  segment_SL: Array | Trees
  last_BC: Array
  rank_BC: Array
  is_answer_BC: Array


@pytree
class PromptBatch:
  """Prompts, padded on the left so that all responses start in the same column.

  Attributes:
    token_BP: int32 ids, left-padded with `vocab_size`.
    is_prompt_BP: True on real tokens.
    index_B: int32 row number in the global batch. The random key of a row is derived from it, so that the samples do
      not depend on how the batch is sharded.
  """

  token_BP: Array
  is_prompt_BP: Array
  index_B: Array


@pytree
class Rollout:
  """Sampled responses.

  Attributes:
    token_BL: int32 ids of the prompt (P columns, left-padded) and the response (R columns, right-padded after the EOS).
    is_token_BL: True on real tokens.
    is_response_BR: True on response tokens including the EOS, which are a prefix of each row.
    behaviour_logprob_BR: float32 log-probability, in nats, of each response token under the distribution it was sampled
      from.
    num_steps: int32 scalar, decode steps taken. It is less than R if every row ended early.
    slot_steps: int32 scalar, the number of tokens that these steps could have sampled: the rows decoded at once, summed
      over the steps.
  """

  token_BL: Array
  is_token_BL: Array
  is_response_BR: Array
  behaviour_logprob_BR: Array
  num_steps: Array
  slot_steps: Array

  @property
  def prompt_length(self) -> int:
    """P, the number of columns before the response."""
    return self.token_BL.shape[1] - self.is_response_BR.shape[1]


@pytree
class Samples:
  """The part of a PPO iteration's rollout that is logged.

  Attributes:
    rollout: the sampled answers.
    score_B: float32 reward-model score of each answer, before `ppo.missing_eos` is applied.
    kl_B: float32 log-probability of each answer under the policy minus that under the reference, in nats.
    rewards: name -> float32 value of each answer, for every reward of `ppo.rewards` beside the reward model.
  """

  rollout: Rollout
  score_B: Array
  kl_B: Array
  rewards: dict[str, Array]


@pytree
class TrainState:
  """The training state of a supervised stage (pretrain, sft, ppo_init, rm)."""

  step: Array
  params: Params
  opt_state: Any
  key: Array


@pytree
class PPOState:
  """The training state of PPO: everything that one iteration changes and the next one needs.

  Attributes:
    step: int32 number of iterations done.
    params, opt_state: the policy's weights (float32 master copy) and its Adam state.
    value_params, value_opt_state: weights and Adam state of the value network, which is separate from the policy. None
      without one (`ppo.advantage` is not gae).
    ema_params: exponential moving average of the policy's weights. None if the decay is 0, because the average then
      equals the weights.
    kl_coef: float32 coefficient beta of the KL penalty, constant or adapted.
    key: typed root key; iteration t uses fold_in(key, t).
  """

  step: Array
  params: Params
  opt_state: Any
  value_params: Params | None
  value_opt_state: Any
  ema_params: Params | None
  kl_coef: Array
  key: Array
