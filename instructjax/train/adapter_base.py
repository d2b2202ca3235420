"""The base of an adapter that a stage trained: what done.json says of it, and where it lies.

Called by weights.py and stages/context.py, which writes the record.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Literal

from instructjax.core.blocks import build, validate
from instructjax.core.config import AdapterConfig
from instructjax.core.errors import UserError

# Where a fingerprint has the record of the base of what a stage trains, and of an RL stage's value network. They come
# after `parent:...` in the order of names, so that a file that has changed is named by that.
BASE, VALUE_BASE = "the adapter's base", "the value adapter's base"


@dataclasses.dataclass(frozen=True)
class BaseRecord:
  """What a stage that trains an adapter says of its base, in its fingerprint and so in its done.json.

  Attributes:
    stage: the stage of the run whose weights the base is; its path is that of its folder beside the adapter's.
    kind: 'own' if the run trained it; else that of the weights which were given in its place, see `Weights.kind`.
    checksum: the identity of the run's own stage, or the fingerprint of what was given.
    inside: whether what was given is an adapter that the stage trained on, so that its base is the base.
  """

  stage: str
  kind: Literal["own", "stage", "hf", "gguf"]
  checksum: str
  inside: bool

  @classmethod
  def of(cls, made_with: Mapping[str, str], key: str, where: str) -> "BaseRecord":
    """Reads a stage's fingerprint.

    Raises:
      UserError: it says nothing of a base.
    """
    try:
      return cls(**json.loads(made_with[key]))
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(
        f"{where} does not say which base its adapter belongs to: another version of instructjax wrote it"
      ) from error


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What a stage trained in place of all weights.

  Attributes:
    cfg: its settings.
    base: where its base lies, for `locate`.
    record: what the stage says of it.
    is_named: whether `base` is what the caller named.
  """

  cfg: AdapterConfig
  base: str
  record: BaseRecord
  is_named: bool


def of_stage(
  path: pathlib.Path, made_with: Mapping[str, str], key: str, named: str, given: str
) -> Adapter | None:
  """The adapter that a stage trained, by its fingerprint; None if it trained all weights.

  Args:
    path: the stage's folder.
    made_with: its fingerprint.
    key: where that has the record of the base.
    named: where the caller says that the base lies; '' for where it was in training.
    given: the path of the weights that were given in place of the base.
  """
  if "config.adapter" not in made_with:
    return None
  where = f"{path}/done.json"
  cfg = build(AdapterConfig, json.loads(made_with["config.adapter"]), where)
  validate(cfg, where)
  record = BaseRecord.of(made_with, key, where)
  own = str(path.parent / record.stage)
  place = named or (own if record.kind == "own" else given)
  return Adapter(cfg, place, record, bool(named))
