"""The user's reward functions (`python:MODULE:FUNCTION`) and the format rule: imports, calls and checks them.

Called by ppo.py and host_rewards.py. What a function gets and must return is in docs/rewards.md. Whatever is wrong with
it is an error of one line that names the reward and, where there is one, the answer at fault.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import math
import os
import pathlib
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instructjax.core import foreign
from instructjax.core.errors import UserError
from instructjax.core.foreign import explained
from instructjax.core.rewards import Reward
from instructjax.core.text import printable

ASKED = ("ended", "prompt_ids", "answer_ids", "iteration")  # what a function may take by name
_LARGEST = float(np.finfo(np.float32).max)
_EXAMPLE = 60  # letters of a prompt or answer in a message
_LONGEST = 80  # letters of a reward's spelling in a message
_SEARCH_SECONDS = 10.0  # for finding the answer at which a function raises


@dataclasses.dataclass(frozen=True)
class Episodes:
  """A batch of answers as reward functions see it. Texts are without pads, stop token and surrounding blanks.

  Attributes:
    prompts, answers: the texts.
    ended: whether the answer ended by itself, not at the length limit.
    prompt_ids, answer_ids: token ids without pads; those of an answer include the stop token.
    iteration: number of the PPO iteration, from 1; 0 in the trial before training.
  """

  prompts: list[str]
  answers: list[str]
  ended: list[bool]
  prompt_ids: list[list[int]]
  answer_ids: list[list[int]]
  iteration: int

  def only(self, row: int) -> "Episodes":
    """The batch of one row."""
    columns = {
      field.name: getattr(self, field.name)[row : row + 1]
      for field in dataclasses.fields(self)
      if field.name != "iteration"
    }
    return Episodes(**columns, iteration=self.iteration)


@dataclasses.dataclass(frozen=True)
class Function:
  """A reward that the host computes.

  Attributes:
    reward: its entry in the list.
    call: (prompts, answers, **asked) -> floats.
    asks: names among ASKED that it takes.
    files: where its source is; () for the format rule, which the config holds whole.
    checksum: of these files when they were imported; '' if there are none.
    everywhere: whether all processes call it, since it runs on the devices of all; else the first one does.
  """

  reward: Reward
  call: Callable[..., Any]
  asks: tuple[str, ...] = ()
  files: tuple[str, ...] = ()
  checksum: str = ""
  everywhere: bool = False


@functools.cache  # a module is imported once: the checksum is that of the file as it was then
def load(reward: Reward) -> Function:
  """Imports the function of a reward, or makes that of a format rule.

  Raises:
    UserError: there is no such module or function, or it cannot be called as (prompts, answers).
  """
  if reward.kind == "format":
    pattern = re.compile(reward.argument)
    match = lambda prompts, answers: [float(bool(pattern.fullmatch(text))) for text in answers]
    return Function(reward, match)
  module_name, _, name = reward.argument.partition(":")
  module = _import(module_name, reward.spelling)
  found: Any = module
  for part in name.split("."):
    if not hasattr(found, part):
      raise UserError(
        f"ppo.rewards: {reward.spelling}: {_file_of(module)} has no {shown(part)}"
        f"{_similar(found, part)}"
      )
    found = getattr(found, part)
  asks = _asks(found, reward.spelling)
  named = dict.fromkeys(filter(None, (getattr(module, "__file__", None), _source_of(found))))
  paths = [
    path for path in named if pathlib.Path(path).is_file()
  ]  # a module may come from an archive
  digest = hashlib.sha256()
  for path in paths:
    digest.update(pathlib.Path(path).read_bytes())
  return Function(reward, found, asks, tuple(paths), digest.hexdigest() if paths else "")


def _import(name: str, spelling: str) -> types.ModuleType:
  """Imports a module as `python -c` would: from the current folder, PYTHONPATH, or what is installed."""
  if "" not in sys.path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    return importlib.import_module(name)
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # SystemExit too: a script that is no module may call sys.exit
    where = "the current folder, PYTHONPATH and the installed packages were searched"
    raise UserError(
      f"ppo.rewards: {spelling}: cannot import {name}: {type(error).__name__}: {explained(error)}{_line(error)}"
      + (f"; {where}" if isinstance(error, ModuleNotFoundError) else "")
    ) from error


def _line(error: BaseException, files: Sequence[str] = ()) -> str:
  """` (FILE, line N)` of the innermost frame in one of these files, else of the innermost of all."""
  frames = [
    frame
    for frame in traceback.extract_tb(error.__traceback__)
    if not frame.filename.startswith("<frozen") and frame.filename != __file__
  ]
  frames = [frame for frame in frames if frame.filename in files] or frames
  frames = [frame for frame in frames if importlib.__file__ != frame.filename]
  return f" ({pathlib.Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _file_of(module: types.ModuleType) -> str:
  return getattr(module, "__file__", None) or f"module {module.__name__}"


def _similar(found: Any, name: str) -> str:
  close = (
    [other for other in vars(found) if other.lower() == name.lower()]
    if hasattr(found, "__dict__")
    else []
  )
  return f"; did you mean {close[0]}?" if close else ""


def _source_of(found: Any) -> str | None:
  try:
    return inspect.getsourcefile(inspect.unwrap(found))
  except TypeError:  # an object with __call__, or written in C
    return None


def _asks(found: Any, spelling: str) -> tuple[str, ...]:
  """Which of ASKED a function takes.

  Raises:
    UserError: it cannot be called with prompts and answers.
  """
  takes = f"it is called as f(prompts, answers), and may take {', '.join(ASKED)} by name"
  if not callable(found):
    raise UserError(f"ppo.rewards: {spelling} is {shown(found)} and no function; {takes}")
  if inspect.isclass(found):
    raise UserError(
      f"ppo.rewards: {spelling} is a class; name a function, or an object with __call__"
    )
  if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
    raise UserError(f"ppo.rewards: {spelling} must return its floats, not a coroutine or generator")
  try:
    parameters = inspect.signature(found).parameters.values()
  except (TypeError, ValueError):  # some functions written in C have none
    return ()
  kinds = inspect.Parameter
  if any(one.kind is kinds.VAR_KEYWORD for one in parameters):
    names = ASKED
  else:
    named = (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    names = tuple(one.name for one in parameters if one.kind in named and one.name in ASKED)
  try:
    inspect.signature(found).bind([], [], **dict.fromkeys(names))
  except TypeError as error:
    raise UserError(
      f"ppo.rewards: {spelling}{inspect.signature(found)}: {explained(error)}; {takes}"
    ) from error
  return names


def call(function: Function, episodes: Episodes) -> np.ndarray:
  """The function's value for each answer, float32.

  Raises:
    UserError: it raises an exception, or does not return a finite number for each answer.
  """
  try:
    found = _call(function, episodes)
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    row = _failing_row(function, episodes)
    where = "a batch that begins with " if row is None else ""
    what = f"{type(error).__name__}: {explained(error)}{_line(error, function.files)}"
    raise UserError(
      f"{_named(function, episodes)} raised {what} for {where}{_example(episodes, row or 0)}. {_mend(episodes)}"
    ) from error
  return _numbers(function, episodes, found)


def _call(function: Function, episodes: Episodes) -> Any:
  # Lists of its own: a function that sorts or cuts them changes nothing for the others.
  own = lambda value: [*value] if isinstance(value, list) else value
  asked = {name: own(getattr(episodes, name)) for name in function.asks}
  return function.call(own(episodes.prompts), own(episodes.answers), **asked)


def _failing_row(function: Function, episodes: Episodes) -> int | None:
  """The first answer for which the function raises an exception by itself; None if none is found in time."""
  deadline = time.monotonic() + _SEARCH_SECONDS
  for row in range(len(episodes.answers)):
    if time.monotonic() > deadline:
      return None
    try:
      _call(function, episodes.only(row))
    except KeyboardInterrupt:
      raise
    except BaseException:
      return row
  return None


def _numbers(function: Function, episodes: Episodes, found: Any) -> np.ndarray:
  who, count = _named(function, episodes), len(episodes.answers)
  shape = getattr(found, "shape", None)
  if not isinstance(found, list | tuple) and shape is None:
    raise UserError(
      f"{who} returned {shown(found)}, and must return a list or an array with a number for each answer."
      f" {_mend(episodes)}"
    )
  if shape is not None and len(shape) != 1:
    raise UserError(
      f"{who} returned an array of shape {tuple(shape)} for {count} answers. {_mend(episodes)}"
    )
  if len(found) != count:
    raise UserError(f"{who} returned {len(found)} values for {count} answers. {_mend(episodes)}")
  values = [_number(value) for value in found]
  for row, value in enumerate(values):
    if not abs(value) <= _LARGEST:  # NaN too
      raise UserError(
        f"{who} returned {shown(found[row])} for {_example(episodes, row)}, and must return a finite number."
        f" {_mend(episodes)}"
      )
  return np.array(values, np.float32)


def _number(value: Any) -> float:
  """The value as a float; NaN if it is no number."""
  if value is None or isinstance(value, str | bytes):
    return math.nan
  try:
    return float(value)
  except Exception:  # whatever an object's own __float__ raises
    return math.nan


def _named(function: Function, episodes: Episodes) -> str:
  when = f"in iteration {episodes.iteration}" if episodes.iteration else "in a trial on two rows"
  return f"ppo.rewards: {cut(function.reward.spelling)}, {when},"


def _mend(episodes: Episodes) -> str:
  goes_on = ": it goes on from the last checkpoint" if episodes.iteration else ""
  return f"Mend the function and run the same command again{goes_on}"


def _example(episodes: Episodes, row: int) -> str:
  answer, prompt = (shown(texts[row], _EXAMPLE) for texts in (episodes.answers, episodes.prompts))
  return f"the answer {answer} to the prompt {prompt}"


def cut(spelling: str) -> str:
  """A reward's spelling for a message."""
  text = printable(spelling)
  return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def shown(value: Any, limit: int = 80) -> str:
  """As `foreign.shown`, for objects of the user's too, whose repr may do anything."""
  try:
    return printable(foreign.shown(value, limit))
  except Exception:  # whatever an object's own __repr__ raises
    return f"a {type(value).__name__}"
