"""Finished weights by name: base, SFT and PPO policies and the reward model, for later stages and evaluation."""

import dataclasses
import json

import jax

from instructjax import checkpoint, supervised
from instructjax.config import ModelConfig
from instructjax.context import Context
from instructjax.models import heads

RL_STAGES = ("ppo", "ppo_ptx", "ppo_beta0")

# Fields of ModelConfig that may differ between the run that made weights and the one that takes them.
_FREE_FIELDS = frozenset({"weights", "init_std", "dtype", "layers", "remat"})


def base_stage(ctx: Context, role: str) -> str:
  """Stage that pretrains the base of `policy` or of `reward`; one for both when the networks are the same."""
  if role == "policy" or ctx.config.model == ctx.config.reward_model:
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
    ValueError: no finished stage there, another tokenizer, or another network.
  """
  for block, stage in (("model", "pretrain"), ("reward_model", "reward_pretrain")):
    cfg: ModelConfig = getattr(ctx.config, block)
    if not cfg.weights:
      continue
    where = f"config.{block}.weights={cfg.weights!r}"
    if ctx.config.stage == stage:
      raise ValueError(f"config.stage={stage!r} trains what {where} gives; leave one of them out")
    made_with = (checkpoint.read_done(ctx.directory(stage)) or {}).get("fingerprint", {})
    if "config.model" not in made_with:
      raise ValueError(
        f"{where} must be the folder of a finished stage that trains a network, as runs/other/pretrain"
      )
    if made_with["tokenizer"] != ctx.tokenizer.fingerprint:
      raise ValueError(
        f"{where} was trained with another tokenizer; set config.tokenizer.path to that run's"
        " tokenizer/tokenizer.model"
      )
    theirs = json.loads(made_with["config.model"])
    for name, value in dataclasses.asdict(cfg).items():
      if name not in _FREE_FIELDS and theirs.get(name) != value:
        raise ValueError(
          f"{where} has {name}={theirs.get(name)}, and config.{block}.{name}={value}; they must be equal"
        )


def load_step(ctx: Context, name: str, step: int, item: str = "params"):
  """Weights of the named policy at a kept step, placed on the mesh."""
  roles = {"reward_base": "reward_base", "rm": "reward"}
  model = ctx.model(roles.get(name, "policy"))
  shardings, shapes = supervised.param_shardings(ctx.mesh, model)
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return checkpoint.load_params(ctx.directory(stage_of(ctx, name)), placed, step, item)


def load_sft_by_loss(ctx: Context):
  """SFT weights at the epoch with the best validation loss: what the reward model and its data start from."""
  return load_step(ctx, "sft", checkpoint.read_done(ctx.directory("sft"))["step"])


def load(ctx: Context, name: str):
  """Weights of `base`, `reward_base`, `sft`, `ppo_init` or an RL stage, at the step the stage chose.

  `sft` is the epoch that the reward model chose, once it has. RL policies come raw or averaged (EMA)
  as `evaluate.weights` says.
  """
  chosen = (
    "sft_select"
    if name == "sft" and checkpoint.read_done(ctx.directory("sft_select"))
    else stage_of(ctx, name)
  )
  step = checkpoint.read_done(ctx.directory(chosen))["step"]
  averaged = name in RL_STAGES and ctx.config.evaluate.weights == "ema"
  return load_step(ctx, name, step, "ema_params" if averaged else "params")


def load_reward(ctx: Context):
  """Reward-model weights with the bias that makes demonstrations score 0 on average (C.2)."""
  done = checkpoint.read_done(ctx.directory("rm"))
  return heads.shift_bias(load_step(ctx, "rm", done["step"]), done["demonstration_mean"])
