"""Which finished runs belong together: those that differ in their seed only are a group, and seeds are error bars.

Called by compare.py, main, comparison.py and finished_runs.py. Pure functions of what the runs have written.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instructjax.core.errors import UserError
from instructjax.core.provenance import Provenance
from instructjax.core.stages import STAGES

_IN_LABEL = 3  # fields in a group's name
_IN_VALUE = 24  # letters of a value in a group's name
_NONE = "none"  # the value of a field in a run without the stages that have it
# Parts of a fingerprint that follow from others, or differ between seeds by nature.
_DERIVED = re.compile(r"config\.seed|date of chats|base:.*|.*base")


@dataclasses.dataclass(frozen=True)
class Run:
  """What a finished run has left.

  Attributes:
    name: how the page calls it: the end of its path.
    seed: its seed.
    settings: (stage, field) -> value as JSON, for all settings that decide the run's numbers; see `settings_of`.
    findings: as in findings.json.
    policies: policy -> name of a measurement -> mean, as in results.json.
    best_of_n: rows of n, kl, gold and reward, as in results.json.
    reward_std: standard deviation of the reward model's scores of held-out answers; None if it was not measured.
    curves: RL policy -> its log, one row per iteration.
    logs: stage -> its log.
    made: stage -> its provenance.
  """

  name: str
  seed: int
  settings: Mapping[tuple[str, str], str]
  findings: Sequence[Mapping[str, Any]]
  policies: Mapping[str, Mapping[str, float]]
  best_of_n: Sequence[Mapping[str, float]]
  reward_std: float | None
  curves: Mapping[str, Sequence[Mapping[str, float]]]
  logs: Mapping[str, Sequence[Mapping[str, float]]]
  made: Mapping[str, Provenance]


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in their seed only.

  Attributes:
    label: the fields in which it differs from the other groups, such as `ppo.beta=0.05`.
    values: field -> value, of all fields in which groups differ.
    runs: its runs, by growing seed.
  """

  label: str
  values: Mapping[str, str]
  runs: tuple[Run, ...]


def settings_of(fingerprints: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, str], str]:
  """The settings in the fingerprints of stages, field by field.

  Args:
    fingerprints: stage -> its fingerprint, as in done.json; that of the tokenizer too, if the run trained it.
  Returns:
    (stage, dotted field) -> JSON of its value. Of sources and given weights, what they are recognised by.
  """
  found: dict[tuple[str, str], str] = {}
  for stage, parts in fingerprints.items():
    for part, text in parts.items():
      if _DERIVED.fullmatch(part) or _is_made(part, fingerprints):
        continue
      block = part.removeprefix("config.")
      if block == "model" and STAGES[stage].role in ("reward", "reward_base"):
        block = "reward_model"
      found |= {(stage, name): value for name, value in _leaves(block, _parsed(text))}
  return found


def _is_made(part: str, fingerprints: Mapping[str, Mapping[str, str]]) -> bool:
  """Whether a part is recognised by what the run itself has made, with the seed: its tokenizer, a stage, its rankings.

  What was given in place of it is a setting.
  """
  if part.startswith("data:"):
    return part.startswith("data:collect") or (
      part.startswith("data:comparisons") and "collect" in fingerprints
    )
  return part.removeprefix("parent:") in fingerprints


def _parsed(text: str) -> Any:
  try:
    return json.loads(text)
  except ValueError:
    return text


def _leaves(name: str, value: Any) -> list[tuple[str, str]]:
  if isinstance(value, dict):
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]
  return [(name, json.dumps(value, sort_keys=True))]


def groups(runs: Sequence[Run]) -> list[Group]:
  """The runs by what they differ in besides their seed.

  A field counts as different if two runs have other values of it in the same stage. Runs with other stages differ in
  `stages`.

  Raises:
    UserError: the same seed of the same settings is there twice: two copies are no two samples.
  """
  keys = {key for run in runs for key in run.settings}
  values_of = lambda key: {run.settings[key] for run in runs if key in run.settings}
  fields: dict[str, list[tuple[str, str]]] = {}
  for key in sorted(key for key in keys if len(values_of(key)) > 1):
    fields.setdefault(key[1], []).append(key)
  rows = []
  for run in runs:
    present = lambda keys, run=run: {run.settings[key] for key in keys if key in run.settings}
    rows.append({name: _joined(present(keys)) for name, keys in fields.items()})
  stages = [", ".join(run.made) for run in runs]
  if len(set(stages)) > 1:
    everywhere = set.intersection(*(set(run.made) for run in runs))
    for run, values in zip(runs, rows, strict=True):
      more = [stage for stage in run.made if stage not in everywhere]
      values["stages besides"] = ", ".join(more) or _NONE
  found: dict[tuple, list[Run]] = {}
  for run, values in zip(runs, rows, strict=True):
    found.setdefault(tuple(values.items()), []).append(run)
  result = []
  for number, (values, members) in enumerate(sorted(found.items(), key=_order), start=1):
    by_seed = sorted(members, key=lambda run: run.seed)
    for one, other in zip(by_seed, by_seed[1:]):
      if one.seed == other.seed:
        raise UserError(
          f"{one.name} and {other.name} have the same settings and seed {one.seed}: copies of a run are no error bars;"
          " leave one out"
        )
    result.append(Group(_label(values, number), dict(values), tuple(by_seed)))
  return result


def _joined(texts: set[str]) -> str:
  """The values of a field in words; a stage may hold its own, such as gamma = 0 of PPO."""
  return "/".join(sorted(text.strip('"') for text in texts)) or _NONE


def _order(item: tuple[tuple, list[Run]]) -> list:
  """Numbers in the order of their size, other values in that of the command line."""
  key: list = []
  for _, value in item[0]:
    try:
      key.append((0, float(value)))
    except ValueError:
      key.append((1, 0.0))
  return key


def _label(values: tuple[tuple[str, str], ...], number: int) -> str:
  if not values:
    return "all runs"
  if len(values) > _IN_LABEL or any(len(value) > _IN_VALUE for _, value in values):
    return f"settings {number}"
  return ", ".join(f"{name}={value}" for name, value in values)
