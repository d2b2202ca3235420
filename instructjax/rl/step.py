"""PPO and PPO-ptx (sec 3.5, eq. 2, C.4): one iteration is one XLA program.

`make_train_step` compiles `train_step`. That samples a rollout (sampling.py), scores it and computes advantages
(experience.py), and runs the minibatch updates, which are in this module. Inside an iteration nothing touches the host.
The stage around it is stages/ppo.py.

Read this file from `train_step` upwards. The numbers of its comments continue in `update`, `_minibatch_update` and
experience.py. "Details item N" is an entry of docs/details.md. Where the host computes some of the rewards, split.py
makes several programs of the same parts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instructjax.core.config import PPOConfig
from instructjax.core.structs import (
  Array,
  PackedBatch,
  Params,
  PPOState,
  PromptBatch,
  Rollout,
  Samples,
  tree_of,
)
from instructjax.models import adapters, transformer
from instructjax.ops import kl, masked, surrogate
from instructjax.parallel import constraints, sharding
from instructjax.rl import experience, sampling, scoring
from instructjax.rl.experience import Experience, Frozen, Nets, Scored
from instructjax.rl.rows import RowLayout, padded, shared
from instructjax.train import accumulation, optim, supervised


def make_rows(cfg: PPOConfig, pad_id: int, shares_prompts: bool = False) -> RowLayout:
  """How episodes lie in rows, and how many rows are scored and trained on at a time.

  Args:
    cfg: of the stage.
    pad_id: token id at pads.
    shares_prompts: see `Nets`.
  """
  if cfg.packed_rows:
    return shared(cfg.packed_rows, pad_id, cfg.samples_per_prompt if shares_prompts else 1)
  return padded(cfg.score_microbatches, cfg.microbatches)


def create_state(
  params: Params, value_params: Params | None, nets: Nets, cfg: PPOConfig, key: Array
) -> PPOState:
  """The state before the first iteration.

  Args:
    params: the policy's parameters, of the PPO initialisation.
    value_params: the value network's parameters. It starts as the reward model (C.4, details item 20) or, by
      `ppo.value_init`, from the policy's trunk.
    nets, cfg: static.
    key: typed key of the whole training; each iteration folds its number into it.
  """
  value_opt_state = None
  if nets.value_tx is not None and value_params is not None:
    value_opt_state = nets.value_tx.init(value_params)
  return PPOState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=nets.policy_tx.init(params),
    value_params=value_params,
    value_opt_state=value_opt_state,
    ema_params=jax.tree.map(jnp.copy, params) if cfg.ema_decay else None,
    kl_coef=jnp.float32(cfg.beta),
    key=key,
  )


def policy_loss(
  nets: Nets, cfg: PPOConfig, frozen: Frozen, params: Params, batch: Experience
) -> tuple[Array, dict[str, Array]]:
  """The policy's loss on one minibatch: the clipped surrogate (clip .2: C.4). Returns (loss, metrics).

  With `advantage='grpo'`, beta times the KL to the reference is added, by the estimate k3, as in DeepSeekMath
  (arXiv:2402.03300, eq. 3 and 4). Departs from paper: there it is a mean over the tokens of each answer and then over
  answers; here it is one over all tokens, as is the surrogate.
  """
  logprob_BR = scoring.response_logprob(
    nets.policy,
    frozen.policy(nets, params),
    batch.token_BL,
    batch.segment_BL,
    prompt_length=batch.prompt_length,
    temperature=cfg.temperature,
  )
  loss, metrics = surrogate.clipped_surrogate(
    logprob_BR, batch.behaviour_logprob_BR, batch.advantage_BR, batch.is_actor_BR, clip=cfg.clip
  )
  if batch.ref_logprob_BR is None:
    return loss, metrics
  kl_BR = kl.estimate(logprob_BR, batch.ref_logprob_BR, "k3")
  kl_loss = masked.masked_mean(kl_BR, batch.is_actor_BR)
  return loss + cfg.beta * kl_loss, metrics | {"kl_loss": kl_loss}


def value_loss(
  nets: Nets, cfg: PPOConfig, frozen: Frozen, value_params: Params, batch: Experience
) -> tuple[Array, dict[str, Array]]:
  """The value network's loss on one minibatch, clipped around the old values if configured. Returns (loss, metrics)."""
  value_BR = scoring.response_value(
    nets.scalar,
    frozen.value(nets, value_params),
    batch.token_BL,
    batch.segment_BL,
    prompt_length=batch.prompt_length,
  )
  if batch.value_BR is None or batch.return_BR is None:
    raise ValueError("value_loss: these episodes have no values to learn from")
  return surrogate.clipped_value_loss(
    value_BR, batch.value_BR, batch.return_BR, batch.is_response_BR, clip=cfg.value_clip
  )


