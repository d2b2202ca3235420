"""Loads the weights of finished stages by policy name, and checks weights that the config gives in place of these.

Called by pipeline.py and by the stages, which start from these weights or judge them.
"""

from collections.abc import Callable, Mapping

from instructjax.core.config import Config, ModelConfig, with_finished_reward_model
from instructjax.core.errors import UserError
from instructjax.core.stages import (
  REFERENCE,
  ROLES,
  STAGES,
  RoleName,
  selector,
  stage_of_policy,
)
from instructjax.core.structs import Params
from instructjax.data import tokenizer as tokenizers
from instructjax.models import adapters, heads
from instructjax.stages import bases, lineage
from instructjax.stages.context import Context, bare
from instructjax.train import weights
from instructjax.train.weights import Weights


def _locate(path: str, field: str) -> Weights:
  try:
    return weights.locate(path)
  except UserError as error:
    raise UserError(f"config.{field}: {error}") from error


def settle(config: Config) -> Config:
  """The config in which a finished reward model stands in `rm.weights`, whichever field named it.

  `reward_model.weights` may be a language model for the reward model to start from, or a finished reward model. The
  file itself tells: one that ends in a single score is finished.

  Raises:
    UserError: nothing that can be opened lies at the path.
  """
  path = config.reward_model.weights
  if not path or path == config.model.weights:
    return config
  is_finished = _locate(path, "reward_model.weights").head == "scalar"
  return with_finished_reward_model(config) if is_finished else config


def given_weights(config: Config) -> dict[str, Weights]:
  """Opens the weights that the config gives in place of trained ones: stage that would train them -> weights.

  Finished policies come first: the run has the tokenizer of the first weights.

  Raises:
    UserError: nothing that can be opened lies at a path.
  """
  stages = (REFERENCE, "sft", *lineage.bases(config), "rm")
  paths = {stage: lineage.given(config, stage) for stage in stages}
  return {stage: _locate(path, _field(stage)) for stage, path in paths.items() if path}


def _field(stage: str) -> str:
  """The dotted config field that gives weights in place of what a stage trains."""
  field = STAGES[stage].given_by
  if field is None:
    raise ValueError(f"nothing may be given in place of stage {stage}")
  return field


def _block(stage: str) -> str:
  """The config block of the network that a stage trains."""
  return ROLES[STAGES[stage].require_role()].block


def require_given_weights(
  config: Config, opened: Mapping[str, Weights], tokenizer: tokenizers.Tokenizer
):
  """Checks that the weights which the config gives fit the run.

  Args:
    config: the run's config.
    opened: as `given_weights` returns them.
    tokenizer: the run's tokenizer.
  Raises:
    UserError: the weights have another head, another tokenizer or another network, or the run is to train the very
      weights that they replace.
  """
  for stage, given in opened.items():
    block, field = _block(stage), _field(stage)
    cfg: ModelConfig = getattr(config, block)
    where = f"config.{field}={lineage.given(config, stage)!r}"
    if config.stage == stage and lineage.is_replaced(config, stage):
      raise UserError(f"config.stage={stage!r} trains what {where} gives; leave one of them out")
    wanted = ROLES[STAGES[stage].require_role()].head
    if given.head != wanted:
      one = {"lm": "a language model", "scalar": "a finished reward model, which ends in a score"}
      raise UserError(f"{where} must be {one[wanted]}, and it is {one[given.head]}")
    _require_tokenizer(config, given, tokenizer, where)
    _require_network(cfg, given, block, where)


def _require_tokenizer(config: Config, given: Weights, tokenizer: tokenizers.Tokenizer, where: str):
  """Refuses weights of another tokenizer, whose ids would mean other texts.

  Weights of a stage are compared by the hash of their tokenizer. For other files a tokenizer that the config names is
  trusted; it must only have no more ids than the weights have embeddings.
  """
  named = config.tokenizer.path
  # A reward may be read from text, and then has a tokenizer of its own: see text_scorers.py.
  as_text = f"""; as one reward among others it may have its own: --config.ppo.rewards='("rm", "model:{given.path}")'"""
  more = as_text if given.head == "scalar" else ""
  if given.kind == "stage" and given.settings["tokenizer"] != tokenizer.fingerprint:
    mend = more or f"; set config.tokenizer.path={str(given.tokenizer_path)!r}"
    raise UserError(f"{where} was trained with another tokenizer{mend}")
  if given.kind != "stage" and not named and not tokenizers.agree(tokenizer, given.tokenizer):
    raise UserError(
      f"{where} has another tokenizer than the policy's weights, {tokenizer.path}; both must share one{more}"
    )
  if given.vocab_size < tokenizer.vocab_size:
    raise UserError(
      f"{where} has embeddings of {given.vocab_size} ids, and the tokenizer {tokenizer.path} has"
      f" {tokenizer.vocab_size}; give the tokenizer that belongs to the weights"
    )


