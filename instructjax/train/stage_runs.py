"""How one stage of one run is named, stored and logged, and what it may change when it is resumed.

Made by stages/context.py for each stage; read by loop.py and what the loop is made of.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from instructjax.core.blocks import ROUNDING
from instructjax.core.config import CheckpointConfig, LogConfig, ProfileConfig
from instructjax.core.provenance import changed_versions
from instructjax.train.tracking import Tracking

LIBRARIES = "libraries"  # keys of StageRun.changeable
FUNCTIONS = "reward functions"


@dataclasses.dataclass(frozen=True)
class StageRun:
  """How one stage of one run is named, stored and logged.

  Attributes:
    name: shown in the terminal.
    directory: holds checkpoints/ and metrics.jsonl, done.json once the stage is finished, and profile/ if steps are
      traced.
    checkpoint, log: how often to save and to log.
    profile: which steps to trace.
    tracking: where the numbers go beside metrics.jsonl.
    fingerprint: all settings that a resumed run must share with the checkpoint, name -> hash or config block as JSON:
      the stage's config blocks, the tokenizer, its parents, what its data hold and, for PPO, the frozen reference and
      reward model.
    files: part of the fingerprint -> the files that it stands for, which a message can name.
    changeable: what a resumed run may change, name -> value under several keys. ROUNDING["on_resume"] holds settings
      that change results by rounding only, SAME_NUMBERS["on_resume"] those that do not affect them, both of
      `core.blocks`; LIBRARIES holds the versions of libraries, and FUNCTIONS, where there are some, checksums of the
      user's reward functions. All are saved with the state, so that a resumed run can say what has changed.
    started: `time.monotonic()` when this process began the stage.
    advice: what to change when the stage is stopped because of its metrics.
  """

  name: str
  directory: pathlib.Path
  checkpoint: CheckpointConfig
  log: LogConfig
  profile: ProfileConfig
  tracking: Tracking
  fingerprint: Mapping[str, str]
  files: Mapping[str, Sequence[str]]
  changeable: Mapping[str, Mapping[str, Any]]
  started: float
  advice: str = "lower its learning rate or lengthen its warmup, in another --workdir"


def changes(run: StageRun, saved: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Lines for the terminal that name whatever has changed by which a resumed run's results may differ.

  Args:
    run: the resumed stage.
    saved: `changeable` of the run that wrote the checkpoint.
  Returns:
    One line for settings, one for reward functions and one for libraries, as far as some have changed.
  """
  kind = ROUNDING["on_resume"]
  before, now = saved[kind], run.changeable[kind]
  lines = []
  if changed := [name for name in now if now[name] != before[name]]:
    parts = ", ".join(f"{name}={now[name]} (was {before[name]})" for name in changed)
    by = "by rounding of bfloat16" if "execution.dtype" in changed else "by rounding only"
    lines.append(f"{run.name} goes on with {parts}: results may differ {by}")
  functions = run.changeable.get(FUNCTIONS, {})
  if changed := [name for name in functions if functions[name] != saved[FUNCTIONS][name]]:
    lines.append(
      f"{run.name} goes on with {', '.join(changed)} changed: rewards may differ from those before"
    )
  if versions := changed_versions(saved[LIBRARIES], run.changeable[LIBRARIES]):
    lines.append(
      f"{run.name} goes on under {versions}: results may differ from those of the old versions"
    )
  return lines
