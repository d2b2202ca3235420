"""The networks and optimisers of an RL stage, and its state before the first iteration. Called by ppo.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax.core.config import Config, OptimConfig, PPOConfig
from instructjax.core.structs import Params, PPOState, tree_of
from instructjax.models import adapters, execution, heads, transformer
from instructjax.parallel import sharding
from instructjax.rl import shared_prompts
from instructjax.rl import step as ppo_step
from instructjax.stages import lineage
from instructjax.stages.context import make_model
from instructjax.train.optim import make_optimizer, require_steps


def make_nets(
  config: Config, mesh: Mesh, cfg: PPOConfig, vocab_size: int, stop_ids: tuple[int, ...]
) -> ppo_step.Nets:
  """The networks and optimisers of an RL stage.

  The optimisers do not clip. The step clips each term of the gradient on its own, so that clipping cannot change the
  weight of one term against the other.

  Args:
    config: the run's config.
    mesh: its devices.
    cfg: the PPO settings of the stage, see `lineage.variant`.
    vocab_size, stop_ids: those of the tokenizer.
  Raises:
    UserError: the warmup is as long as the stage.
  """
  policy_tx, value_tx = optimizers(config, cfg)
  policy = make_model(config, mesh, "policy", vocab_size)
  return ppo_step.Nets(
    policy=policy,
    scalar=make_model(config, mesh, "reward", vocab_size),
    policy_tx=policy_tx,
    value_tx=value_tx,
    stop_ids=stop_ids,
    max_response_length=config.data.max_response_length,
    slots=config.rollout.slots,
    shares_base=len(set(lineage.frozen_stages(config))) == 1,
    value_on_policy=cfg.value_init == "policy",
    shares_prompts=cfg.share_prompts and not why_not_shared(config, cfg, mesh, policy),
  )


def why_not_shared(config: Config, cfg: PPOConfig, mesh: Mesh, model: transformer.Model) -> str:
  """What keeps rows from holding one copy of a prompt for its answers; '' if nothing does."""
  if cfg.samples_per_prompt == 1:
    return "each prompt has one answer"
  if not cfg.packed_rows:
    return "ppo.packed_rows=0 gives each answer a row of its own"
  if why := execution.why_no_trees(model.execution):
    return why
  shards = sharding.num_row_shards(mesh)
  if has_room(config, cfg, cfg.packed_rows, shards):
    return ""
  minibatch = cfg.batch_size // cfg.num_minibatches
  # What the config would take: rows that divide a minibatch, and over the devices.
  others = [
    n
    for n in range(shards, minibatch + 1, shards)
    if minibatch % n == 0 and has_room(config, cfg, n, shards)
  ]
  advice = f"{others[0]} would do" if others else "no number of them would do"
  return f"ppo.packed_rows={cfg.packed_rows} leaves a device rows that are too short; {advice}"


def has_room(config: Config, cfg: PPOConfig, rows: int, shards: int) -> bool:
  """Whether a device's share of `rows` rows can be joined to rows that hold a prompt with all of its answers."""
  prompt_length = config.data.max_prompt_length
  length = prompt_length + config.data.max_response_length
  width = shared_prompts.row_width(length, prompt_length, cfg.samples_per_prompt, rows, shards)
  return width is not None


def optimizers(config: Config, cfg: PPOConfig):
  """Those of the policy and of the value network; None where there is no value network."""

  # The schedule counts updates, of which an iteration makes one for each minibatch of each epoch.
  def unclipped(optim: OptimConfig, name: str, iterations: int):
    updates = iterations * cfg.num_epochs * cfg.num_minibatches
    require_steps(optim, updates, f"config.ppo.{name}")
    return make_optimizer(
      dataclasses.replace(lineage.optim(config, optim), clip_norm=None), updates
    )

  # While only the value network learns, the policy's schedule stands still.
  policy_tx = unclipped(cfg.policy_optim, "policy_optim", cfg.num_iterations - cfg.value_warmup)
  if not cfg.has_value_network:
    return policy_tx, None
  return policy_tx, unclipped(cfg.value_optim, "value_optim", cfg.num_iterations)


