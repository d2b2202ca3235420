"""Builds a stage's real train step with shapes instead of arrays, so that it can be compiled without data.

It also says which bytes belong to what. The config, the mesh and the size of the vocabulary are enough to build the
networks, optimisers and jitted steps that the stages use. No weights, data or tokenizer are needed.
Called by planning.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.core import rewards
from instructjax.core.config import Config, PretrainConfig, SFTConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import STAGES, Stage
from instructjax.core.structs import (
  PackedBatch,
  PPOState,
  PromptBatch,
  RankedBatch,
  TrainState,
  Trees,
)
from instructjax.models import adapters, decoding, flops, resolve_execution, transformer
from instructjax.parallel import constraints, sharding
from instructjax.rl import step as ppo_step
from instructjax.stages import lineage, meshes, policies, rl_nets, rm
from instructjax.stages.context import bare, make_model
from instructjax.train import supervised
from instructjax.train.optim import make_optimizer
from launch.lengths import BOUND, Means

TRAINED = tuple(row.name for row in STAGES.values() if row.role)  # the stages with a train step


@dataclasses.dataclass(frozen=True)
class Program:
  """A train step to compile, with the information needed to interpret the result.

  Attributes:
    step: the stage's jitted step.
    arguments: its arguments, as ShapeDtypeStructs with shardings.
    owners: name -> the arguments that belong to it. Together, these are all arguments.
    inside: name -> ShapeDtypeStructs of large arrays that exist only inside the step.
    rows, tokens: number of rows and tokens of an iteration. `token_kind` says which tokens are counted.
    model_flops: 6 N + 6 L S D per token of the batch if the step is one forward and backward pass, else None.
    decode_layout: how the rollout's copy of the weights is split; None without a rollout.
  """

  step: Callable
  arguments: tuple
  owners: dict[str, Any]
  inside: dict[str, Any]
  rows: int
  tokens: int
  token_kind: str
  model_flops: float | None
  decode_layout: str | None = None


def make(config: Config, mesh: Mesh, stage: str, means: Means = BOUND) -> Program:
  """Builds the step of a stage, jitted in the same way as the stage does it.

  Args:
    config: the run's config.
    mesh: its devices.
    stage: a stage that trains.
    means: lengths of prompts and answers, which decide how many packed rows a batch of rankings has.
  Raises:
    UserError: a parameter, the batch or a part of it cannot be divided over the mesh, or the stage has no train step.
  """
  require_trained(stage, config)
  # Resolved for a TPU, even if the mesh consists of the CPU devices of a test.
  execution = resolve_execution(config.execution, "tpu")
  config = dataclasses.replace(config, execution=execution)
  meshes.require_fit(config, mesh, [stage])
  row = STAGES[stage]
  match row.kind:
    case "base":
      return _language_model(config, mesh, row, dropout_rate=0.0)
    case "sft":
      return _language_model(config, mesh, row, dropout_rate=getattr(config, row.block).dropout)
    case "rm":
      return _rm(config, mesh, means)
    case "rl":
      return _ppo(config, mesh, stage)
  raise ValueError(f"stage {stage} of kind {row.kind} trains a network by an unknown step")


def require_trained(stage: str, config: Config):
  """Checks that a stage has a train step, and that the config gives no weights in place of what it trains.

  Raises:
    UserError: it has none, there is no such stage, or it trains nothing.
  """
  if stage not in TRAINED:
    raise UserError(f"--stage={stage} must be one of {', '.join(TRAINED)}: stages that train")
  if given := lineage.given(config, stage):
    raise UserError(
      f"--stage={stage} trains nothing: config.{STAGES[stage].given_by}={given!r} stands in place of what it trains"
    )


def shard_bytes(tree) -> int:
  """The bytes that a tree of ShapeDtypeStructs takes on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _placed(shapes, shardings):
  """The shapes with shardings attached."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def _batch(mesh: Mesh, rows: int, columns: dict[str, tuple], make_tree):
  """Makes the shapes of a batch.

  Args:
    mesh: the rows are split over it.
    rows: number of rows.
    columns: name of an array -> (dtype, dimensions after the rows).
    make_tree: makes the batch from the arrays by name.
  """
  where = sharding.batch_sharding(mesh)
  return make_tree(
    **{
      key: jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=where)
      for key, (dtype, *dims) in columns.items()
    }
  )


def _packed(mesh: Mesh, rows: int, length: int) -> PackedBatch:
  ids = dict.fromkeys(("token_BL", "segment_BL", "position_BL"), (np.int32, length))
  return _batch(mesh, rows, ids | {"weight_BL": (np.float32, length)}, PackedBatch)


def _key_shape():
  return jax.eval_shape(lambda: jax.random.key(0))


def _train_state(mesh: Mesh, model, tx):
  """The shapes of a supervised stage's state, and its shardings."""
  shardings = supervised.state_shardings(mesh, model, tx)
  params = adapters.trained_shapes(model)
  step = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = TrainState(step, params, jax.eval_shape(tx.init, params), _key_shape())
  return _placed(shapes, shardings), shardings


