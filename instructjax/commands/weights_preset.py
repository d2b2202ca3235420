"""The preset `weights`: fills in a config whose shapes come from the files of weights that it names.

Called by config_flag while the flags are parsed, before ml_collections applies the changes of the command line, so that
these win. What follows from the networks' sizes stands in configs/weights.py. Never imports JAX: describe.py, which
reads the files, runs in a process of its own.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from instructjax.core import places
from instructjax.core.errors import UserError

NAME = "weights"
# Fields that name the files of a network, the first of them that is set giving its shape and tokenizer. Finished
# policies come first, as in stages/policies.given_weights.
_POLICY = ("ppo_init.weights", "sft.weights", "model.weights")
_REWARD = ("rm.weights", "reward_model.weights")
_ROOT = pathlib.Path(__file__).parents[2]
_DESCRIBE = "instructjax.commands.describe"


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What the preset has chosen, and why.

  Attributes:
    heading: the networks that were found.
    choices: settings and the reason for them: ({dotted name: value}, reason).
  """

  heading: tuple[str, ...]
  choices: tuple[tuple[Mapping[str, Any], str], ...]

  def lines(self, config: ConfigDict) -> list[str]:
    """The lines that a run begins with.

    Args:
      config: with the user's own changes, which are shown as such.
    """
    rows, own = [], []
    for values, reason in self.choices:
      kept = [f"{name}={value}" for name, value in values.items() if _at(config, name) == value]
      own += [name for name, value in values.items() if _at(config, name) != value]
      rows += [f"  {', '.join(kept)}: {reason}"] if kept else []
    yours = [f"  {', '.join(f'{name}={_at(config, name)}' for name in own)}: yours"] if own else []
    return [*self.heading, *rows, *yours]


def fill_in(
  config: ConfigDict, base: ConfigDict, changes: Mapping[str, str], settings: types.ModuleType
) -> Explanation:
  """Writes shapes and settings into a config.

  Args:
    config: as the config file returned it. What it has changed from `base` stays.
    base: the config that the preset starts from.
    changes: dotted name -> value as the command line spells it. They are applied later, and only looked up here.
    settings: the module configs/weights.py.
  Raises:
    UserError: no weights are named, a file cannot be read, or a change contradicts the shape in a file.
  """
  said = lambda name: changes.get(name, _at(config, name))
  paths = {
    field: places.expand(said(field), f"config.{field}", places.WEIGHTS)
    for field in (*_POLICY, *_REWARD)
    if said(field)
  }
  # A run that ends with the reward model has no policy, and may name its weights alone.
  fields = (*_POLICY, *_REWARD) if config.stage == "rm" else _POLICY
  policy = next((field for field in fields if field in paths), None)
  if policy is None:
    raise UserError(
      "preset weights takes its shapes from a file: name it with --config.model.weights=PATH (a Hugging Face folder, a"
      " .gguf file, a stage's folder or hf://ORG/NAME), or a finished policy with --config.ppo_init.weights=PATH"
    )
  found = _ask(paths, said("tokenizer.path"))
  reward = next((field for field in _REWARD if field in paths), policy)
  files = {"model": policy, "reward_model": reward}
  shapes = {block: found["weights"][field] for block, field in files.items()}
  values: dict[str, Any] = {"tokenizer.vocab_size": found["vocab_size"]}
  finished, notes = ("ppo_init.weights", "sft.weights"), []
  for field, other in (finished, finished[::-1]):
    if other in paths and not {field, "model.weights"} & set(paths):
      values[field] = paths[other]
      notes.append(
        f"  {field}={paths[other]}: no base is named to train it from, so it is {other}'s"
      )
  for block, shape in shapes.items():
    network = dict(_flat(shape["network"]))
    _require_agreement(block, network, changes, paths[files[block]])
    values |= {f"{block}.{name}": value for name, value in network.items()}
  context = min(int(changes.get(f"{b}.max_length", values[f"{b}.max_length"])) for b in shapes)
  sizes = [shape["num_params"] for shape in shapes.values()]
  choices = settings.choices(*sizes, context)
  for choice in choices:
    values |= choice.values

  def size(name: str) -> int:
    """A whole number as the run will have it: the flag's, else the config file's, else the preset's."""
    if changes.get(name, "").isdecimal():
      return int(changes[name])
    is_own = _at(config, name) != _at(base, name)
    return _at(config, name) if is_own else values.get(name, _at(config, name))

  choices = [*choices, settings.microbatches(max(sizes), size)]
  values |= choices[-1].values
  for name, value in values.items():
    if _at(config, name) == _at(base, name):
      _set(config, name, value)
  heading = [f"preset weights: {settings.size_used(sizes[0])}"]
  for block, title in (("model", "policy"), ("reward_model", "reward model and value network")):
    heading.append(f"  {title}: {_words(shapes[block])}, from {paths[files[block]]}")
  return Explanation((*heading, *notes), tuple((one.values, one.reason) for one in choices))


def _ask(paths: Mapping[str, str], tokenizer_path: str) -> dict[str, Any]:
  """What describe.py says of files of weights.

  Raises:
    UserError: one cannot be read.
  """
  path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
  done = subprocess.run(
    [sys.executable, "-m", _DESCRIBE],
    input=json.dumps({"weights": paths, "tokenizer": tokenizer_path}),
    stdout=subprocess.PIPE,  # stderr is the user's: a download shows its progress there
    text=True,
    env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
  )
  said = done.stdout.splitlines()
  if done.returncode or not said:
    raise ValueError(f"{_DESCRIBE} ended with exit code {done.returncode}")
  answer = json.loads(said[-1])  # a library may have printed before
  if "error" in answer:
    raise UserError(answer["error"])
  return answer


def _require_agreement(
  block: str, network: Mapping[str, Any], changes: Mapping[str, str], path: str
):
  """Checks the shape that the command line asks for against that of the file.

  Raises:
    UserError: they differ. A shorter context is no contradiction for rotary positions, which have no table.
  """
  for name, value in network.items():
    given = changes.get(f"{block}.{name}")
    if given is None or name == "init_std":  # nothing is initialised
      continue
    shorter = name == "max_length" and network["position"] == "rope"
    if not (_same(value, given) or (shorter and given.isdecimal() and int(given) <= value)):
      raise UserError(
        f"--config.{block}.{name}={given[:80]} contradicts {path}, which has {name}={value}; leave the flag out"
      )


def _same(value: Any, spelled: str) -> bool:
  """Whether a flag spells a value of a file."""
  if isinstance(value, bool):
    return spelled.lower() in (("true", "t", "1") if value else ("false", "f", "0"))
  if isinstance(value, str):
    return spelled == value
  try:
    return float(spelled) == value
  except ValueError:
    return False


def _words(shape: Mapping[str, Any]) -> str:
  network, num_params = shape["network"], shape["num_params"]
  unit, name = next(
    (one for one in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if num_params >= one[0]), (1, "")
  )
  return (
    f"{num_params / unit:.3g}{name} parameters, {network['num_layers']} layers of width {network['d_model']},"
    f" context {network['max_length']}"
  )


def _flat(values: Mapping[str, Any], where: str = ""):
  """Yields (dotted name, value) for all values of a nested dict."""
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{where}{name}.")
    else:
      yield where + name, value


def _at(config: ConfigDict, name: str) -> Any:
  for part in name.split("."):
    config = config[part]
  return config


def _set(config: ConfigDict, name: str, value: Any):
  *blocks, field = name.split(".")
  for block in blocks:
    config = config[block]
  config[field] = value
