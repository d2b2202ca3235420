"""What PPO's updates need of a rollout: its tokens scored by all four networks, with rewards and advantages.

Called by ppo.py, inside its compiled step. The pieces: `Nets` and `Frozen` (the networks and the weights that never
change), `Experience` (what a minibatch is made of), `from_rollout`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from instructjax.core.config import PPOConfig
from instructjax.core.structs import Array, Params, Rollout, pytree
from instructjax.models import transformer
from instructjax.ops import gae, kl, masked, surrogate
from instructjax.rl import scoring, shared_rows


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
  """What the updates need of the rollout; all [B, ...] and sliced into minibatches along B.

  `segment_BL` is not 0 on real tokens. `is_actor_BR` is is_response_BR less the rows that `missing_eos='exclude'` keeps
  from the actor's loss. Where episodes share rows (`packed`), R is L, and the loss reads every column but the first.
  """

  token_BL: Array
  segment_BL: Array
  is_response_BR: Array
  is_actor_BR: Array
  behaviour_logprob_BR: Array
  value_BR: Array
  advantage_BR: Array
  return_BR: Array


def score_with_eos_rule(cfg: PPOConfig, score_B: Array, has_eos_B: Array) -> Array:
  """Reward-model score after the treatment of answers that never ended (`missing_eos`)."""
  if cfg.missing_eos == "fixed":
    return jnp.where(has_eos_B, score_B, cfg.missing_eos_score)
  return score_B


def _forwards(nets: Nets, cfg: PPOConfig, params, value_params, frozen: Frozen, rollout: Rollout):
  """What the networks say of a rollout: (behaviour_BR, ref_BR, value_BR, score_BL), and of how many cells."""

  def rows(token_BL, segment_BL, prompt_length):
    tokens = (token_BL, segment_BL)
    kwargs = dict(prompt_length=prompt_length, temperature=cfg.temperature)
    result = {
      "ref": scoring.response_logprob(nets.policy, frozen.ref_params, *tokens, **kwargs),
      "value": scoring.response_value(
        nets.scalar, value_params, *tokens, prompt_length=prompt_length
      ),
      "score": scoring.column_score(nets.scalar, frozen.reward_params, *tokens),
    }
    if cfg.behaviour_logprob == "rescore":
      result["behaviour"] = scoring.response_logprob(nets.policy, params, *tokens, **kwargs)
    return result

  prompt_length = rollout.token_BL.shape[1] - rollout.is_response_BR.shape[1]
  num_cells = rollout.token_BL.size
  if cfg.packed_rows:
    layout = shared_rows.first_fit(rollout.is_token_BL, rows=cfg.packed_rows)
    token_BL = shared_rows.pack(layout, rollout.token_BL, nets.policy.vocab_size)

    def every_column(tokens):
      result = rows(*tokens, prompt_length=1)
      first_column = lambda x: ((0, 0), (tokens[0].shape[1] - x.shape[1], 0))
      return {name: jnp.pad(x, first_column(x)) for name, x in result.items()}

    tokens = (token_BL, shared_rows.segments(layout))
    result = shared_rows.map_rows(every_column, layout, tokens, rows=cfg.packed_rows)
    result = {name: shared_rows.unpack(layout, x) for name, x in result.items()}
    score_BL = result.pop("score")
    result = {name: x[:, prompt_length:] for name, x in result.items()}
    num_cells = shared_rows.num_cells(layout, rows=cfg.packed_rows)
  else:
    result = rows(rollout.token_BL, rollout.is_token_BL, prompt_length)
    score_BL = result["score"]
  behaviour_BR = result.get("behaviour", rollout.behaviour_logprob_BR)
  value_BR = jnp.where(rollout.is_response_BR, result["value"], 0.0)
  return (behaviour_BR, result["ref"], value_BR, score_BL), num_cells


def from_rollout(
  nets: Nets, cfg: PPOConfig, params, value_params, frozen: Frozen, kl_coef, rollout: Rollout
):
  """Scores a rollout with all four networks. Returns (Experience, metrics, score_B, kl_B)."""
  prompt_length = rollout.token_BL.shape[1] - rollout.is_response_BR.shape[1]
  mask_BR = rollout.is_response_BR
  with jax.named_scope("score"):
    said, num_cells = _forwards(nets, cfg, params, value_params, frozen, rollout)
    behaviour_BR, ref_BR, value_BR, score_BL = said
    rm_score_B = scoring.at_last_token(score_BL, rollout.is_token_BL)
  with jax.named_scope("advantages"):
    response_BR = rollout.token_BL[:, prompt_length:]
    has_eos_B = jnp.any((response_BR == nets.eos_id) & mask_BR, axis=1)
    score_B = score_with_eos_rule(cfg, rm_score_B, has_eos_B)
    reward_BR = kl.kl_penalised_reward(score_B, behaviour_BR, ref_BR, mask_BR, kl_coef)
    if cfg.whiten_rewards:
      reward_BR = masked.masked_whiten(reward_BR, mask_BR, shift_mean=False)
    advantage_BR, return_BR = gae.gae(
      reward_BR, value_BR, mask_BR, discount=cfg.discount, lam=cfg.gae_lambda
    )
    is_actor_BR = mask_BR
    if cfg.missing_eos == "exclude":
      is_actor_BR = mask_BR & has_eos_B[:, None]
    if cfg.whiten_advantages:
      advantage_BR = masked.masked_whiten(advantage_BR, is_actor_BR)
  kl_B = jnp.sum(jnp.where(mask_BR, kl.kl_k1(behaviour_BR, ref_BR), 0.0), axis=1)
  kl_k3_B = jnp.sum(jnp.where(mask_BR, kl.kl_k3(behaviour_BR, ref_BR), 0.0), axis=1)
  metrics = {
    "reward": jnp.mean(rm_score_B),
    "reward_std": jnp.std(rm_score_B),
    "objective": jnp.mean(score_B - kl_coef * kl_B),
    "kl": jnp.mean(kl_B),
    "kl_k3": jnp.mean(kl_k3_B),
    "entropy": -jnp.mean(jnp.sum(jnp.where(mask_BR, behaviour_BR, 0.0), axis=1)),
    "tokens": jnp.sum(mask_BR).astype(jnp.float32),
    "prompt_length": jnp.sum(rollout.is_token_BL[:, :prompt_length]) / mask_BR.shape[0],
    "response_length": jnp.mean(jnp.sum(mask_BR, axis=1).astype(jnp.float32)),
    "eos": jnp.mean(has_eos_B.astype(jnp.float32)),
    "explained_variance": surrogate.explained_variance(value_BR, return_BR, mask_BR),
    "decode_steps": rollout.num_steps.astype(jnp.float32),
    "slot_waste": 1 - jnp.sum(mask_BR) / rollout.slot_steps,  # share of the decoded tokens
    "score_waste": 1 - jnp.sum(rollout.is_token_BL) / num_cells,  # of the cells that are scored
    "kl_coef": kl_coef,
  }
  experience = Experience(
    token_BL=rollout.token_BL,
    segment_BL=rollout.is_token_BL.astype(jnp.int32),
    is_response_BR=mask_BR,
    is_actor_BR=is_actor_BR,
    behaviour_logprob_BR=behaviour_BR,
    value_BR=value_BR,
    advantage_BR=advantage_BR,
    return_BR=return_BR,
  )
  return experience, metrics, rm_score_B, kl_B
