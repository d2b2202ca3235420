"""Turns a rollout into what PPO learns from: outputs of all four networks, rewards, advantages and returns.

Called by step.py, inside the compiled step, and by split.py, where the host computes some of the rewards meanwhile.
`Nets` and `Frozen` hold the networks and the weights that never change, `Experience` the arrays that minibatches are
cut from, and `from_rollout` makes the one from the others, in two parts: `read` and `from_readings`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from instructjax.core import rewards as reward_lists
from instructjax.core.config import PPOConfig
from instructjax.core.rewards import Reward
from instructjax.core.structs import Array, Params, PPOState, Rollout, Trees, pytree
from instructjax.models import adapters, transformer
from instructjax.ops import baselines, gae, kl, masked, surrogate
from instructjax.ops import rewards as rules
from instructjax.rl import scoring
from instructjax.rl.rows import RowLayout

_MEMBER = "member_"  # begins the names of further reward models' scores


@dataclasses.dataclass(frozen=True)
class Nets:
  """The static parts of the step.

  Attributes:
    policy: network of the policy and of its frozen reference.
    scalar: network of the reward model and of the value network.
    policy_tx, value_tx: optimisers of the policy and of the value network; None if there is no value network.
    stop_ids: the tokens that end an answer.
    max_response_length: R, the most tokens of an answer, its EOS included.
    slots: rows decoded at once; 0 for the whole batch.
    shares_base: with adapters, whether those of all four networks have one base.
    value_on_policy: with adapters, whether that of the value network has the policy's base, not the reward model's.
    score_skips: a token at which the reward model gives no score, as the pad token of one made elsewhere; or None.
    ensemble_skips: the same for each further reward model; () if none of them has one.
    shares_prompts: whether rows hold one copy of a prompt for its answers.
  """

  policy: transformer.Model
  scalar: transformer.Model
  policy_tx: optax.GradientTransformation
  value_tx: optax.GradientTransformation | None
  stop_ids: tuple[int, ...]
  max_response_length: int
  slots: int = 0
  shares_base: bool = True
  value_on_policy: bool = False
  score_skips: int | None = None
  ensemble_skips: tuple[int | None, ...] = ()
  shares_prompts: bool = False


@pytree
class Frozen:
  """Weights that PPO reads and never changes: the KL reference (the PPO initialisation, C.3) and the reward model.

  Both come from `transformer.frozen_weights`. In bfloat16 they take half of the memory.

  With adapters these two, and the policy and the value network in the state, are adapters of a base. `policy`,
  `reward` and `value` make a network's parameters of either.

  Attributes:
    ref_params, reward_params: the two networks, or their adapters.
    ensemble_params: further reward models of the same shape, whole, stacked along a new first axis; None for none.
    base: of the policy and the reference; None without adapters.
    scalar_base: of the reward model and, by `Nets.value_on_policy`, of the value network; None if it is the same as the
      policy's, or without adapters.
  """

  ref_params: Params
  reward_params: Params
  ensemble_params: Params | None = None
  base: Params | None = None
  scalar_base: Params | None = None

  def policy(self, nets: Nets, params: Params) -> Params:
    """Parameters for the forward pass of a network with the policy's shape, from what is trained of it."""
    return adapters.join(nets.policy, self.base, params)

  def reward(self, nets: Nets, params: Params) -> Params:
    """The same for the reward model."""
    base = self.base if self.scalar_base is None else self.scalar_base
    return adapters.join(nets.scalar, base, params)

  def value(self, nets: Nets, params: Params) -> Params:
    """The same for the value network."""
    if nets.value_on_policy:
      return adapters.join(nets.scalar, self.base, params)
    return self.reward(nets, params)


@pytree
class Experience:
  """Episodes with everything that the losses need. A minibatch is a selection of its rows.

  Of the L columns, the first P = L - R hold no response token. Arrays named _BR describe the last R columns.

  Attributes:
    token_BL: int32 prompt and response; `vocab_size` at pads.
    segment_BL: int32 number of the token's episode within its row, from 1; 0 at pads. Of rows with trees, a `Trees`.
    is_response_BR: True on response tokens, over which the value loss is a mean.
    is_actor_BR: True on the tokens over which the policy loss is a mean. These are all response tokens, or with
      `missing_eos='exclude'` only those of answers that ended.
    behaviour_logprob_BR: log-probability of each token under the policy that sampled it, in nats.
    advantage_BR: advantage of each token, whitened if configured.
    value_BR: value before each token, by the value network at the time of the rollout, in units of reward. None without
      a value network.
    return_BR: the value network's target, in units of reward; None without one.
    ref_logprob_BR: log-probability of each token under the reference, in nats; None if the loss holds no KL.
  """

  token_BL: Array
  segment_BL: Array | Trees
  is_response_BR: Array
  is_actor_BR: Array
  behaviour_logprob_BR: Array
  advantage_BR: Array
  value_BR: Array | None
  return_BR: Array | None
  ref_logprob_BR: Array | None

  @property
  def prompt_length(self) -> int:
    """P, the number of columns that hold no response."""
    return self.token_BL.shape[1] - self.is_response_BR.shape[1]


