"""Further reward models (`ppo.ensemble`), which PPO reads beside the run's own: opens, checks and stacks their weights.

Called by ppo.py. How their scores become one reward is in ops/rewards.py.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from instructjax.core import places, terminal
from instructjax.core.config import Config, PPOConfig
from instructjax.core.errors import UserError
from instructjax.core.structs import Params
from instructjax.data.tokenizer import Tokenizer
from instructjax.models import heads, transformer
from instructjax.parallel import sharding
from instructjax.stages import answers
from instructjax.stages.context import Context, bare, given_fingerprint
from instructjax.train import weights
from instructjax.train.weights import Weights


def open_all(config: Config, cfg: PPOConfig) -> list[Weights]:
  """Finds the weights of the further reward models, without loading them.

  Raises:
    UserError: there is nothing that can be opened at a path, or it is no reward model of the run's shape.
  """
  found = []
  for number, path in enumerate(cfg.ensemble):
    where = f"config.ppo.ensemble[{number}]={path!r}"
    try:
      given = weights.locate(places.expand(path, "its path", places.WEIGHTS))
    except UserError as error:
      raise UserError(f"{where}: {error}") from error
    if given.head != "scalar" or given.item == "value_params":
      raise UserError(
        f"{where} must be a reward model, and it is a language model: give the folder of an rm stage, as"
        " runs/other/rm, or a sequence classifier with one label"
      )
    _require_shape(config, given, where)
    found.append(given)
  return found


def _require_shape(config: Config, given: Weights, where: str):
  """Refuses a network of another shape: members are stacked, and read by one program."""
  theirs, ours = weights.differences(given.network, config.reward_model.network)
  if theirs:
    has, asked = (", ".join(f"{n}={v}" for n, v in side.items()) for side in (theirs, ours))
    raise UserError(
      f"{where} has {has}, and config.reward_model has {asked}: all reward models of an ensemble must have one shape"
    )


def require_tokenizer(given: Sequence[Weights], tokenizer: Tokenizer):
  """Refuses reward models of another tokenizer, whose ids would mean other texts.

  Raises:
    UserError: one has another tokenizer, or none that can be read.
  """
  for number, one in enumerate(given):
    if one.kind == "stage":
      theirs = one.settings["tokenizer"]
    else:
      theirs = one.tokenizer.fingerprint
    if theirs != tokenizer.fingerprint:
      raise UserError(
        f"config.ppo.ensemble[{number}]={str(one.path)!r} has another tokenizer than the run: all reward models of an"
        f" ensemble must share {tokenizer.path}"
      )


def fingerprints(ctx: Context, given: Sequence[Weights]) -> dict[str, str]:
  """What the further reward models are recognised by, for the fingerprint of a stage."""
  return {f"ensemble[{i}]": given_fingerprint(ctx, one) for i, one in enumerate(given)}


def load(ctx: Context, stage: str, given: Sequence[Weights]) -> Params | None:
  """The further reward models, stacked along a new first axis in the dtype that they run in; None without any.

  Each gets a bias that makes the run's demonstrations score 0 on average (C.2), as the run's own reward model has.
  Otherwise the constants that eq. 1 leaves open would count as disagreement. A run without demonstrations leaves them.

  Raises:
    UserError: weights or demonstrations cannot be read.
  """
  if not given:
    return None
  # Whole networks, also where the run trains adapters.
  model, members = bare(ctx.model("reward")), []
  tell = terminal.say if jax.process_index() == 0 else lambda line: None
  for one in given:
    params = one.load(ctx.mesh, model)
    if ctx.config.data.demonstrations:
      mean = answers.demonstration_mean(_as_reward_model(ctx, one), model, params)
      params = heads.shift_bias(params, mean)
      tell(f"{stage}: ensemble member {one.path}: demonstrations score {mean:.4g}, which becomes 0")
    else:
      tell(
        f"{stage}: ensemble member {one.path}: without demonstrations its scores keep their zero"
      )
    members.append(transformer.frozen_weights(model, params))
  shardings, _ = transformer.param_shardings(ctx.mesh, model)
  stack = jax.jit(
    lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees),
    out_shardings=sharding.stacked(shardings),
  )
  return stack(*members)


def _as_reward_model(ctx: Context, given: Weights) -> Context:
  """The run as if these weights were its reward model, whose score is read where theirs is."""
  return dataclasses.replace(ctx, given={**ctx.given, "rm": given})