def ptx_gradient(
  nets: Nets, cfg: PPOConfig, frozen: Frozen, params: Params, ptx: PackedBatch
) -> tuple[Array, Params]:
  """The pretraining term of eq. 2, -E[log pi(x)], on a minibatch's pretraining rows. Returns (loss, gradient).

  The paper gives gamma = 27.8, but not whether log pi(x) is a mean or a sum over tokens. With `ptx_reduction='mean'`
  the loss is the mean over the tokens of all rows. With 'sum' it is the sum over a row's tokens, averaged over rows.
  """
  num_rows = ptx.token_BL.shape[0]
  denominator = jnp.sum(ptx.weight_BL) if cfg.ptx_reduction == "mean" else jnp.float32(num_rows)

  # The denominator is that of all rows, so the losses of microbatches add up.
  def share(params, rows: PackedBatch):
    sum_nll, _ = supervised.lm_loss_sums(nets.policy, frozen.policy(nets, params), rows)
    return sum_nll / denominator, {}

  (loss, _), grads = accumulation.gradient(share, params, ptx, cfg.ptx_microbatches)
  return loss, grads


def _clip(grads: Params, max_norm: float | None):
  """Clips one term's gradient by its own norm.

  If the sum of both terms were clipped, a larger gamma would shrink PPO's part without anyone noticing.
  """
  return grads if max_norm is None else optim.clip_by_global_norm(grads, max_norm)


def policy_gradient(
  nets: Nets,
  cfg: PPOConfig,
  rows: RowLayout,
  frozen: Frozen,
  params: Params,
  batch: Experience,
  ptx: PackedBatch | None,
) -> tuple[Params, dict[str, Array]]:
  """The policy's gradient of eq. 2 on one minibatch: PPO's plus gamma times the pretraining term's.

  Args:
    nets, cfg, rows: static.
    frozen: with the base of adapters.
    params: of the policy.
    batch: the minibatch's episodes.
    ptx: the minibatch's pretraining rows; None for PPO without the pretraining term.
  Returns:
    (grads, metrics)
  """
  with jax.named_scope("update/policy"):
    loss_fn = functools.partial(policy_loss, nets, cfg, frozen)
    ppo = rows.gradient(loss_fn, params, batch, "is_actor_BR")
    metrics = ppo.metrics | {
      "policy_loss": ppo.loss,
      "policy_grad_norm": optax.tree.norm(ppo.grads),
      "update_waste": ppo.waste,
    }
    grads = _clip(ppo.grads, cfg.policy_optim.clip_norm)
  if ptx is None:
    return grads, metrics
  # PPO's gradients first: their norm is among the metrics.
  metrics, ptx = constraints.after(metrics, ptx)
  with jax.named_scope("update/ptx"):
    ptx_loss, ptx_grads = ptx_gradient(nets, cfg, frozen, params, ptx)
    metrics |= {"ptx_loss": ptx_loss, "ptx_grad_norm": cfg.gamma * optax.tree.norm(ptx_grads)}
    # Clipped before it is multiplied with gamma. Afterwards, clipping would bring the product down to the same norm for
    # any large gamma, 27.8 included.
    ptx_grads = _clip(ptx_grads, cfg.policy_optim.clip_norm)
    return jax.tree.map(lambda g, g_lm: g + cfg.gamma * g_lm, grads, ptx_grads), metrics