@pytree
class Scored:
  """The result of `from_rollout`.

  Attributes:
    experience: what the updates learn from.
    metrics: float32 scalars of the whole batch.
    score_B: the reward model's score of each response, before the rule for missing EOS.
    kl_B: KL of each response to the reference, in nats: the sum over its tokens.
    rewards: name -> each response's value of a reward beside the reward model, without its weight.
  """

  experience: Experience
  metrics: dict[str, Array]
  score_B: Array
  kl_B: Array
  rewards: dict[str, Array]


@pytree
class Readings:
  """What the networks say of a rollout.

  Attributes:
    behaviour_logprob_BR, ref_logprob_BR: log-probability of each response token under the policy that sampled it and
      under the reference, in nats.
    value_BR: the value network's estimate before each response token; 0 at pads. None without a value network.
    score_B: the reward model's score of each response.
    waste: share of the columns of all rows that were read and hold no token.
    ensemble_B: the scores of further reward models, one array for each.
  """

  behaviour_logprob_BR: Array
  ref_logprob_BR: Array
  value_BR: Array | None
  score_B: Array
  waste: Array
  ensemble_B: tuple[Array, ...]


def score_with_eos_rule(cfg: PPOConfig, score_B: Array, has_eos_B: Array) -> Array:
  """The score that PPO uses: that of the rewards, or a fixed one for answers without EOS (details item 22).

  Args:
    cfg: `missing_eos` chooses the rule.
    score_B: the reward model's scores, or the sum of all rewards.
    has_eos_B: whether the answer ended within the length limit.
  """
  # 'exclude' leaves the score as it is: `from_rollout` takes the tokens out of the policy's loss.
  if cfg.missing_eos == "fixed":
    return jnp.where(has_eos_B, score_B, cfg.missing_eos_score)
  return score_B


def _read(nets: Nets, cfg: PPOConfig, state: PPOState, frozen: Frozen):
  """Makes the function for `RowLayout.score`: from rows of tokens to the four networks' outputs for each token."""

  def read(token_BL, segment_BL, prompt_length):
    rows = dict(token_BL=token_BL, segment_BL=segment_BL)
    response = rows | dict(prompt_length=prompt_length)
    logprob = lambda params: scoring.response_logprob(
      nets.policy, frozen.policy(nets, params), **response, temperature=cfg.temperature
    )
    reward = frozen.reward(nets, frozen.reward_params)
    result = {
      "ref_logprob_BR": logprob(frozen.ref_params),
      "score_BL": scoring.column_score(nets.scalar, reward, **rows),
    }
    if cfg.has_value_network:
      value = frozen.value(nets, state.value_params)
      result["value_BR"] = scoring.response_value(nets.scalar, value, **response)
    # Decoding and scoring differ in bfloat16, so with the rollout's log-probabilities the ratio of the first minibatch
    # would not be 1 (details item 8). 'rescore' makes it 1, for one more forward pass.
    if cfg.behaviour_logprob == "rescore":
      result["behaviour_logprob_BR"] = logprob(state.params)
    if frozen.ensemble_params is not None:
      # One after the other, so that the temporaries of one are in memory at a time.
      whole = nets.scalar.clone(adapter=None)
      score_MBL = jax.lax.map(
        lambda params: scoring.column_score(whole, params, **rows), frozen.ensemble_params
      )
      result |= {f"{_MEMBER}{m}_BL": score_BL for m, score_BL in enumerate(score_MBL)}
    return result

  return read


def from_rollout(
  nets: Nets, cfg: PPOConfig, rows: RowLayout, state: PPOState, frozen: Frozen, rollout: Rollout
) -> Scored:
  """Scores a rollout with all four networks, and computes rewards, advantages and returns.

  Args:
    nets, cfg, rows: static.
    state: as it was when the rollout was sampled.
    frozen: reference and reward model.
    rollout: the whole batch of episodes.
  """
  readings = read(nets, cfg, rows, state, frozen, rollout)
  return from_readings(nets, cfg, state, rollout, readings, {})


