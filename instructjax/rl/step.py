"""PPO and PPO-ptx (sec 3.5, eq. 2, C.4): one iteration is one XLA program.

`make_train_step` compiles `train_step`, which rolls out (sampling.py), scores and computes advantages (experience.py)
and runs the minibatch updates, which are here. Nothing touches the host; the stage around it is stages/ppo.py.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from instructjax.core.config import PPOConfig
from instructjax.core.structs import (
  Array,
  PackedBatch,
  Params,
  PPOState,
  PromptBatch,
  Rollout,
  Samples,
)
from instructjax.models import transformer
from instructjax.ops import kl, surrogate
from instructjax.parallel import constraints, sharding
from instructjax.rl import experience, sampling, scoring, shared_rows
from instructjax.rl.experience import Experience, Frozen, Nets
from instructjax.train import optim, supervised


def create_state(
  params: Params, value_params: Params, nets: Nets, cfg: PPOConfig, key: Array
) -> PPOState:
  """State before the first iteration; the value network starts as the reward model (C.4)."""
  return PPOState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=nets.policy_tx.init(params),
    value_params=value_params,
    value_opt_state=nets.value_tx.init(value_params),
    ema_params=jax.tree.map(jnp.copy, params) if cfg.ema_decay else None,
    kl_coef=jnp.float32(cfg.beta),
    key=key,
  )


def policy_loss(params, nets: Nets, cfg: PPOConfig, batch: Experience):
  """Clipped surrogate of one minibatch, to be minimised. Returns (loss, metrics)."""
  prompt_length = batch.token_BL.shape[1] - batch.is_response_BR.shape[1]
  logprob_BR = scoring.response_logprob(
    nets.policy,
    params,
    batch.token_BL,
    batch.segment_BL,
    prompt_length=prompt_length,
    temperature=cfg.temperature,
  )
  return surrogate.clipped_surrogate(
    logprob_BR, batch.behaviour_logprob_BR, batch.advantage_BR, batch.is_actor_BR, clip=cfg.clip
  )


def value_loss(value_params, nets: Nets, cfg: PPOConfig, batch: Experience):
  """Value loss of one minibatch, clipped around the rollout's values if configured. Returns (loss, metrics)."""
  prompt_length = batch.token_BL.shape[1] - batch.is_response_BR.shape[1]
  value_BR = scoring.response_value(
    nets.scalar, value_params, batch.token_BL, batch.segment_BL, prompt_length=prompt_length
  )
  return surrogate.clipped_value_loss(
    value_BR, batch.value_BR, batch.return_BR, batch.is_response_BR, clip=cfg.value_clip
  )


def packed(batch: Experience, pad_id: int, rows: int) -> tuple[Experience, shared_rows.Layout]:
  """The same episodes with several in a row, and where they lie; `rows` as `shared_rows.first_fit` has it."""
  layout = shared_rows.first_fit(batch.segment_BL > 0, rows=rows)
  prompt_length = batch.token_BL.shape[1] - batch.is_response_BR.shape[1]
  responses = {
    field.name: shared_rows.pack(
      layout, jnp.pad(getattr(batch, field.name), ((0, 0), (prompt_length, 0))), 0
    )
    for field in dataclasses.fields(batch)
    if field.name.endswith("_BR")
  }
  token_BL = shared_rows.pack(layout, batch.token_BL, pad_id)
  return Experience(token_BL=token_BL, segment_BL=shared_rows.segments(layout), **responses), layout


def _loss_gradient(
  loss_fn: Callable, params, nets: Nets, cfg: PPOConfig, batch: Experience, over: str
):
  """((loss, metrics), gradient) of `policy_loss` or `value_loss`, means over the tokens that the field `over` marks."""
  num_tokens = jnp.sum(batch.segment_BL > 0)
  if not cfg.packed_rows:
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, nets, cfg, batch)
    return (loss, metrics | {"update_waste": 1 - num_tokens / batch.segment_BL.size}), grads
  rows, layout = packed(batch, nets.policy.vocab_size, cfg.packed_rows)

  def chunk_loss(params, chunk: Experience):
    fields = {f.name: getattr(chunk, f.name) for f in dataclasses.fields(chunk)}
    responses = {name: x[:, 1:] for name, x in fields.items() if name.endswith("_BR")}
    return loss_fn(params, nets, cfg, dataclasses.replace(chunk, **responses))

  (loss, metrics), grads = shared_rows.mean_gradient(
    chunk_loss, params, layout, rows, over, rows=cfg.packed_rows
  )
  waste = 1 - num_tokens / shared_rows.num_cells(layout, rows=cfg.packed_rows)
  return (loss, metrics | {"update_waste": waste}), grads


