"""A stage's real train step with shapes in place of arrays, and which of its bytes belong to whom. Called by plan.py.

Nothing here has weights, data or a tokenizer: a `Context` with no more than a vocabulary size builds the same networks,
optimisers and jitted steps as the stages do.
"""

import dataclasses
import functools
import math
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from instructjax.core.config import Config
from instructjax.core.errors import UserError
from instructjax.core.structs import PackedBatch, PPOState, PromptBatch, RankedBatch, TrainState
from instructjax.models import decoding, flops, transformer
from instructjax.parallel import constraints, sharding
from instructjax.rl import step as ppo_step
from instructjax.stages import ppo, rm
from instructjax.stages.context import Context
from instructjax.train import supervised
from instructjax.train.optim import make_optimizer

STAGES = ("pretrain", "reward_pretrain", "sft", "ppo_init", "rm", "ppo", "ppo_ptx")


@dataclasses.dataclass(frozen=True)
class Program:
  """What to compile, and how to read what comes out.

  Attributes:
    step: the stage's jitted step.
    arguments: of ShapeDtypeStruct with a sharding.
    owners: name -> the part of the arguments that it owns; together all of them.
    inside: name -> ShapeDtypeStructs of arrays that live in the step only, whose size is known.
    decode_layout: how the rollout's copy of the weights is split; None without a rollout.
    rows, tokens: of an iteration; `token_kind` says which tokens are counted.
    model_flops: 6 N + 6 L S D a token of the batch where the step is one forward and backward pass, else None.
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


def make(config: Config, mesh: Mesh, stage: str) -> Program:
  """The step of a stage, as the stage jits it.

  Raises:
    UserError: a parameter or the batch does not divide over the mesh, or the stage has no train step.
  """
  if stage not in STAGES:
    raise UserError(f"--stage={stage} must be one of {', '.join(STAGES)}: stages that train")
  vocab_size = config.tokenizer.vocab_size
  tokenizer = types.SimpleNamespace(vocab_size=vocab_size, eos_id=vocab_size - 1)
  ctx = Context(config=config, workdir=pathlib.Path(), mesh=mesh, tokenizer=tokenizer)
  if stage in ("ppo", "ppo_ptx"):
    return _ppo(ctx, stage)
  return _rm(ctx) if stage == "rm" else _language_model(ctx, stage)


def shard_bytes(tree) -> int:
  """Bytes on one device of a tree of ShapeDtypeStructs."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _placed(shapes, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def _batch(ctx: Context, rows: int, columns: dict[str, tuple], make_tree):
  """Rows of the step's batch: name of the array -> (dtype, dimensions after the rows)."""
  where = sharding.batch_sharding(ctx.mesh)
  return make_tree(
    **{
      key: jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=where)
      for key, (dtype, *dims) in columns.items()
    }
  )


def _require_rows(ctx: Context, what: str, rows: int, mend: str):
  shards = math.prod(ctx.mesh.shape[axis] for axis in sharding.ROWS)
  if rows % shards:
    raise UserError(
      f"{what} must be divisible by mesh {' * '.join(sharding.ROWS)} = {shards}; {mend}, or take a --mesh"
      f" where it is a divisor of {rows}, which --search looks for"
    )


def _packed(ctx: Context, rows: int, length: int) -> PackedBatch:
  ids = dict.fromkeys(("token_BL", "segment_BL", "position_BL"), (np.int32, length))
  return _batch(ctx, rows, ids | {"weight_BL": (np.float32, length)}, PackedBatch)


def _key_shape():
  return jax.eval_shape(lambda: jax.random.key(0))


def _train_state(ctx: Context, model, tx):
  """(TrainState of shapes, its shardings)."""
  shardings = supervised.state_shardings(ctx.mesh, model, tx)
  params = transformer.param_shapes(model)
  step = jax.ShapeDtypeStruct((), jnp.int32)
  shapes = TrainState(step, params, jax.eval_shape(tx.init, params), _key_shape())
  return _placed(shapes, shardings), shardings


def _num_steps(optim) -> int:
  """Any number a schedule takes: it is a constant in the program, which has the same size with every one."""
  return optim.warmup_steps + 1000


def _supervised_owners(state: TrainState, batch) -> dict:
  return {
    "policy master": state.params,
    "optimiser": state.opt_state,
    "batch": (batch, state.step, state.key),
  }


def _language_model(ctx: Context, stage: str) -> Program:
  cfg = getattr(ctx.config, stage)
  role = "reward_base" if stage == "reward_pretrain" else "policy"
  ctx.require_fit([role], {f"config.{stage}.batch_size": cfg.batch_size})
  model = ctx.model(role)
  tx = make_optimizer(cfg.optim, _num_steps(cfg.optim))
  state, shardings = _train_state(ctx, model, tx)
  dropout = cfg.dropout if stage in ("sft", "ppo_init") else 0.0
  batch = _packed(ctx, cfg.batch_size, cfg.length)
  tokens = cfg.batch_size * cfg.length
  return Program(
    step=supervised.make_lm_train_step(model, tx, dropout_rate=dropout, state_shardings=shardings),
    arguments=(state, batch),
    owners=_supervised_owners(state, batch),
    inside={},
    rows=cfg.batch_size,
    tokens=tokens,
    token_kind="tokens",
    model_flops=3 * flops.forward(model, tokens, cfg.length),
  )


