"""Finished weights by name: base, SFT and PPO policies and the reward model, for later stages and evaluation."""

import dataclasses
from collections.abc import Mapping

from instructjax.core.config import Config, ModelConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import ROLES, STAGES, RoleName, selector, stage_of_policy
from instructjax.core.structs import Params
from instructjax.data import tokenizer as tokenizers
from instructjax.models import heads
from instructjax.stages import lineage
from instructjax.stages.context import Context
from instructjax.train import weights
from instructjax.train.weights import Weights


def given_weights(config: Config) -> dict[str, Weights]:
  """Stage that trains a base -> the weights that the config gives in its place, opened.

  Raises:
    UserError: nothing that can be opened lies there.
  """
  result = {}
  for stage in lineage.bases(config):
    path = lineage.given(config, stage)
    try:
      if path:
        result[stage] = weights.locate(path)
    except UserError as error:
      raise UserError(f"config.{_block(stage)}.weights: {error}") from error
  return result


def _block(stage: str) -> str:
  """The config block of the network that a stage trains."""
  return ROLES[STAGES[stage].require_role()].block


def require_given_weights(
  config: Config, opened: Mapping[str, Weights], tokenizer: tokenizers.Tokenizer
):
  """Checks that the weights named by `model.weights` and `reward_model.weights` are of this network.

  Args:
    config: of the run.
    opened: as `given_weights` returns them.
    tokenizer: of the run.
  Raises:
    UserError: they are a reward model's, of another tokenizer, or of another network.
  """
  for stage, given in opened.items():
    block = _block(stage)
    cfg: ModelConfig = getattr(config, block)
    where = f"config.{block}.weights={cfg.weights!r}"
    if config.stage == stage:
      raise UserError(f"config.stage={stage!r} trains what {where} gives; leave one of them out")
    if given.head != "lm":
      raise UserError(f"{where} must be a language model, and it has a scalar head")
    _require_tokenizer(config, given, tokenizer, where)
    _require_network(cfg, given, block, where)


def _require_tokenizer(config: Config, given: Weights, tokenizer: tokenizers.Tokenizer, where: str):
  """Weights mean nothing under another tokenizer; one that the config names is taken at its word."""
  named = config.tokenizer.path
  if given.kind == "stage" and given.settings["tokenizer"] != tokenizer.fingerprint:
    raise UserError(
      f"{where} was trained with another tokenizer; set config.tokenizer.path={str(given.tokenizer_path)!r}"
    )
  if given.kind != "stage" and not named and given.tokenizer.fingerprint != tokenizer.fingerprint:
    raise UserError(
      f"{where} has another tokenizer than the policy's weights, {tokenizer.path}; both must share one"
    )
  if given.vocab_size < tokenizer.vocab_size:
    raise UserError(
      f"{where} has embeddings of {given.vocab_size} ids, and the tokenizer {tokenizer.path} has"
      f" {tokenizer.vocab_size}; give the tokenizer that belongs to the weights"
    )


def _require_network(cfg: ModelConfig, given: Weights, block: str, where: str):
  theirs, ours = dataclasses.asdict(given.network), dataclasses.asdict(cfg.network)
  theirs["init_std"] = cfg.init_std  # nothing is initialised
  if cfg.position == "rope" and cfg.max_length <= given.network.max_length:
    theirs["max_length"] = cfg.max_length  # rotary positions have no table: a shorter context fits
  wrong = [name for name in ours if theirs[name] != ours[name]]
  if wrong:
    has = ", ".join(f"{name}={theirs[name]}" for name in wrong)
    asked = ", ".join(f"{name}={ours[name]}" for name in wrong)
    raise UserError(
      f"{where} has {has}, and config.{block} has {asked}; they must be equal: use the preset of these"
      f" weights, or set --config.{block}.{wrong[0]} and so on"
    )


def load_step(
  ctx: Context, stage: str, step: int, item: str = "params", role: RoleName | None = None
) -> Params:
  """Weights that a stage kept at a step, placed on the mesh as a network of its own role, or of another."""
  model = ctx.model(role or STAGES[stage].require_role())
  return weights.load_stage(ctx.directory(stage), ctx.mesh, model, step, item)


def load_sft_by_loss(ctx: Context) -> Params:
  """SFT weights at the epoch with the best validation loss: what the reward model and its data start from."""
  return load_step(ctx, "sft", ctx.require_done("sft").require_step())


def judges_average(ctx: Context) -> bool:
  """Whether evaluation reads RL policies' running average; at a decay of 0 that is the policy, and not kept."""
  return ctx.config.evaluate.weights == "ema" and ctx.config.ppo.ema_decay > 0


def load(ctx: Context, policy: str) -> Params:
  """Weights of a policy, or of the larger base, at the step that its stage chose.

  `sft` is the epoch that the reward model chose, once it has. RL policies come raw or averaged (EMA)
  as `evaluate.weights` says.

  Args:
    ctx: the run.
    policy: name in `core.stages.POLICIES`, but not `few_shot`.
  """
  # Where policy and reward model share a base, the stage's own role is the policy's.
  row, role = STAGES[lineage.stage_of(ctx.config, policy)], stage_of_policy(policy).require_role()
  given = ctx.given.get(row.name)
  if given:
    return given.load(ctx.mesh, ctx.model(role))
  again = selector(row.name)
  done = (ctx.done(again) if again else None) or ctx.require_done(row.name)
  averaged = row.is_rl and judges_average(ctx)
  return load_step(ctx, row.name, done.require_step(), "ema_params" if averaged else "params", role)


def load_reward(ctx: Context) -> Params:
  """Reward-model weights with the bias that makes demonstrations score 0 on average (C.2)."""
  done = ctx.require_done("rm")
  return heads.shift_bias(load_step(ctx, "rm", done.require_step()), done.result.demonstration_mean)