def read(
  nets: Nets, cfg: PPOConfig, rows: RowLayout, state: PPOState, frozen: Frozen, rollout: Rollout
) -> Readings:
  """Reads a rollout with all four networks; arguments as `from_rollout`."""
  mask_BR = rollout.is_response_BR
  with jax.named_scope("score"):
    # 2a. Log-probabilities at the sampling temperature (details item 19), and values before each token (item 21).
    said, waste = rows.score(_read(nets, cfg, state, frozen), rollout)
    said = {"behaviour_logprob_BR": rollout.behaviour_logprob_BR} | said
    value_BR = jnp.where(mask_BR, said["value_BR"], 0.0) if cfg.has_value_network else None
    # 2b. The reward model reads prompt and response (sec 3.5); its score stands at the last token (details item 13).
    skips_of_members = nets.ensemble_skips or (None,) * len(cfg.ensemble)
    members_BL = [x for name, x in said.items() if name.startswith(_MEMBER)]
    score_B, *ensemble_B = (
      scoring.at_last_token(score_BL, scoring.is_read(rollout.token_BL, rollout.is_token_BL, skips))
      for score_BL, skips in zip(
        [said["score_BL"], *members_BL], [nets.score_skips, *skips_of_members], strict=True
      )
    )
    return Readings(
      behaviour_logprob_BR=said["behaviour_logprob_BR"],
      ref_logprob_BR=said["ref_logprob_BR"],
      value_BR=value_BR,
      score_B=score_B,
      waste=waste,
      ensemble_B=tuple(ensemble_B),
    )


def _reward_values(
  cfg: PPOConfig,
  rewards: Sequence[Reward],
  rollout: Rollout,
  readings: Readings,
  given: Mapping[str, Array],
) -> dict[str, Array]:
  """Each reward of the list without its weight, name -> [B]; `given` holds those that the host has computed."""

  def value(reward: Reward) -> Array:
    if reward.on_host:
      return given[reward.name]
    if reward.kind == "rm":
      return readings.score_B
    if reward.kind == "ensemble":
      score_MB = jnp.stack([readings.score_B, *readings.ensemble_B])
      return rules.ensemble(score_MB, reward.argument, cfg.ensemble_penalty)
    length_B = jnp.sum(rollout.is_response_BR, axis=1, dtype=jnp.int32)
    return rules.length_rule(length_B, *reward.lengths)

  return {reward.name: value(reward) for reward in rewards}


def _answer_advantage(cfg: PPOConfig, score_B: Array, kl_B: Array, state: PPOState) -> Array:
  """The advantage of whole answers, which all of an answer's tokens share: see `ops.baselines`.

  Departs from paper: C.4 has GAE. With 'rloo' the KL lowers the reward, as there and as in Ahmadian et al. With 'grpo'
  it is in the loss, as in DeepSeekMath: see `step.policy_loss`.
  """
  if cfg.advantage == "rloo":
    return baselines.leave_one_out(score_B - state.kl_coef * kl_B, cfg.samples_per_prompt)
  return baselines.group_normalised(score_B, cfg.samples_per_prompt)