def _adam(tx: optax.GradientTransformation, grads: Params, params: Params, opt_state: Any):
  """One step of an optimiser: (params, opt_state)."""
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def _once_warm(cfg: PPOConfig, state: PPOState, old: Any, new: Any) -> Any:
  """`new`; or `old`, bit for bit, in the iterations of `value_warmup`, in which only the value network learns."""
  if not cfg.value_warmup:
    return new
  is_warming = state.step < cfg.value_warmup
  return jax.tree.map(lambda before, after: jnp.where(is_warming, before, after), old, new)


def _minibatch_update(
  nets: Nets,
  cfg: PPOConfig,
  rows: RowLayout,
  frozen: Frozen,
  state: PPOState,
  batch: Experience,
  ptx: PackedBatch | None,
):
  """One Adam step of the policy and one of the value network, if there is one. Returns (state, metrics)."""
  # 3b. Policy: the gradients of PPO and of pretraining are added up for one step (C.4; details item 34).
  grads, metrics = policy_gradient(nets, cfg, rows, frozen, state.params, batch, ptx)
  with jax.named_scope("update/policy"):
    learned = _adam(nets.policy_tx, grads, state.params, state.opt_state)
    params, opt_state = _once_warm(cfg, state, (state.params, state.opt_state), learned)
  state = dataclasses.replace(state, params=params, opt_state=opt_state)
  if nets.value_tx is None:
    return state, metrics
  # The policy's step first: its metrics include the gradients' norms.
  metrics, batch = constraints.after(metrics, batch)
  # 3c. Value: a network of its own with its own learning rate (C.4), so its loss needs no coefficient.
  with jax.named_scope("update/value"):
    value = rows.gradient(
      functools.partial(value_loss, nets, cfg, frozen), state.value_params, batch, "is_response_BR"
    )
    metrics |= {
      "value_loss": value.loss,
      "value_grad_norm": optax.tree.norm(value.grads),
      "value_clip_fraction": value.metrics["clip_fraction"],
    }
    grads = _clip(value.grads, cfg.value_optim.clip_norm)
    value_params, value_opt_state = _adam(
      nets.value_tx, grads, state.value_params, state.value_opt_state
    )
  state = dataclasses.replace(state, value_params=value_params, value_opt_state=value_opt_state)
  return state, metrics