def _require_network(cfg: ModelConfig, given: Weights, block: str, where: str):
  theirs, ours = weights.differences(given.network, cfg.network)
  if theirs:
    has, asked = (", ".join(f"{n}={v}" for n, v in side.items()) for side in (theirs, ours))
    raise UserError(
      f"{where} has {has}, and config.{block} has {asked}; they must be equal: use preset weights,"
      f" which takes the shape from the file, or set --config.{block}.{next(iter(ours))} and so on"
    )


def load_step(
  ctx: Context, stage: str, step: int, item: str = "params", role: RoleName | None = None
) -> Params:
  """Loads the weights `item` that a stage saved at a step: those of `load_trained_step`, joined with their base.

  Args, raises: as for `load_trained_step`.
  """
  role = role or STAGES[stage].require_role()
  trained = load_trained_step(ctx, stage, step, item, role)
  if STAGES[stage].is_base:
    return trained
  return adapters.joined(ctx.model(role), bases.base(ctx, stage), trained)


def load_trained_step(
  ctx: Context, stage: str, step: int, item: str = "params", role: RoleName | None = None
) -> Params:
  """Loads what a stage trained, as it saved it at a step, onto the mesh: all weights, or an adapter and its head.

  Args:
    ctx: the run.
    stage: its name.
    step: step of a checkpoint.
    item: field of the saved state, as `params` or `ema_params`.
    role: the role whose network takes the weights; None for the stage's own.
  Raises:
    UserError: there are no such weights, or they cannot be read.
  """
  model = ctx.model(role or STAGES[stage].require_role())
  model = bare(model) if STAGES[stage].is_base else model
  return weights.load_stage(ctx.directory(stage), ctx.mesh, model, step, item)


def load_sft_by_loss(ctx: Context, read: Callable | None = None) -> Params:
  """Loads the SFT weights of the epoch with the best validation loss, by `load_step`, or by another `read`.

  The reward model and its comparisons start from this epoch. They cannot start from the one that `sft_select` chooses,
  because that choice takes a finished reward model.

  Raises:
    UserError: they cannot be read.
  """
  if "sft" in ctx.given:
    return bases.given(ctx, "sft", is_trained=read is not None)
  return (read or load_step)(ctx, "sft", ctx.require_done("sft").require_step())


def load(
  ctx: Context, policy: str, read: Callable | None = None, step: int | None = None
) -> Params:
  """Loads the weights of a policy at the step that its stage ends with, or at an earlier one.

  For `sft` that is the epoch which the reward model prefers (C.1), once `sft_select` has chosen it. `evaluate.weights`
  says whether RL policies are averaged (EMA) or raw.

  Args:
    ctx: the run.
    policy: a name in `core.stages.POLICIES`, except `few_shot`, which has no weights of its own.
    read: `load_trained_step` for what a stage trained, without its base; None for `load_step`.
    step: of an RL policy, a step of which there is a checkpoint; None for the last.
  Raises:
    UserError: the weights cannot be read.
  """
  # If policy and reward model share a base, `reward_base` is trained by `pretrain`, whose own role is the policy's; so
  # the role comes from the policy's name.
  row, role = STAGES[lineage.stage_of(ctx.config, policy)], stage_of_policy(policy).require_role()
  if row.is_base and lineage.is_adapted(ctx.config):
    return bases.as_policy(ctx, row.name)
  if row.name in ctx.given:
    return bases.given(ctx, row.name, is_trained=read is not None)
  again = selector(row.name)
  done = (ctx.done(again) if again else None) or ctx.require_done(row.name)
  averaged = row.is_rl and lineage.judges_average(ctx.config)
  item = "ema_params" if averaged else "params"
  step = done.require_step() if step is None else step
  return (read or load_step)(ctx, row.name, step, item, role)


def load_reward(ctx: Context, read: Callable | None = None, stage: str = "rm") -> Params:
  """Loads the reward model with the bias that makes demonstrations score 0 on average (C.2).

  Args:
    ctx: the run.
    read: `load_trained_step` for what the stage trained, without its base; None for `load_step`.
    stage: its stage, that of round 1 if a run has several.
  Raises:
    UserError: the weights cannot be read.
  """
  done = ctx.require_done(stage)
  if stage in ctx.given:
    params = bases.given(ctx, stage, is_trained=read is not None)
  else:
    params = (read or load_step)(ctx, stage, done.require_step())
  return heads.shift_bias(params, done.result.shift)