def from_readings(
  nets: Nets,
  cfg: PPOConfig,
  state: PPOState,
  rollout: Rollout,
  readings: Readings,
  given: Mapping[str, Array],
) -> Scored:
  """Computes rewards, advantages and returns of a rollout from what the networks say of it.

  Args:
    nets, cfg: static.
    state: as it was when the rollout was sampled.
    rollout: the whole batch of episodes.
    readings: of the rollout, by `read`.
    given: name -> each response's value of a reward that the host computes.
  """
  mask_BR, value_BR, rm_score_B = rollout.is_response_BR, readings.value_BR, readings.score_B
  behaviour_BR, ref_BR = readings.behaviour_logprob_BR, readings.ref_logprob_BR
  rewards = reward_lists.parse(cfg.rewards, "ppo.rewards")
  with jax.named_scope("advantages"):
    # 2c. The paper's reward is the reward model's score (eq. 2).
    #     Departs from paper: `ppo.rewards` may name others, which are summed. A response that never ends may get a
    #     fixed score instead (details item 22).
    values = _reward_values(cfg, rewards, rollout, readings, given)
    total_B = rules.weighted_sum([*values.values()], [reward.weight for reward in rewards])
    response_BR = rollout.token_BL[:, rollout.prompt_length :]
    has_eos_B = jnp.any(masked.is_any(response_BR, nets.stop_ids) & mask_BR, axis=1)
    score_B = score_with_eos_rule(cfg, total_B, has_eos_B)
    # 2d. The KL to the reference at each token lowers the reward (sec 3.5, eq. 2; details item 23).
    kl_BR = kl.estimate(behaviour_BR, ref_BR, kl.FORM)
    if value_BR is not None:
      reward_BR = kl.penalised_reward(score_B, kl_BR, mask_BR, state.kl_coef)
      # 2e. Rewards may be scaled to variance 1 (details item 25). Their mean is kept: a shift would add a constant to
      #     the reward of every token, and so favour long or short answers.
      if cfg.whiten_rewards:
        reward_BR = masked.masked_whiten(reward_BR, mask_BR, shift_mean=False)
      # 2f. Advantages without discount (C.4; details item 28). Returns are computed from them before whitening (details
      #     item 27), because the value network predicts rewards in their own units.
      advantage_BR, return_BR = gae.gae(
        reward_BR, value_BR, mask_BR, discount=cfg.discount, lam=cfg.gae_lambda
      )
    else:
      advantage_B = _answer_advantage(cfg, score_B, masked.masked_sum(kl_BR, mask_BR, 1), state)
      advantage_BR, return_BR = jnp.where(mask_BR, advantage_B[:, None], 0.0), None
    # 2g. Advantages are whitened over the tokens that the policy learns from (details item 25). This is done for the
    #     whole batch, so an episode's advantage does not depend on the minibatch that it lands in.
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
    advantage_BR=advantage_BR,
    value_BR=value_BR,
    return_BR=return_BR,
    ref_logprob_BR=ref_BR if cfg.advantage == "grpo" else None,
  )
  # The metrics are about answers, so KL and entropy are sums over an answer's tokens, averaged over answers.
  kl_B = masked.masked_sum(kl_BR, mask_BR, axis=1)
  other_kl_B = {
    form: masked.masked_sum(kl.estimate(behaviour_BR, ref_BR, form), mask_BR, axis=1)
    for form in kl.FORMS
    if form != kl.FORM
  }
  metrics = _rollout_metrics(rollout, experience, has_eos_B, readings.waste) | {
    "reward": jnp.mean(rm_score_B),
    "reward_std": jnp.std(rm_score_B),
    "objective": jnp.mean(score_B - state.kl_coef * kl_B),  # eq. 2 without its pretraining term
    "kl": jnp.mean(kl_B),
    "kl_coef": state.kl_coef,
  }
  metrics |= {f"kl_{form}": jnp.mean(values_B) for form, values_B in other_kl_B.items()}
  if not reward_lists.is_reward_model_alone(rewards):
    metrics |= _reward_metrics(values | {"total": total_B})
  if readings.ensemble_B:  # how far the reward models disagree about an answer
    score_MB = jnp.stack([rm_score_B, *readings.ensemble_B])
    metrics["ensemble_std"] = jnp.mean(jnp.std(score_MB, axis=0))
  values.pop("rm", None)
  return Scored(
    experience=experience, metrics=metrics, score_B=rm_score_B, kl_B=kl_B, rewards=values
  )


def _reward_metrics(values: Mapping[str, Array]) -> dict[str, Array]:
  """The mean of each reward over the batch, and its standard deviation."""
  means = {f"rewards/{name}": jnp.mean(value_B) for name, value_B in values.items()}
  return means | {f"rewards/{name}/std": jnp.std(value_B) for name, value_B in values.items()}


def _rollout_metrics(
  rollout: Rollout, experience: Experience, has_eos_B: Array, waste: Array
) -> dict[str, Array]:
  """Metrics of the rollout: lengths, entropy in nats per response, explained variance (details item 32), and waste.

  Args:
    rollout, experience: of the iteration.
    has_eos_B: whether the answer ended within the length limit.
    waste: share of the scored columns that hold no token.
  """
  mask_BR = rollout.is_response_BR
  fit = {}
  if experience.value_BR is not None and experience.return_BR is not None:
    fit["explained_variance"] = surrogate.explained_variance(
      experience.value_BR, experience.return_BR, mask_BR
    )
  entropy_B = -masked.masked_sum(experience.behaviour_logprob_BR, mask_BR, axis=1)
  return fit | {
    "entropy": jnp.mean(entropy_B),
    "tokens": jnp.sum(mask_BR).astype(jnp.float32),
    "prompt_length": jnp.sum(rollout.is_token_BL[:, : rollout.prompt_length]) / mask_BR.shape[0],
    "response_length": jnp.mean(jnp.sum(mask_BR, axis=1).astype(jnp.float32)),
    "eos": jnp.mean(has_eos_B.astype(jnp.float32)),
    "decode_steps": rollout.num_steps.astype(jnp.float32),
    "slot_waste": 1 - jnp.sum(mask_BR) / rollout.slot_steps,  # share of the decoded tokens
    "score_waste": waste,
  }