def ptx_gradient(params, nets: Nets, cfg: PPOConfig, rows: PackedBatch):
  """Gradient and value of the pretraining term, -E[log pi(x)] of eq. 2, over one minibatch's pretraining rows.

  The paper gives gamma = 27.8 but not whether log pi(x) is a mean or a sum over tokens. 'mean' is the mean per token
  over all rows; 'sum' is the sum over a row's tokens, averaged over rows. Rows are taken in `ptx_chunks` chunks, which
  bound the memory of activations. On a mesh each chunk gathers the weights anew and scatters their gradient.
  """
  num_rows = rows.token_BL.shape[0]
  denominator = jnp.sum(rows.weight_BL) if cfg.ptx_reduction == "mean" else jnp.float32(num_rows)
  chunks = jax.tree.map(
    lambda x: x.reshape(cfg.ptx_chunks, num_rows // cfg.ptx_chunks, *x.shape[1:]), rows
  )

  def chunk_loss(params, chunk: PackedBatch):
    sum_nll, _ = supervised.lm_loss_sums(nets.policy, params, chunk)
    return sum_nll / denominator

  def add_chunk(total, chunk):
    return jax.tree.map(
      jnp.add, total, jax.value_and_grad(chunk_loss)(params, constraints.shard_rows(chunk))
    ), None

  zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
  (loss, grads), _ = jax.lax.scan(add_chunk, zero, chunks)
  return loss, grads


def _clip(grads, max_norm: float | None):
  """Clips one term's gradient by its own norm: clipping the sum would let gamma rescale PPO without notice."""
  return grads if max_norm is None else optim.clip_by_global_norm(grads, max_norm)


def policy_gradient(params, nets: Nets, cfg: PPOConfig, batch: Experience, ptx: PackedBatch | None):
  """Gradient of eq. 2 for one minibatch: PPO's plus gamma times the pretraining term's, for one Adam step (C.4)."""
  with jax.named_scope("update/policy"):
    (loss, metrics), grads = _loss_gradient(policy_loss, params, nets, cfg, batch, "is_actor_BR")
    metrics = {"policy_loss": loss, "policy_grad_norm": optax.tree.norm(grads)} | metrics
    grads = _clip(grads, cfg.policy_optim.clip_norm)
  if ptx is None:
    return grads, metrics
  with jax.named_scope("update/ptx"):
    ptx_loss, ptx_grads = ptx_gradient(params, nets, cfg, ptx)
    metrics |= {"ptx_loss": ptx_loss, "ptx_grad_norm": cfg.gamma * optax.tree.norm(ptx_grads)}
    # Clipped before gamma: clipped after it, any large gamma (27.8, say) would act as the same small one.
    ptx_grads = _clip(ptx_grads, cfg.policy_optim.clip_norm)
    return jax.tree.map(lambda g, g_lm: g + cfg.gamma * g_lm, grads, ptx_grads), metrics


def _update(
  nets: Nets, cfg: PPOConfig, weights, scored: Experience, ptx: PackedBatch | None, key: Array
):
  """Runs the inner epochs of minibatch updates, each epoch over a fresh permutation of the episodes."""
  num_episodes = scored.token_BL.shape[0]
  minibatch = num_episodes // cfg.num_minibatches
  permutation = jax.vmap(lambda k: jax.random.permutation(k, num_episodes))(
    jax.random.split(key, cfg.num_epochs)
  ).reshape(cfg.num_epochs * cfg.num_minibatches, minibatch)
  ptx_index = jnp.tile(jnp.arange(cfg.num_minibatches), cfg.num_epochs)
  if ptx is not None:
    ptx = jax.tree.map(lambda x: x.reshape(cfg.num_minibatches, -1, *x.shape[1:]), ptx)

  def one_update(weights, inputs):
    params, opt_state, value_params, value_opt_state = weights
    rows, which = inputs
    batch = constraints.shard_rows(jax.tree.map(lambda x: x[rows], scored))
    ptx_rows = None if ptx is None else jax.tree.map(lambda x: x[which], ptx)
    grads, metrics = policy_gradient(params, nets, cfg, batch, ptx_rows)
    with jax.named_scope("update/policy"):
      updates, opt_state = nets.policy_tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
    with jax.named_scope("update/value"):
      (loss, value_metrics), grads = _loss_gradient(
        value_loss, value_params, nets, cfg, batch, "is_response_BR"
      )
      metrics |= {"value_loss": loss, "value_grad_norm": optax.tree.norm(grads)}
      metrics |= {"value_clip_fraction": value_metrics["clip_fraction"]}
      grads = _clip(grads, cfg.value_optim.clip_norm)
      updates, value_opt_state = nets.value_tx.update(grads, value_opt_state, value_params)
      value_params = optax.apply_updates(value_params, updates)
    return (params, opt_state, value_params, value_opt_state), metrics

  weights, metrics = jax.lax.scan(one_update, weights, (permutation, ptx_index))
  first_ratio_max = metrics["ratio_max"][0]
  metrics = {
    name: jnp.max(x) if name == "ratio_max" else jnp.mean(x) for name, x in metrics.items()
  }
  return weights, metrics | {"first_ratio_max": first_ratio_max}


def train_step(nets: Nets, cfg: PPOConfig, state: PPOState, frozen: Frozen, batch: dict):
  """One PPO iteration, traceable.

  Args:
    nets, cfg: static.
    state: before the iteration.
    frozen: reference and reward model.
    batch: {'prompts': PromptBatch of batch_size rows} and, for gamma > 0, {'pretrain': PackedBatch of
      batch_size * ptx_rows rows}.
  Returns:
    (state, metrics: dict of float32 scalars, samples: Samples).
  """
  rollout_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
  prompts: PromptBatch = batch["prompts"]
  with jax.named_scope("rollout"):
    rollout = sampling.generate(
      nets.policy,
      state.params,
      prompts,
      rollout_key,
      max_new_tokens=nets.max_response_length,
      eos_id=nets.eos_id,
      temperature=cfg.temperature,
      slots=nets.slots,
    )
  scored, metrics, score_B, kl_B = experience.from_rollout(
    nets, cfg, state.params, state.value_params, frozen, state.kl_coef, rollout
  )
  weights = (state.params, state.opt_state, state.value_params, state.value_opt_state)
  ptx = batch["pretrain"] if cfg.gamma > 0 else None
  weights, update_metrics = _update(nets, cfg, weights, scored, ptx, update_key)
  params, opt_state, value_params, value_opt_state = weights
  ema_params, decay = state.ema_params, cfg.ema_decay
  if decay:
    ema_params = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema_params, params)
  kl_coef = state.kl_coef
  if cfg.kl_controller == "adaptive":
    kl_coef = kl.adaptive_kl_coef(
      kl_coef,
      metrics["kl"],
      target=cfg.kl_target,
      horizon=cfg.kl_horizon,
      num_episodes=cfg.batch_size,
    )
  state = PPOState(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    value_params=value_params,
    value_opt_state=value_opt_state,
    ema_params=ema_params,
    kl_coef=kl_coef,
    key=state.key,
  )
  return state, metrics | update_metrics, Samples(rollout, score_B, kl_B)


def make_train_step(nets: Nets, cfg: PPOConfig, state_shardings: PPOState) -> Callable:
  """Compiles `train_step` as one program with a donated state: (state, frozen, batch) -> (state, metrics, samples).

  Args:
    nets, cfg: static.
    state_shardings: PPOState of NamedSharding: how the state comes in and goes out. The frozen weights lie as those
      of the network that they share.
  """

  def step(state, frozen, batch):
    return train_step(nets, cfg, state, frozen, batch)

  mesh = state_shardings.step.mesh
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  rollout = Rollout(
    token_BL=rows,
    is_token_BL=rows,
    is_response_BR=rows,
    behaviour_logprob_BR=rows,
    num_steps=whole,
    slot_steps=whole,
  )
  samples = Samples(rollout, score_B=rows, kl_B=rows)
  frozen = Frozen(ref_params=state_shardings.params, reward_params=state_shardings.value_params)
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(state_shardings, frozen, rows),
    out_shardings=(state_shardings, whole, samples),
    compiler_options=sharding.step_options(
      mesh, transformer.param_shapes(nets.policy), transformer.param_shapes(nets.scalar)
    ),
  )