def update(
  nets: Nets,
  cfg: PPOConfig,
  rows: RowLayout,
  frozen: Frozen,
  state: PPOState,
  episodes: Experience,
  ptx: PackedBatch | None,
  key: Array,
) -> tuple[PPOState, dict[str, Array]]:
  """Runs the inner epochs of minibatch updates.

  Returns:
    (state, metrics). Metrics are means over the updates; ratio_max is the greatest, and first_ratio_max that of the
    first update, which is 1 if scoring and training compute the same (details item 8).
  """
  # 3a. Every epoch visits every episode once, in a new order (details item 29); the paper has one epoch of 8
  #     minibatches (C.4). Beside each minibatch stands its share of the pretraining rows.
  num_episodes = episodes.token_BL.shape[0]
  # Also where no row can share a prompt: so the same config learns from the same minibatches on all devices.
  group = cfg.samples_per_prompt if cfg.share_prompts else 1
  order = jax.vmap(lambda k: jax.random.permutation(k, num_episodes // group))(
    jax.random.split(key, cfg.num_epochs)
  )
  permutation = (order[:, :, None] * group + jnp.arange(group)[None, None]).reshape(
    cfg.num_epochs * cfg.num_minibatches, num_episodes // cfg.num_minibatches
  )
  share = jnp.tile(jnp.arange(cfg.num_minibatches), cfg.num_epochs)
  ptx = jax.tree.map(lambda x: x.reshape(cfg.num_minibatches, -1, *x.shape[1:]), ptx)

  def one_minibatch(state, inputs):
    index, which = inputs
    # Indexing mixes the rows of all devices, so the sharding by rows is applied again.
    batch = constraints.shard_rows(jax.tree.map(lambda x: x[index], episodes))
    ptx_rows = jax.tree.map(lambda x: x[which], ptx)
    return _minibatch_update(nets, cfg, rows, frozen, state, batch, ptx_rows)

  state, metrics = jax.lax.scan(one_minibatch, state, (permutation, share))
  first_ratio_max = metrics["ratio_max"][0]
  metrics = {
    name: jnp.max(x) if name == "ratio_max" else jnp.mean(x) for name, x in metrics.items()
  }
  return state, metrics | {"first_ratio_max": first_ratio_max}


def train_step(
  nets: Nets, cfg: PPOConfig, rows: RowLayout, state: PPOState, frozen: Frozen, batch: dict
) -> tuple[PPOState, dict[str, Array], Samples]:
  """One PPO iteration. Traceable.

  Args:
    nets, cfg, rows: static.
    state: before the iteration.
    frozen: reference and reward model.
    batch: 'prompts' is a PromptBatch of batch_size rows. For gamma > 0, 'pretrain' is a PackedBatch of
      batch_size * ptx_rows rows.
  Returns:
    (state, metrics, samples). metrics is a dict of float32 scalars; samples are the answers with scores and KLs.
  Raises:
    UserError: see `sampling.generate`.
  """
  # 1. The policy answers a batch of prompts.
  rollout_key, update_key = iteration_keys(state)
  rollout = sample_rollout(nets, cfg, state, frozen, batch["prompts"], rollout_key)
  # 2. The reward model scores the answers, the KL to the reference lowers the reward (sec 3.5, eq. 2), and GAE makes
  #    advantages of it (C.4). The steps of this are numbered in experience.py.
  scored = experience.from_rollout(nets, cfg, rows, state, frozen, rollout)
  return learn(nets, cfg, rows, state, frozen, batch, rollout, scored, update_key)


def iteration_keys(state: PPOState) -> tuple[Array, Array]:
  """The keys of an iteration's rollout and of its updates.

  No two iterations draw the same noise (details item 7). The key itself stays in the state, and the step's number is
  folded into it, so a run that is resumed draws what it would have drawn.
  """
  rollout_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  return rollout_key, update_key


def sample_rollout(
  nets: Nets, cfg: PPOConfig, state: PPOState, frozen: Frozen, prompts: PromptBatch, key: Array
) -> Rollout:
  """The policy's answers to a batch of prompts (sec 3.5), at temperature 1 (C.4). Arguments as `train_step`."""
  # An answer ends with its EOS, which it keeps (details item 4).
  with jax.named_scope("rollout"):
    return sampling.generate(
      nets.policy,
      frozen.policy(nets, state.params),
      prompts,
      key,
      max_new_tokens=nets.max_response_length,
      stop_ids=nets.stop_ids,
      temperature=cfg.temperature,
      slots=nets.slots,
    )


def learn(
  nets: Nets,
  cfg: PPOConfig,
  rows: RowLayout,
  state: PPOState,
  frozen: Frozen,
  batch: dict,
  rollout: Rollout,
  scored: Scored,
  key: Array,
) -> tuple[PPOState, dict[str, Array], Samples]:
  """The part of an iteration that changes the state; arguments and results as `train_step`.

  Args:
    nets, cfg, rows, state, frozen, batch: see there.
    rollout: the policy's answers.
    scored: what `experience` makes of them.
    key: of the updates.
  """
  # 3. Policy and value network learn from minibatches of the episodes; with gamma > 0 the policy also learns from
  #    pretraining text, which makes it PPO-ptx (sec 3.5, eq. 2; C.4).
  ptx = batch["pretrain"] if cfg.gamma > 0 else None
  state, update_metrics = update(nets, cfg, rows, frozen, state, scored.experience, ptx, key)
  # 4. The weights' exponential moving average is what is evaluated (C.4). The paper does not say whether it decays
  #    per iteration, as here, or per update.
  ema_params, decay = state.ema_params, cfg.ema_decay
  if decay:
    ema_params = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema_params, state.params)
    ema_params = _once_warm(cfg, state, state.ema_params, ema_params)
  # 5. Beta is fixed in the paper (C.4).
  #    Departs from paper: 'adaptive' moves it towards a target KL, as lm-human-preferences does (details item 30).
  kl_coef = state.kl_coef
  if cfg.kl_controller == "adaptive":
    kl_coef = kl.adaptive_coef(
      kl_coef,
      scored.metrics["kl"],
      target=cfg.kl_target,
      horizon=cfg.kl_horizon,
      num_episodes=cfg.batch_size,
    )
    kl_coef = _once_warm(cfg, state, state.kl_coef, kl_coef)
  state = dataclasses.replace(state, step=state.step + 1, ema_params=ema_params, kl_coef=kl_coef)
  samples = Samples(rollout, scored.score_B, scored.kl_B, scored.rewards)
  return state, scored.metrics | update_metrics, samples