def _base(mesh: Mesh, model) -> tuple:
  """The shapes of an adapted model's base, as one more argument of its step; () without an adapter."""
  shardings = adapters.base_shardings(mesh, model)
  if not shardings:
    return ()
  freeze = functools.partial(adapters.freeze, model)
  shapes = jax.eval_shape(freeze, transformer.param_shapes(model))
  return (_placed(adapters.base_of(model, shapes), shardings[0]),)


def _num_steps(optim) -> int:
  """A valid number of steps for the schedule. Its value is a constant in the program and does not change the cost."""
  return optim.warmup_steps + 1000


def _supervised_owners(state: TrainState, batch, base: tuple) -> dict:
  return {
    **({"base": base} if base else {}),
    "adapter" if base else "policy master": state.params,
    "optimiser": state.opt_state,
    "batch": (batch, state.step, state.key),
  }


def _language_model(config: Config, mesh: Mesh, stage: Stage, *, dropout_rate: float) -> Program:
  """The step of pretraining or supervised fine-tuning."""
  cfg: PretrainConfig | SFTConfig = getattr(config, stage.block)
  model = make_model(config, mesh, stage.role, config.tokenizer.vocab_size)
  model = bare(model) if stage.is_base else model
  tx = make_optimizer(cfg.optim, _num_steps(cfg.optim))
  state, shardings = _train_state(mesh, model, tx)
  base = _base(mesh, model)
  batch = _packed(mesh, cfg.batch_size, cfg.length)
  tokens = cfg.batch_size * cfg.length
  return Program(
    step=supervised.make_lm_train_step(
      model,
      tx,
      dropout_rate=dropout_rate,
      state_shardings=shardings,
      microbatches=cfg.microbatches,
    ),
    arguments=(state, *base, batch),
    owners=_supervised_owners(state, batch, base),
    inside={},
    rows=cfg.batch_size,
    tokens=tokens,
    token_kind="tokens",
    model_flops=flops.training(model, tokens, cfg.length),
  )


def ranked_rows(
  config: Config, shards: int, means: Means, shares_prompts: bool = False
) -> tuple[int, int]:
  """Rows of a batch of rankings, and their length: an answer a row, or answers packed into rows.

  Args:
    config: the run's.
    shards: parts that rows are split into.
    means: of lengths.
    shares_prompts: whether rows hold one copy of a prompt for its answers.
  """
  cfg, data = config.rm, config.data
  answers, length = (
    cfg.batch_size * cfg.max_responses,
    data.max_prompt_length + data.max_response_length,
  )
  if not cfg.row_length:
    return answers, length
  prompt = means.prompt or data.max_prompt_length
  prompts = cfg.batch_size if shares_prompts else answers
  tokens = prompts * prompt + answers * (means.response or data.max_response_length)
  parts = shards * cfg.microbatches
  return math.ceil(tokens / cfg.row_length / parts) * parts, cfg.row_length