def _rm(ctx: Context) -> Program:
  cfg, data = ctx.config.rm, ctx.config.data
  ctx.require_fit(["reward"], {"config.rm.batch_size": cfg.batch_size})
  if cfg.row_length:
    raise UserError(
      f"config.rm.row_length={cfg.row_length} must be 0 to plan: with it the work depends on the answers' lengths,"
      " and what is planned is the bound"
    )
  model = ctx.model("reward")
  tx = make_optimizer(cfg.optim, _num_steps(cfg.optim))
  state, shardings = _train_state(ctx, model, tx)
  answers, length = cfg.max_responses, data.max_prompt_length + data.max_response_length
  rows = _batch(
    ctx,
    cfg.batch_size * answers,
    {"token_SL": (np.int32, length), "segment_SL": (np.int32, length)},
    dict,
  )
  prompts = _batch(
    ctx,
    cfg.batch_size,
    {
      "last_BC": (np.int32, answers),
      "rank_BC": (np.int32, answers),
      "is_answer_BC": (np.bool_, answers),
    },
    dict,
  )
  batch = RankedBatch(**rows, **prompts)
  tokens = cfg.batch_size * answers * length
  return Program(
    step=rm.make_train_step(model, tx, cfg, shardings),
    arguments=(state, batch),
    owners=_supervised_owners(state, batch),
    inside={},
    rows=cfg.batch_size,
    tokens=tokens,
    token_kind="tokens",
    model_flops=3 * flops.forward(model, tokens, length),
  )


def _ppo(ctx: Context, stage: str) -> Program:
  cfg, data, mesh = ppo.variant(ctx, stage), ctx.config.data, ctx.mesh
  ctx.require_fit(["policy", "reward"], {"config.ppo.batch_size": cfg.batch_size})
  if ctx.config.rollout.slots or cfg.packed_rows:
    raise UserError(
      f"config.rollout.slots={ctx.config.rollout.slots} and config.ppo.packed_rows={cfg.packed_rows} must be 0 to"
      " plan: with them the work depends on the answers' lengths, and what is planned is the bound"
    )
  nets = ppo.make_nets(ctx, cfg)
  shardings = ppo.state_shardings(mesh, nets, cfg)
  policy, scalar = transformer.param_shapes(nets.policy), transformer.param_shapes(nets.scalar)
  create = lambda params, value_params, key: ppo_step.create_state(
    params, value_params, nets, cfg, key
  )
  state: PPOState = _placed(jax.eval_shape(create, policy, scalar, _key_shape()), shardings)
  freeze = lambda model, shapes: jax.eval_shape(
    functools.partial(transformer.frozen_weights, model), shapes
  )
  frozen = ppo_step.Frozen(
    _placed(freeze(nets.policy, policy), shardings.params),
    _placed(freeze(nets.scalar, scalar), shardings.value_params),
  )
  prompt = data.max_prompt_length
  columns = {
    "token_BP": (np.int32, prompt),
    "is_prompt_BP": (np.bool_, prompt),
    "index_B": (np.int32,),
  }
  batch = {"prompts": _batch(ctx, cfg.batch_size, columns, PromptBatch)}
  minibatch = cfg.batch_size // cfg.num_minibatches
  # Rows that do not divide are not refused by a run, but then devices do the same work.
  what = f"config.ppo.batch_size / num_minibatches = {minibatch}"
  _require_rows(ctx, what, minibatch, "set fewer --config.ppo.num_minibatches, another recipe")
  if cfg.gamma > 0:
    rows = cfg.batch_size * cfg.ptx_rows
    chunk = minibatch * cfg.ptx_rows // cfg.ptx_chunks
    what = f"config.ppo.batch_size / num_minibatches * ptx_rows / ptx_chunks = {chunk}"
    _require_rows(ctx, what, chunk, "set fewer --config.ppo.ptx_chunks")
    batch["pretrain"] = _packed(ctx, rows, cfg.ptx_length)
  return Program(
    step=ppo_step.make_train_step(nets, cfg, shardings),
    arguments=(state, frozen, batch),
    owners={
      "policy master": state.params,
      "policy optimiser": state.opt_state,
      "policy EMA": state.ema_params,
      "reference": frozen.ref_params,
      "reward": frozen.reward_params,
      "value": state.value_params,
      "value optimiser": state.value_opt_state,
      "batch": (batch, state.step, state.kl_coef, state.key),
    },
    inside=_decoding(mesh, nets, cfg.batch_size, prompt + data.max_response_length),
    rows=cfg.batch_size,
    tokens=cfg.batch_size * data.max_response_length,
    token_kind="sampled tokens",
    model_flops=None,
    decode_layout=nets.policy.execution.decode_layout,
  )


def _decoding(mesh: Mesh, nets: ppo_step.Nets, num_rows: int, length: int) -> dict:
  """The rollout's own arrays: the policy's copy and the cache, with the layouts that the step gives them."""
  model, shapes = nets.policy, transformer.param_shapes(nets.policy)
  copy = jax.eval_shape(lambda weights: decoding.decode_weights(model, weights), shapes)
  gathered = constraints.DECODE_GATHERED[model.execution.decode_layout]
  placed = lambda axes: NamedSharding(mesh, sharding.spec_of(axes, gathered=gathered))
  copy_shardings = jax.tree.map(
    placed, transformer.param_axes(model), is_leaf=lambda node: isinstance(node, tuple)
  )
  cache = jax.eval_shape(lambda: decoding.init_cache(model, num_rows, length))
  heads_and_rows = NamedSharding(mesh, PS(None, sharding.ROWS, "tensor"))
  return {
    "bf16 rollout copy": _placed(copy, copy_shardings),
    "KV cache": _placed(cache, jax.tree.map(lambda _: heads_and_rows, cache)),
  }