def make_train_step(nets: Nets, cfg: PPOConfig, state_shardings: PPOState) -> Callable:
  """Compiles `train_step` as one program, (state, frozen, batch) -> (state, metrics, samples), that donates the state.

  Args:
    nets, cfg: static.
    state_shardings: PPOState of NamedSharding, for the state that goes in and comes out. The frozen weights are split
      as those of the network that they share.
  Returns:
    The jitted function. Its first call compiles, and raises what `train_step` raises.
  """
  rows = make_rows(cfg, nets.policy.vocab_size, nets.shares_prompts)

  def step(state, frozen, batch):
    return train_step(nets, cfg, rows, state, frozen, batch)

  mesh = sharding.mesh_of(state_shardings)
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  # Layouts are fixed on both sides: an argument that lies otherwise is an error, not another compilation. The donated
  # state's memory is used again for the new state.
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(state_shardings, frozen_shardings(nets, cfg, state_shardings), split),
    out_shardings=(state_shardings, whole, samples_shardings(mesh)),
    compiler_options=compiler_options(nets, mesh),
  )


def frozen_shardings(nets: Nets, cfg: PPOConfig, state_shardings: PPOState) -> Frozen:
  """Frozen weights are split as those of the network that they share; stacked ones are whole along the new axis."""
  mesh = sharding.mesh_of(state_shardings)
  # Further reward models are whole networks, even beside adapters.
  whole = transformer.param_shardings(mesh, nets.scalar)[0] if cfg.ensemble else None
  (base,) = adapters.base_shardings(mesh, nets.policy) or (None,)
  scalar = () if nets.shares_base else adapters.base_shardings(mesh, nets.scalar)
  return tree_of(
    Frozen,
    ref_params=state_shardings.params,
    reward_params=adapters.trained_shardings(mesh, nets.scalar)[0],
    ensemble_params=sharding.stacked(whole) if cfg.ensemble else None,
    base=base,
    scalar_base=scalar[0] if scalar else None,
  )


def rollout_shardings(mesh: Mesh) -> Rollout:
  """A rollout's rows are split, and its counters are whole on every device."""
  split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  return tree_of(
    Rollout,
    token_BL=split,
    is_token_BL=split,
    is_response_BR=split,
    behaviour_logprob_BR=split,
    num_steps=whole,
    slot_steps=whole,
  )


def samples_shardings(mesh: Mesh) -> Samples:
  """As those of the rollout that the samples hold."""
  split = sharding.batch_sharding(mesh)
  return tree_of(Samples, rollout=rollout_shardings(mesh), score_B=split, kl_B=split, rewards=split)


def compiler_options(nets: Nets, mesh: Mesh) -> dict[str, str]:
  """See `sharding.step_options`."""
  return sharding.step_options(
    mesh, transformer.param_shapes(nets.policy), transformer.param_shapes(nets.scalar)
  )