def _rm(config: Config, mesh: Mesh, means: Means) -> Program:
  """The step of the reward model."""
  cfg = config.rm
  model = make_model(config, mesh, "reward", config.tokenizer.vocab_size)
  tx = make_optimizer(cfg.optim, _num_steps(cfg.optim))
  state, shardings = _train_state(mesh, model, tx)
  base = _base(mesh, model)
  answers = cfg.max_responses
  is_shared = rm.shares_prompts(cfg, model)
  number, length = ranked_rows(config, sharding.num_row_shards(mesh), means, is_shared)
  columns = (np.int32, length)
  rows = _batch(mesh, number, {"token_SL": columns, "segment_SL": columns}, dict)
  if is_shared:
    names = ("segment_BL", "position_BL", "last_BL")
    rows["segment_SL"] = _batch(mesh, number, dict.fromkeys(names, columns), Trees)
  prompts = _batch(
    mesh,
    cfg.batch_size,
    {
      "last_BC": (np.int32, answers),
      "rank_BC": (np.int32, answers),
      "is_answer_BC": (np.bool_, answers),
    },
    dict,
  )
  batch = RankedBatch(**rows, **prompts)
  tokens = number * length
  return Program(
    step=rm.make_train_step(model, tx, cfg, shardings),
    arguments=(state, *base, batch),
    owners=_supervised_owners(state, batch, base),
    inside={},
    rows=cfg.batch_size,
    tokens=tokens,
    token_kind="tokens",
    model_flops=flops.training(model, tokens, length),
  )


def _ppo(config: Config, mesh: Mesh, stage: str) -> Program:
  """The step of an RL stage, which is a whole iteration: rollout, scoring and updates."""
  cfg, data = lineage.variant(config, stage), config.data
  # Functions and rules take no memory of the devices, and split the program in parts that need no more than the whole.
  # The network of a `model:` is not counted, as docs/rewards.md says.
  cfg = dataclasses.replace(cfg, rewards=rewards.on_devices(cfg.rewards))
  vocab_size = config.tokenizer.vocab_size
  nets = rl_nets.make_nets(config, mesh, cfg, vocab_size, stop_ids=(vocab_size - 1,))
  nets = dataclasses.replace(nets, shares_base=nets.shares_base or _are_of_one_base(config, mesh))
  shardings = rl_nets.state_shardings(mesh, nets, cfg)
  policy, scalar = (adapters.trained_shapes(model) for model in (nets.policy, nets.scalar))
  create = lambda params, value_params, key: ppo_step.create_state(
    params, value_params, nets, cfg, key
  )
  value = scalar if cfg.has_value_network else None
  state: PPOState = _placed(jax.eval_shape(create, policy, value, _key_shape()), shardings)
  # Adapters are small and stay float32.
  freeze = lambda model, shapes: (
    shapes
    if model.adapter
    else jax.eval_shape(functools.partial(transformer.frozen_weights, model), shapes)
  )
  frozen = ppo_step.Frozen(
    _placed(freeze(nets.policy, policy), shardings.params),
    _placed(freeze(nets.scalar, scalar), adapters.trained_shardings(mesh, nets.scalar)[0]),
    _ensemble(cfg.ensemble, mesh, nets.scalar),
    *_base(mesh, nets.policy),
    *(() if nets.shares_base else _base(mesh, nets.scalar)),
  )
  prompt = data.max_prompt_length
  columns = {
    "token_BP": (np.int32, prompt),
    "is_prompt_BP": (np.bool_, prompt),
    "index_B": (np.int32,),
  }
  batch = {"prompts": _batch(mesh, cfg.batch_size, columns, PromptBatch)}
  if cfg.gamma > 0:
    rows = cfg.batch_size * cfg.ptx_rows
    batch["pretrain"] = _packed(mesh, rows, cfg.ptx_length)
  return Program(
    step=ppo_step.make_train_step(nets, cfg, shardings),
    arguments=(state, frozen, batch),
    owners={
      **({"base": (frozen.base, frozen.scalar_base)} if frozen.base else {}),
      "policy master": state.params,
      "policy optimiser": state.opt_state,
      "policy EMA": state.ema_params,
      "reference": frozen.ref_params,
      "reward": (frozen.reward_params, frozen.ensemble_params),
      **(
        {"value": state.value_params, "value optimiser": state.value_opt_state}
        if cfg.has_value_network
        else {}
      ),
      "batch": (batch, state.step, state.kl_coef, state.key),
    },
    inside=_decoding(mesh, nets, cfg.batch_size, prompt, data.max_response_length),
    rows=cfg.batch_size,
    tokens=cfg.batch_size * data.max_response_length,
    token_kind="sampled tokens",
    model_flops=None,
    decode_layout=nets.policy.execution.decode_layout,
  )


