"""Finished weights by name: base, SFT and PPO policies and the reward model, for later stages and evaluation."""

import dataclasses

from instructjax.core.config import ModelConfig
from instructjax.core.errors import UserError
from instructjax.models import heads
from instructjax.stages.context import BASE_OF, Context
from instructjax.train import finished
from instructjax.train.weights import RL_STAGES, Weights, load_stage


def base_stage(ctx: Context, role: str) -> str:
  """Stage that pretrains the base of `policy` or of `reward`; one for both when the networks are the same."""
  cfg = ctx.config
  if role == "policy" or (cfg.same_network and cfg.reward_model.weights == cfg.model.weights):
    return "pretrain"
  return "reward_pretrain"


def rl_stages(ctx: Context) -> list[str]:
  """RL stages that the config asks for, to be trained and judged: what else lies in the workdir has no say."""
  asked = {ctx.config.stage, *ctx.config.evaluate.compare}
  asked |= {"ppo_beta0"} if ctx.config.evaluate.overoptimization else set()
  return [name for name in RL_STAGES if name in asked]


def stage_of(ctx: Context, name: str) -> str:
  return {"base": "pretrain", "reward_base": base_stage(ctx, "reward")}.get(name, name)


def require_given_weights(ctx: Context):
  """Checks that the weights named by `model.weights` and `reward_model.weights` are of this network.

  Raises:
    UserError: they are a reward model's, of another tokenizer, or of another network.
  """
  for stage in dict.fromkeys(base_stage(ctx, role) for role in ("policy", "reward")):
    block = BASE_OF[stage]
    cfg: ModelConfig = getattr(ctx.config, block)
    given = ctx.given_weights(stage)
    if given is None:
      continue
    where = f"config.{block}.weights={cfg.weights!r}"
    if ctx.config.stage == stage:
      raise UserError(f"config.stage={stage!r} trains what {where} gives; leave one of them out")
    if given.head != "lm":
      raise UserError(f"{where} must be a language model, and it has a scalar head")
    _require_tokenizer(ctx, given, where)
    _require_network(cfg, given, block, where)


def _require_tokenizer(ctx: Context, given: Weights, where: str):
  """Weights mean nothing under another tokenizer; one that the config names is taken at its word."""
  tokenizer, named = ctx.tokenizer, ctx.config.tokenizer.path
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


def load_step(ctx: Context, name: str, step: int, item: str = "params"):
  """Weights of the named policy at a kept step, placed on the mesh."""
  roles = {"reward_base": "reward_base", "rm": "reward"}
  model = ctx.model(roles.get(name, "policy"))
  return load_stage(ctx.directory(stage_of(ctx, name)), ctx.mesh, model, step, item)


def load_sft_by_loss(ctx: Context):
  """SFT weights at the epoch with the best validation loss: what the reward model and its data start from."""
  return load_step(ctx, "sft", finished.read_done(ctx.directory("sft"))["step"])


def judges_average(ctx: Context) -> bool:
  """Whether evaluation reads RL policies' running average; at a decay of 0 that is the policy, and not kept."""
  return ctx.config.evaluate.weights == "ema" and ctx.config.ppo.ema_decay > 0


def load(ctx: Context, name: str):
  """Weights of `base`, `reward_base`, `sft`, `ppo_init` or an RL stage, at the step the stage chose.

  `sft` is the epoch that the reward model chose, once it has. RL policies come raw or averaged (EMA)
  as `evaluate.weights` says.
  """
  stage = stage_of(ctx, name)
  given = ctx.given_weights(stage)
  if given:
    return given.load(ctx.mesh, ctx.model("policy" if name == "base" else "reward_base"))
  chosen = (
    "sft_select" if name == "sft" and finished.read_done(ctx.directory("sft_select")) else stage
  )
  step = finished.read_done(ctx.directory(chosen))["step"]
  averaged = name in RL_STAGES and judges_average(ctx)
  return load_step(ctx, name, step, "ema_params" if averaged else "params")


def load_reward(ctx: Context):
  """Reward-model weights with the bias that makes demonstrations score 0 on average (C.2)."""
  done = finished.read_done(ctx.directory("rm"))
  return heads.shift_bias(load_step(ctx, "rm", done["step"]), done["demonstration_mean"])
