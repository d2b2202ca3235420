"""How `ppo.rewards` spells a list of rewards, and what the entries mean.

Called by rl_training.py, which checks the spelling, by rl/experience.py, which sums the rewards, and by the RL stages,
which import and call the user's functions. Imports errors and text only. docs/rewards.md explains it to users.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from instructjax.core.errors import UserError
from instructjax.core.text import printable

Kind = Literal["rm", "ensemble", "model", "length", "format", "python"]
ENSEMBLES = ("mean", "worst", "uncertainty")

_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*\*\s*(.*)", re.DOTALL)
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_LENGTHS = re.compile(r"([0-9]{0,8})-([0-9]{0,8})")
_NO_LIMIT = 10**8  # tokens; no answer is as long
_LARGEST = 1e6  # of a weight, either way
_RESERVED = ("rm", "ensemble", "model", "length", "format", "total")  # names that no function gets
_SPELLINGS = "rm, ensemble:HOW, model:PATH, python:MODULE:FUNCTION, length:MIN-MAX or format:REGEX"
_LONGEST = 80  # letters of an entry in a message


@dataclasses.dataclass(frozen=True)
class Reward:
  """One entry of the list.

  Attributes:
    spelling: the entry without its weight, as `python:checks:is_polite`.
    kind: what computes it.
    argument: what follows the kind's colon; '' for the reward model.
    weight: its factor in the sum.
    name: what metrics and tables call it: the kind, or the function's name; numbered where several have the same.
  """

  spelling: str
  kind: Kind
  argument: str
  weight: float
  name: str

  @property
  def on_host(self) -> bool:
    """Whether it reads text, and so is computed between two programs."""
    return self.kind in ("python", "format", "model")

  @property
  def lengths(self) -> tuple[int, int]:
    """The fewest and the most tokens of an answer that a length rule does not punish."""
    low, _, high = self.argument.partition("-")
    return int(low or 0), int(high or _NO_LIMIT)


def parse(spellings: Sequence[str], where: str) -> tuple[Reward, ...]:
  """Reads a list of rewards.

  Args:
    spellings: entries, each `KIND` or `KIND:ARGUMENT` with an optional `WEIGHT*` before it.
    where: the config field, for messages.
  Raises:
    UserError: an entry is spelled wrongly or stands twice, or all weights are 0.
  """
  if not spellings:
    raise UserError(f"{where}=() must name at least one reward: {_SPELLINGS}")
  found = [_parse_one(text, f"{where}[{number}]") for number, text in enumerate(spellings)]
  counts = collections.Counter(reward.spelling for reward in found)
  twice = next((spelling for spelling in counts if counts[spelling] > 1), None)
  if twice is not None:
    raise UserError(
      f"{where} names {_shown(twice)} more than once: write it once, with the sum of its weights"
    )
  if not any(reward.weight for reward in found):
    raise UserError(
      f"{where} must give some reward a weight other than 0: a weight of 0 only logs it"
    )
  return _with_own_names(found)


def has_ensemble(rewards: Sequence[Reward]) -> bool:
  """Whether further reward models are read."""
  return any(reward.kind == "ensemble" for reward in rewards)


def on_host(rewards: Sequence[Reward]) -> tuple[Reward, ...]:
  """Those of the rewards that the host computes."""
  return tuple(reward for reward in rewards if reward.on_host)


def on_devices(spellings: Sequence[str]) -> tuple[str, ...]:
  """The list without weights and without what the host computes; the reward model where nothing is left."""
  # Without weights, since those that are left may all be 0.
  found = parse(spellings, "ppo.rewards")
  return tuple(reward.spelling for reward in found if not reward.on_host) or ("rm",)


def is_reward_model_alone(rewards: Sequence[Reward]) -> bool:
  """Whether the sum is the reward model's score itself, as in the paper."""
  return len(rewards) == 1 and rewards[0].kind == "rm" and rewards[0].weight == 1


def _parse_one(text: str, where: str) -> Reward:
  spelled = f"{where}={_shown(text)}"
  match = _WEIGHT.fullmatch(text)
  weight, spelling = (float(match[1]), match[2]) if match else (1.0, text)
  if abs(weight) > _LARGEST:
    raise UserError(f"{spelled} must have a weight of at most {_LARGEST:g} in size")
  spelling = spelling.strip()
  kind, colon, argument = spelling.partition(":")
  name: str = kind
  match kind:
    case "rm":
      if colon:
        raise UserError(f"{spelled}: 'rm' is the run's reward model, and nothing follows it")
    case "python":
      if not _FUNCTION.fullmatch(argument):
        raise UserError(
          f"{spelled} must be python:MODULE:FUNCTION, as 'python:checks:is_polite', with an optional weight before"
          " it, as '0.5*python:checks:is_polite'"
        )
      name = argument.rpartition(":")[2].rpartition(".")[2]
    case "ensemble":
      if argument not in ENSEMBLES:
        raise UserError(f"{spelled} must be ensemble: and one of {', '.join(ENSEMBLES)}")
    case "model":
      if not argument.strip() or not argument.isprintable():
        raise UserError(
          f"{spelled} must be model: and the path of a reward model, as model:runs/b/rm"
        )
    case "length":
      _require_lengths(argument, spelled)
    case "format":
      _require_regex(argument, spelled)
    case _:
      raise UserError(
        f"{spelled} must be {_SPELLINGS}, with an optional weight before it, as '0.1*length:20-200'"
      )
  return Reward(spelling, kind, argument, weight, name)


def _require_lengths(argument: str, spelled: str):
  match = _LENGTHS.fullmatch(argument)
  if not match or not (match[1] or match[2]) or int(match[1] or 0) > int(match[2] or _NO_LIMIT):
    raise UserError(
      f"{spelled} must be length:MIN-MAX in tokens, as 'length:20-200', 'length:-200' or 'length:20-'"
    )


def _require_regex(argument: str, spelled: str):
  try:
    re.compile(argument)
    reason = "" if argument else "it is empty"
  except (re.error, OverflowError, RecursionError) as error:
    reason = printable(str(error))[:_LONGEST] or type(error).__name__
  if reason:
    raise UserError(f"{spelled} must be format: and a regular expression of Python: {reason}")


def _with_own_names(found: list[Reward]) -> tuple[Reward, ...]:
  """Numbers the names that several rewards have: format, format_2."""
  taken: set[str] = set()
  result = []
  for reward in found:
    name, number = reward.name, 2
    while name in taken or (reward.kind == "python" and name in _RESERVED):
      name, number = f"{reward.name}_{number}", number + 1
    taken.add(name)
    result.append(dataclasses.replace(reward, name=name))
  return tuple(result)


def _shown(text: str) -> str:
  text = repr(text) if text.isprintable() else ascii(text)
  return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
