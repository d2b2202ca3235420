"""Reward models that read the answers as text (`model:PATH`): of any shape, and with a tokenizer of their own.

Called by ppo.py. They are rewards of the host, whose function encodes the texts anew and scores them on the devices,
between the programs of an iteration.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from instructjax.core import places, terminal
from instructjax.core import rewards as reward_lists
from instructjax.core.config import PPOConfig
from instructjax.core.errors import UserError
from instructjax.core.rewards import Reward
from instructjax.core.structs import Params
from instructjax.data.tokenizer import Tokenizer, prompt_ids
from instructjax.models import heads
from instructjax.parallel import sharding
from instructjax.rl import scoring
from instructjax.stages import answers
from instructjax.stages.context import Context, given_fingerprint
from instructjax.stages.reward_functions import Function
from instructjax.train import weights
from instructjax.train.weights import Weights

# A row has room for so many times the tokens that the policy's tokenizer may need.
_SPELT_LONGER = 2


@dataclasses.dataclass(frozen=True)
class Found:
  """A reward of this kind, with its weights before they are loaded."""

  reward: Reward
  given: Weights


def open_all(cfg: PPOConfig) -> list[Found]:
  """Finds the reward models of the list that read text.

  Raises:
    UserError: there is nothing that can be opened at a path, or it is no reward model.
  """
  found = []
  for reward in reward_lists.parse(cfg.rewards, "config.ppo.rewards"):
    if reward.kind != "model":
      continue
    where = f"ppo.rewards: {reward.spelling}"
    try:
      given = weights.locate(places.expand(reward.argument, "its path", places.WEIGHTS))
    except UserError as error:
      raise UserError(f"{where}: {error}") from error
    if given.head != "scalar" or given.item == "value_params":
      raise UserError(
        f"{where} must be a reward model, and it is a language model: give the folder of an rm stage, as runs/b/rm, or"
        " a sequence classifier with one label"
      )
    given.require_rows()
    found.append(Found(reward, given))
  return found


def fingerprints(ctx: Context, found: Sequence[Found]) -> dict[str, str]:
  """What they are recognised by, for the fingerprint of a stage."""
  return {f"reward {one.reward.spelling}": given_fingerprint(ctx, one.given) for one in found}


def load(ctx: Context, stage: str, found: Found, cfg: PPOConfig) -> Function:
  """Loads a reward model, and makes the function that scores a batch of answers.

  Its bias is set so that the run's demonstrations score 0 on average, where it has some.

  Args:
    ctx: the run.
    stage: its name, for the line that says so.
    found: the reward model.
    cfg: the stage's settings, which say how many answers are scored at a time.
  Raises:
    UserError: the weights or the demonstrations cannot be read.
  """
  given, data = found.given, ctx.config.data
  num_rows = cfg.batch_size // cfg.score_microbatches
  model, tokenizer = given.model(ctx.mesh), given.tokenizer
  params = given.load(ctx.mesh, model)
  length = _SPELT_LONGER * (data.max_prompt_length + data.max_response_length)
  length = min(length, given.network.max_length)
  score_BL = jax.jit(
    lambda params, token_BL, is_token_BL: scoring.sequence_score(
      model, params, token_BL, is_token_BL, given.score_skips
    )
  )

  def scored(params: Params, sequences: Sequence[list[int]]) -> np.ndarray:
    parts = []
    for start in range(0, len(sequences), num_rows):
      # The last batch is filled up with repeats, so that one program does for all.
      chosen = [sequences[min(start + i, len(sequences) - 1)] for i in range(num_rows)]
      rows = answers.pad_left(chosen, length, tokenizer.pad_id)
      parts.append(sharding.to_host(score_BL(params, *sharding.place_rows(ctx.mesh, rows))))
    return np.concatenate(parts)[: len(sequences)]

  line = f"{stage}: {found.reward.spelling} reads the answers as text, in rows of {length} of its own tokens"
  if data.demonstrations:
    params = heads.shift_bias(params, _demonstration_mean(ctx, tokenizer, length, scored, params))
    line += "; demonstrations score 0 on average"
  if jax.process_index() == 0:
    terminal.say(line)

  def call(prompts, texts, *, ended):
    sequences = [encode(tokenizer, *row, length) for row in zip(prompts, texts, ended)]
    return scored(params, sequences)

  return Function(found.reward, call, asks=("ended",), everywhere=True)


def encode(tokenizer: Tokenizer, prompt: str, answer: str, ended: bool, length: int) -> list[int]:
  """Ids of a prompt and its answer, with EOS if the answer ended by itself. What is too long loses its beginning."""
  ids = prompt_ids(tokenizer, prompt) + tokenizer.encode(answer)
  return [*ids, *([tokenizer.eos_id] if ended else [])][-length:]


def _demonstration_mean(ctx: Context, tokenizer: Tokenizer, length: int, scored, params) -> float:
  decode = lambda ids: ctx.tokenizer.decode(ids).strip()
  sequences = [
    encode(tokenizer, decode(prompt), decode(response[:-1]), True, length)
    for prompt, response in ctx.data.demonstration_tokens("train")
  ]
  return float(np.mean(scored(params, sequences)))
