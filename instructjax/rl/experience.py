"""From a rollout to what PPO learns from: scores of all four networks, rewards, advantages.

Called by step.py, inside the compiled step. The pieces: `Nets` and `Frozen` (the networks, and the weights that never
change), `Experience` (what a minibatch is made of), `from_rollout`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from instructjax.core.config import PPOConfig
from instructjax.core.structs import Array, Params, PPOState, Rollout, pytree
from instructjax.models import transformer
from instructjax.ops import gae, kl, masked, surrogate
from instructjax.rl import scoring
from instructjax.rl.rows import Rows


@dataclasses.dataclass(frozen=True)
class Nets:
  """Static parts of the step: the two networks' definitions and their optimisers.

  The policy and its frozen reference share `policy`; the reward model and the value network share `scalar`.
  """

  policy: transformer.Model
  scalar: transformer.Model
  policy_tx: optax.GradientTransformation
  value_tx: optax.GradientTransformation
  eos_id: int
  max_response_length: int
  slots: int = 0  # rows decoded at once; 0 is the whole batch


@pytree
class Frozen:
  """Weights that PPO reads and never changes: the KL reference (the PPO initialisation, C.3) and the reward model.

  Both from `transformer.frozen_weights`, so that in bfloat16 they take half of the memory.
  """

  ref_params: Params
  reward_params: Params


@pytree
class Experience:
  """Episodes with all that the losses need; a minibatch is a slice of B.

  Of the L columns, the first P = L - R hold no response token. Arrays named _BR describe the last R columns.

  Attributes:
    token_BL: int32 prompt and response; `vocab_size` at pads.
    segment_BL: int32 number of the token's episode within its row, from 1; 0 at pads.
    is_response_BR: True on response tokens. The value loss is a mean over them.
    is_actor_BR: the same without the episodes that `missing_eos='exclude'` keeps from the policy's loss, which is a
      mean over these.
    behaviour_logprob_BR: log-probability under the policy that sampled, in nats.
    value_BR: the value network's estimate before each token, in units of reward, at the time of the rollout.
    advantage_BR: advantage of each token, whitened if configured.
    return_BR: what the value network learns to predict, in units of reward.
  """

  token_BL: Array
  segment_BL: Array
  is_response_BR: Array
  is_actor_BR: Array
  behaviour_logprob_BR: Array
  value_BR: Array
  advantage_BR: Array
  return_BR: Array

  @property
  def prompt_length(self) -> int:
    """P, the columns that hold no response."""
    return self.token_BL.shape[1] - self.is_response_BR.shape[1]


@pytree
class Scored:
  """What `from_rollout` makes of a rollout.

  Attributes:
    experience: what the updates learn from.
    metrics: float32 scalars of the whole batch.
    score_B: the reward model's score of each response, as the model gave it.
    kl_B: KL to the reference of each response, in nats: the sum over its tokens.
  """

  experience: Experience
  metrics: dict[str, Array]
  score_B: Array
  kl_B: Array


def score_with_eos_rule(cfg: PPOConfig, score_B: Array, has_eos_B: Array) -> Array:
  """Reward-model score after the treatment of answers that never ended (`missing_eos`, details item 22)."""
  if cfg.missing_eos == "fixed":
    return jnp.where(has_eos_B, score_B, cfg.missing_eos_score)
  return score_B


def _read(nets: Nets, cfg: PPOConfig, state: PPOState, frozen: Frozen):
  """A function of rows of tokens, for `Rows.score`: what all four networks say of each token."""

  def read(token_BL, segment_BL, prompt_length):
    rows = dict(token_BL=token_BL, segment_BL=segment_BL)
    response = rows | dict(prompt_length=prompt_length)
    logprob = lambda params: scoring.response_logprob(  # noqa: E731
      nets.policy, params, **response, temperature=cfg.temperature
    )
    result = {
      "ref_logprob_BR": logprob(frozen.ref_params),
      "value_BR": scoring.response_value(nets.scalar, state.value_params, **response),
      "score_BL": scoring.column_score(nets.scalar, frozen.reward_params, **rows),
    }
    if cfg.behaviour_logprob == "rescore":
      result["behaviour_logprob_BR"] = logprob(state.params)
    return result

  return read


def from_rollout(
  nets: Nets, cfg: PPOConfig, rows: Rows, state: PPOState, frozen: Frozen, rollout: Rollout
) -> Scored:
  """Scores a rollout with all four networks and computes rewards, advantages and returns.

  `state` is as it was when the rollout was sampled. A rollout is a whole batch of episodes.
  """
  mask_BR = rollout.is_response_BR
  with jax.named_scope("score"):
    # 2a. Log-probabilities at the sampling temperature (details item 19), and values before each token (item 21).
    said, num_cells = rows.score(_read(nets, cfg, state, frozen), rollout)
    said = {"behaviour_logprob_BR": rollout.behaviour_logprob_BR} | said
    behaviour_BR, ref_BR = said["behaviour_logprob_BR"], said["ref_logprob_BR"]
    value_BR = jnp.where(mask_BR, said["value_BR"], 0.0)
    # 2b. The reward model reads prompt and response (sec 3.5); its score stands at the last token (details item 13).
    rm_score_B = scoring.at_last_token(said["score_BL"], rollout.is_token_BL)
  with jax.named_scope("advantages"):
    # 2c. A response that never ends may get a fixed score instead (details item 22).
    response_BR = rollout.token_BL[:, rollout.prompt_length :]
    has_eos_B = jnp.any((response_BR == nets.eos_id) & mask_BR, axis=1)
    score_B = score_with_eos_rule(cfg, rm_score_B, has_eos_B)
    # 2d. The KL to the reference at each token lowers the reward (sec 3.5, eq. 2; details item 23).
    kl_BR = kl.k1(behaviour_BR, ref_BR)
    reward_BR = kl.penalised_reward(score_B, kl_BR, mask_BR, state.kl_coef)
    # 2e. Rewards may be scaled to variance 1, their mean kept (details item 25).
    if cfg.whiten_rewards:
      reward_BR = masked.masked_whiten(reward_BR, mask_BR, shift_mean=False)
    # 2f. Advantages without discount (C.4; details item 28), and returns from them before whitening (details item 27).
    advantage_BR, return_BR = gae.gae(
      reward_BR, value_BR, mask_BR, discount=cfg.discount, lam=cfg.gae_lambda
    )
    # 2g. Advantages whitened over the tokens that the policy learns from (details item 25).
    is_actor_BR = mask_BR
    if cfg.missing_eos == "exclude":
      is_actor_BR = mask_BR & has_eos_B[:, None]
    if cfg.whiten_advantages:
      advantage_BR = masked.masked_whiten(advantage_BR, is_actor_BR)
  experience = Experience(
    token_BL=rollout.token_BL,
    segment_BL=rollout.is_token_BL.astype(jnp.int32),  # one episode a row
    is_response_BR=mask_BR,
    is_actor_BR=is_actor_BR,
    behaviour_logprob_BR=behaviour_BR,
    value_BR=value_BR,
    advantage_BR=advantage_BR,
    return_BR=return_BR,
  )
  kl_B = masked.masked_sum(kl_BR, mask_BR, axis=1)
  kl_k3_B = masked.masked_sum(kl.k3(behaviour_BR, ref_BR), mask_BR, axis=1)
  metrics = _rollout_metrics(rollout, experience, has_eos_B, num_cells) | {
    "reward": jnp.mean(rm_score_B),
    "reward_std": jnp.std(rm_score_B),
    "objective": jnp.mean(score_B - state.kl_coef * kl_B),  # eq. 2 without its pretraining term
    "kl": jnp.mean(kl_B),
    "kl_k3": jnp.mean(kl_k3_B),
    "kl_coef": state.kl_coef,
  }
  return Scored(experience=experience, metrics=metrics, score_B=rm_score_B, kl_B=kl_B)


def _rollout_metrics(
  rollout: Rollout, experience: Experience, has_eos_B: Array, num_cells: Array | int
) -> dict[str, Array]:
  """Lengths, entropy in nats a response, and how well the value network foresaw the returns (details item 32).

  Args:
    num_cells: columns of all rows in which the rollout was scored.
  """
  mask_BR = rollout.is_response_BR
  entropy_B = -masked.masked_sum(experience.behaviour_logprob_BR, mask_BR, axis=1)
  return {
    "entropy": jnp.mean(entropy_B),
    "tokens": jnp.sum(mask_BR).astype(jnp.float32),
    "prompt_length": jnp.sum(rollout.is_token_BL[:, : rollout.prompt_length]) / mask_BR.shape[0],
    "response_length": jnp.mean(jnp.sum(mask_BR, axis=1).astype(jnp.float32)),
    "eos": jnp.mean(has_eos_B.astype(jnp.float32)),
    "explained_variance": surrogate.explained_variance(
      experience.value_BR, experience.return_BR, mask_BR
    ),
    "decode_steps": rollout.num_steps.astype(jnp.float32),
    "slot_waste": 1 - jnp.sum(mask_BR) / rollout.slot_steps,  # share of the decoded tokens
    "score_waste": 1 - jnp.sum(rollout.is_token_BL) / num_cells,  # share of the scored cells
  }