def _ensemble(members: tuple[str, ...], mesh: Mesh, model):
  """The shapes of further reward models, whole and stacked; None if there are none."""
  if not members:
    return None
  stack = lambda x: jax.ShapeDtypeStruct((len(members), *x.shape), x.dtype)
  places, shapes = transformer.param_shardings(mesh, model)
  shapes = jax.eval_shape(functools.partial(transformer.frozen_weights, model), shapes)
  return _placed(jax.tree.map(stack, shapes), sharding.stacked(places))


def _are_of_one_base(config: Config, mesh: Mesh) -> bool:
  """Whether policy and reward model are given as adapters of one base. What cannot be read here is taken for two.

  As `bases.is_shared`, which a run asks.
  """
  stages = lineage.frozen_stages(config)
  if not (lineage.is_adapted(config) and config.same_network):
    return False
  try:
    opened = policies.given_weights(config)
  except UserError:  # a plan needs no weights
    return False
  places = set()
  for stage in stages:
    given = opened.get(stage)
    if given is None or not given.is_adapter:
      return False
    role = STAGES[stage].require_role()
    model = make_model(config, mesh, role, config.tokenizer.vocab_size)
    places.add(given.path if given.misfit(model) else given.require_base().path)
  return len(places) == 1


def _decoding(
  mesh: Mesh, nets: ppo_step.Nets, num_rows: int, prompt_length: int, response_length: int
) -> dict:
  """The large arrays of the rollout, with the shardings of the step: the policy's copy and the KV cache."""
  model = nets.policy
  trained, base = adapters.trained_shapes(model), transformer.param_shapes(model)
  freeze = functools.partial(adapters.freeze, model) if model.adapter else lambda base: base
  read = lambda base, trained: decoding.decode_weights(
    model, adapters.join(model, freeze(base), trained)
  )
  # The mesh decides how far the tables are lengthened.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    copy = jax.eval_shape(read, base, trained)
  layout = model.execution.decode_layout
  placed = lambda axes: NamedSharding(mesh, constraints.decode_spec(axes, layout))
  copy_shardings = jax.tree.map(
    placed,
    adapters.base_axes(copy, transformer.param_axes(model)),
    is_leaf=lambda node: isinstance(node, tuple),
  )
  heads_and_rows = NamedSharding(mesh, PS(None, sharding.ROWS, "tensor"))

  def cache(rows: int, length: int, band_length: int | None = None):
    shapes = jax.eval_shape(lambda: decoding.init_cache(model, rows, length, band_length))
    return _placed(shapes, jax.tree.map(lambda _: heads_and_rows, shapes))

  slots, length = nets.slots or num_rows, prompt_length + response_length
  return {
    "bf16 rollout copy": _placed(copy, copy_shardings),
    "KV cache": cache(slots, length, decoding.ring_length(model, length)),
    # The prompts that wait for a slot.
    **({"KV cache of waiting prompts": cache(slots, prompt_length)} if slots < num_rows else {}),
  }
