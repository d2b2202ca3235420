"""Config blocks of how a run is carried out: devices, checkpoints, logs, traces, and what keeps it from harm.

`--settings` and docs/settings.md print the comments beside the fields.
"""

import dataclasses
import re
from typing import Literal

from instructjax.core.blocks import require, require_positive

TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one axis may be -1, which means all remaining devices."""

  # TPU slices of the job; slices are connected by the data centre's network only [slices]
  slice: int
  # devices that split the batch and each hold all weights; -1 is all remaining devices [devices]
  data: int
  # devices that split both the batch and the weights; -1 is all remaining devices, or, if tensor is 1, as many of them
  # as the rows of all batches divide by, and tensor takes the rest [devices]
  fsdp: int
  # devices that split each layer's matrix products; -1 is all remaining devices [devices]
  tensor: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  # steps between two checkpoints; the end of each epoch and the last step are always saved too [steps]
  every_steps: int
  keep: int  # number of newest checkpoints to keep; the best one and those at epoch ends are kept as well

  def validate(self, where: str):
    require_positive(self, where, "every_steps", "keep")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  every_steps: int  # steps between two progress lines, and between two points of a curve [steps]
  # sampled answers that RL stages show with each progress line; 0 shows none [rows]
  samples: int
  # where curves go beside metrics.jsonl: tensorboard, wandb, mlflow, several of them or none; the last two need the
  # extra of their name
  trackers: tuple[str, ...]
  # W&B's project and MLflow's experiment; '' is WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, and instructjax without them
  project: str
  run_name: str  # name of the run in W&B and MLflow; '' is the workdir's
  # whether W&B and MLflow write to the workdir only; otherwise, where they send to is their own configuration
  offline: bool

  def validate(self, where: str):
    require_positive(self, where, "every_steps")
    require(self.samples >= 0, f"{where}.samples={self.samples} must be >= 0")
    for name in self.trackers:
      require(
        name in TRACKERS,
        f"{where}.trackers={str(self.trackers)[:80]} must be some of {', '.join(TRACKERS)}",
      )
    require(
      len(set(self.trackers)) == len(self.trackers),
      f"{where}.trackers={self.trackers} must not name one twice",
    )
    for field in ("project", "run_name"):
      value = getattr(self, field)
      require(
        value.isprintable() and len(value) <= 128,
        f"{where}.{field}={ascii(value)[:80]} must be at most 128 printable characters",
      )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  # 'A:B' traces steps A to B - 1 of each stage, for a profiler and for the tables at the end of a run; '' is off
  steps: str

  def validate(self, where: str):
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.steps)
    require(
      not self.steps or (match is not None and 2 <= int(match[1]) < int(match[2])),
      f"{where}.steps={self.steps[:80]!r} must be '' or 'A:B' with 2 <= A < B, as '3:5' for steps 3 and 4:"
      " a stage's first step compiles",
    )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What keeps a run from starting that cannot fit, and ends one that is stuck."""

  # refuse does not start a run whose arrays alone, by an estimate, do not fit in the devices' memory; ignore starts it
  memory: Literal["refuse", "ignore"]
  # a process that stays at one place for so many times the median time of a step counts as stuck, and the run ends; 0
  # never ends it [times]
  stuck_factor: float
  stuck_seconds: float  # the shortest time after which a step counts as stuck [seconds]
  # time after which anything else counts as stuck: compiling, evaluation, saving, reading data [seconds]
  phase_seconds: float
  # time that a process has, once it was told to stop (SIGTERM), to come to a point where it can save; three steps if
  # these take longer [seconds]
  grace_seconds: float

  def validate(self, where: str):
    require(
      self.stuck_factor == 0 or self.stuck_factor > 1,
      f"{where}.stuck_factor={self.stuck_factor} must be 0 or > 1",
    )
    require_positive(self, where, "stuck_seconds", "phase_seconds", "grace_seconds")
