"""The frozen bases of the run's adapters, and what an adapter is before it is trained.

A base is what `pretrain` or `reward_pretrain` has trained, or weights that the config gives: in place of these two, or
a finished network in place of `sft`, `ppo_init` or `rm`, which is then the base of what is trained from it. Weights
that are an adapter themselves are trained on, on the base that they belong to, if they fit the run's adapters;
otherwise they are merged into it.

Called by policies.py and by the stages. Without adapters nothing here is asked, except for `given`.
"""

import functools
import pathlib

import jax

from instructjax.core import terminal
from instructjax.core.stages import STAGES, RoleName
from instructjax.core.structs import Params
from instructjax.models import adapters, transformer
from instructjax.stages import lineage
from instructjax.stages.context import Context, bare, goes_on
from instructjax.stages.text_rows import validation_rows
from instructjax.train import supervised, weights
from instructjax.train.weights import Weights


@functools.lru_cache(maxsize=3)
def _frozen(ctx: Context, stage: str) -> Params:
  """The weights of a base as forward passes read them, cast once to the dtype that they run in; with their head."""
  # Kept, so that all networks of a run and all of its stages share one copy: the policy's base, the reward model's if
  # that has another, and the one that is only compared with.
  model = bare(ctx.model(STAGES[stage].require_role()))
  params = _whole(ctx, stage, model)
  adapter = ctx.config.adapter
  if model.execution.dtype == "float32" and adapter.base == "float":
    return params
  adapted = model.clone(adapter=adapter)
  (places,) = adapters.base_shardings(ctx.mesh, adapted)
  head = params.get("head") if model.head == "scalar" else None
  base = adapters.base_of(adapted, params)
  frozen = jax.jit(functools.partial(adapters.freeze, adapted), out_shardings=places)(base)
  if adapter.base == "int8" and model.head == "lm":
    _tell_rounding(ctx, adapted, base, frozen)
  return frozen if head is None else frozen | {"head": head}


def _whole(ctx: Context, stage: str, model: transformer.Model) -> Params:
  """The float32 weights of a base; says what becomes of an adapter that is given."""
  given = ctx.given.get(stage)
  if given is None:
    step = ctx.require_done(stage).require_step()
    return weights.load_stage(ctx.directory(stage), ctx.mesh, model, step, "params")
  tell = terminal.say if jax.process_index() == 0 else lambda line: None
  if goes_on(ctx, stage):
    base = given.require_base()
    tell(f"{given.path} is an adapter of {base.path}: it is trained on, beside that frozen base")
    return base.load(ctx.mesh, model.clone(head=base.head))
  if given.is_adapter:
    why = given.misfit(model.clone(adapter=ctx.config.adapter))
    tell(f"{given.path} is an adapter, and is merged into its base: {why}")
  return given.load(ctx.mesh, model)


def _tell_rounding(ctx: Context, model: transformer.Model, params: Params, frozen: Params):
  """Says what a base in 8 bits costs: its loss on held-out text, before and after."""
  loss = supervised.make_lm_evaluation(model, ctx.mesh, ctx.config.pretrain.microbatches)
  rows = validation_rows(ctx, ctx.config.pretrain.length)
  before, after = loss(params, rows), loss(frozen, rows)
  if jax.process_index() == 0:
    terminal.say(
      f"the frozen base in int8: loss on held-out text {after:.4f}, {after - before:+.4f} by rounding"
    )


def base(ctx: Context, stage: str) -> tuple[Params, ...]:
  """The frozen base of the adapter that a stage trains, as one more argument of a step; () if all weights are trained.

  Raises:
    UserError: the weights cannot be read.
  """
  if not lineage.is_adapted(ctx.config):
    return ()
  model, frozen = ctx.model(STAGES[stage].require_role()), lineage.frozen_stage(ctx.config, stage)
  policy, reward = lineage.frozen_stages(ctx.config)
  if frozen == reward and is_shared(ctx):
    frozen = policy
  return (adapters.base_of(model, _frozen(ctx, frozen)),)


def _place(ctx: Context, stage: str) -> pathlib.Path:
  """Where the weights of a base lie."""
  given = ctx.given.get(stage)
  if given is None:
    return ctx.directory(stage)
  return given.require_base().path if goes_on(ctx, stage) else given.path


def is_shared(ctx: Context) -> bool:
  """Whether policy and reward model have one base: by the config, or since adapters that are given have the same.

  Raises:
    UserError: such an adapter cannot be read.
  """
  policy, reward = lineage.frozen_stages(ctx.config)
  if policy == reward or not ctx.config.same_network:
    return policy == reward
  return _place(ctx, policy) == _place(ctx, reward)


def of_networks(ctx: Context, stage: str) -> tuple[tuple[Params, ...], tuple[Params, ...]]:
  """The bases of an RL stage: (the policy's, that of the reward model if it is another one), each as of `base`.

  Raises:
    UserError: the weights cannot be read.
  """
  return base(ctx, stage), () if is_shared(ctx) else base(ctx, "rm")


def first(ctx: Context, stage: str, role: RoleName, key: jax.Array) -> Params:
  """What an adapter on a base is before it is trained: the one that was given with the base, or a fresh one.

  Args:
    ctx: the run.
    stage: the stage whose weights the base is.
    role: of the network that the adapter is for; a scalar head is that of the given reward model, or fresh.
    key: for what is fresh.
  Raises:
    UserError: the weights cannot be read.
  """
  model = ctx.model(role)
  fresh = supervised.init_params(ctx.mesh, model, key)
  is_scalar = STAGES[stage].role == "reward"
  if goes_on(ctx, stage):
    found = ctx.given[stage].load_adapter(ctx.mesh, model if is_scalar else model.clone(head="lm"))
    fresh |= found
  elif is_scalar:
    fresh |= {"head": _frozen(ctx, stage)["head"]}
  return jax.device_put(fresh, adapters.trained_shardings(ctx.mesh, model)[0])


def as_policy(ctx: Context, stage: str) -> Params:
  """The parameters of a base that is judged itself, with the adapter that was given with it.

  Raises:
    UserError: the weights cannot be read.
  """
  frozen, role = _frozen(ctx, stage), STAGES[stage].require_role()
  if not goes_on(ctx, stage):
    return frozen
  model = ctx.model(role).clone(adapter=ctx.config.adapter)
  trained = ctx.given[stage].load_adapter(ctx.mesh, model)
  return adapters.joined(model, (adapters.base_of(model, frozen),), trained)


def given(ctx: Context, stage: str, is_trained: bool) -> Params:
  """The finished network that the config gives in place of a stage.

  Args:
    ctx: the run.
    stage: `sft`, `ppo_init` or `rm`.
    is_trained: whether what the next stage trains on is wanted: with adapters, the adapter on this base.
  Raises:
    UserError: the weights cannot be read.
  """
  found: Weights = ctx.given[stage]
  role = STAGES[stage].require_role()
  model = ctx.model(role)
  is_base = lineage.is_adapted(ctx.config) and stage in lineage.frozen_stages(ctx.config)
  if not is_base:  # also a network that is only judged, and so never rounded
    return found.load(ctx.mesh, model)
  trained = first(ctx, stage, role, ctx.key(stage))
  return trained if is_trained else adapters.joined(model, base(ctx, stage), trained)
