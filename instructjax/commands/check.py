"""The flag `--check=SLICE`: whether a command would start on TPU slices that are not attached to this machine.

Called by main. launch/tpu_vm.sh asks before it requests a slice. JAX is imported only when there is something to check.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from instructjax.core.config import Config
from instructjax.core.errors import UserError
from instructjax.parallel import chips

# No stage of a run that has not begun is finished.
_NO_WORKDIR = pathlib.Path("/nonexistent")


def define() -> flags.FlagHolder:
  """Defines the flag --check. The holder's value is None without it."""
  return flags.DEFINE_string(
    "check",
    None,
    "Only say whether the command would start on a TPU slice, as v5litepod-256, 2xv5p-512 or v5e:16x16: settings,"
    " mesh, batches, memory by an estimate. It reads no data.",
  )


def check(points: Sequence[tuple[str, Config]], name: str) -> list[str]:
  """Checks runs against TPU slices, without any of their devices.

  Args:
    points: (name of the point of a sweep, or "" for a single run; its config).
    name: the slices, as for `chips.slices`.
  Returns:
    Lines that say what was checked.
  Raises:
    UserError: a run would not start.
  """
  slices = chips.slices(name)
  # A TPU or GPU of this machine stays free.
  os.environ["JAX_PLATFORMS"] = "cpu"
  from instructjax.parallel import sharding
  from instructjax.stages import pipeline

  describe = lambda asked: sharding.describe_mesh(
    asked, slices.kind, slices.num_devices, slices.num_slices
  )
  lines = []
  for point, config in points:
    where = f"point {point}: " if point else ""
    try:
      _, mesh, stages = pipeline.require_possible_on(describe, config, _NO_WORKDIR)
    except UserError as error:
      raise UserError(f"{where}{error}") from error
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines.append(
      f"{where}would start on {slices.num_devices} x {slices.kind} ({shape}): {', '.join(stages)}"
    )
  return [*lines, "not checked: data, weights, workdir"]