def state_shardings(mesh: Mesh, nets: ppo_step.Nets, cfg: PPOConfig) -> PPOState:
  """The sharding of a PPOState: optimiser states and the average are sharded like the weights that they belong to."""
  replicated = sharding.replicated(mesh)
  policy_shardings, policy_shapes = adapters.trained_shardings(mesh, nets.policy)
  value_shardings = value_opt_state = None
  if nets.value_tx is not None:
    value_shardings, value_shapes = adapters.trained_shardings(mesh, nets.scalar)
    value_opt_state = sharding.opt_state_shardings(
      nets.value_tx, value_shapes, value_shardings, mesh
    )
  return tree_of(
    PPOState,
    step=replicated,
    params=policy_shardings,
    opt_state=sharding.opt_state_shardings(nets.policy_tx, policy_shapes, policy_shardings, mesh),
    value_params=value_shardings,
    value_opt_state=value_opt_state,
    ema_params=policy_shardings if cfg.ema_decay else None,
    kl_coef=replicated,
    key=replicated,
  )


def initial_state(
  mesh: Mesh,
  cfg: PPOConfig,
  nets: ppo_step.Nets,
  params: Params,
  value_params: Params | None,
  key: jax.Array,
) -> tuple[PPOState, PPOState]:
  """Makes the PPOState before the first iteration; returns (state, its shardings).

  The policy starts as `params`, and the value network, if there is one, as `value_params`: see `initial_value`.
  """
  shardings = state_shardings(mesh, nets, cfg)

  def create(params, value_params, key):
    # Copies, because the step donates its state and the originals go on as reference and reward model.
    params, value_params = jax.tree.map(jnp.copy, (params, value_params))
    return ppo_step.create_state(params, value_params, nets, cfg, key)

  return jax.jit(create, out_shardings=shardings)(params, value_params, key), shardings


def initial_value(
  mesh: Mesh, cfg: PPOConfig, nets: ppo_step.Nets, params: Params, reward_params: Params
) -> Params | None:
  """What the value network starts from: the reward model (details item 20), or the policy's trunk under a new head.

  The new head is of zeros, as in N: its first values are 0, the reward model's mean over demonstrations (C.2). None if
  there is no value network.
  """
  if not cfg.has_value_network:
    return None
  if cfg.value_init == "reward_model":
    return reward_params
  shardings, shapes = adapters.trained_shardings(mesh, nets.scalar)
  head = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["head"])
  return jax.device_put(heads.scalar_params_from_lm(params, shapes | {"head": head}), shardings)


def freeze(
  nets: ppo_step.Nets,
  shardings: PPOState,
  ref_params: Params,
  reward_params: Params,
  ensemble_params: Params | None = None,
  base: tuple[Params, ...] = (),
  scalar_base: tuple[Params, ...] = (),
) -> ppo_step.Frozen:
  """The reference and the reward model as the step reads them: cast once to the dtype that they run in.

  In float32 there is nothing to cast, and the weights are taken as they are, without a copy. So are those of
  `ensembles.load`, which come in their dtype. Adapters are small and stay float32; their base comes from
  `bases.of_networks`, and that of the reward model only if it is another one.
  """
  if base:
    return ppo_step.Frozen(ref_params, reward_params, ensemble_params, base[0], *scalar_base)

  def frozen(model, params):
    if model.execution.dtype == "float32":
      return params
    places, _ = transformer.param_shardings(sharding.mesh_of(shardings), model)
    cast = functools.partial(transformer.frozen_weights, model)
    return jax.jit(cast, out_shardings=places)(params)

  return ppo_step.Frozen(
    ref_params=frozen(nets.policy, ref_params),
    reward_params=frozen(nets.scalar, reward_params),
    ensemble_params=ensemble_params,
  )
