"""Peak rates and memory of accelerators, and the names of TPU slices.

Called by constraints.py, train/profiling.py, commands/check.py and launch's planner. Never imports JAX: the planner
reads it first.
"""

import dataclasses
import math
import re

from instructjax.core.errors import UserError

# `jax.Device.device_kind` -> peak FLOPs a second of one device, with dense bfloat16 inputs. If JAX shows a chip's two
# cores as two devices, a device has half of the chip's rate.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,  # v5e
  "TPU v5": 459e12,  # v5p, under the name that the compiler for topologies gives it
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,  # v6e
  "TPU7x": 1153.5e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}

# `jax.Device.device_kind` -> GiB that the TPU's compiler lets a program use. A table is used instead of asking the
# device, so that all processes decide alike, and so that the planner can ask about a slice that it does not have.
TPU_GIB = {
  "TPU v4": 30.75,
  "TPU v5 lite": 15.75,
  "TPU v5": 95.73,  # v5p, as above
  "TPU v5p": 95.73,
  "TPU v6 lite": 31.24,
  "TPU7x": 94.74,
}

# Chip -> `jax.Device.device_kind`, and devices of a chip.
_CHIPS = {
  "v4": ("TPU v4", 1),
  "v5litepod": ("TPU v5 lite", 1),
  "v5e": ("TPU v5 lite", 1),
  "v5p": ("TPU v5p", 1),
  "v6e": ("TPU v6 lite", 1),
  "tpu7x": ("TPU7x", 2),
}
# The number in an accelerator type is that of chips, but for these: that of cores, two a chip.
_COUNTED_IN_CORES = ("v4", "v5p")
_SLICES = re.compile(
  r"(?:(?P<slices>[1-9]\d{0,3})x)?(?P<chip>[a-z]\w*?)(?:-(?P<size>[1-9]\d{0,5})|:(?P<topology>[1-9]\d{0,2}(?:x[1-9]\d{0,2}){1,2}))"
)


@dataclasses.dataclass(frozen=True)
class Slices:
  """TPU slices of one shape.

  Attributes:
    kind: the `jax.Device.device_kind` of their devices.
    num_devices: devices of all slices together.
    num_slices: number of slices.
  """

  kind: str
  num_devices: int
  num_slices: int


def slices(name: str) -> Slices:
  """What a name of slices stands for.

  Args:
    name: [SLICESx]TYPE-SIZE with a Google Cloud accelerator type, as v5litepod-256 or 2xv5p-512; or
      [SLICESx]CHIP:AxB[xC] as the planner spells it, as v5e:16x16.
  Raises:
    UserError: the name has another form, or the chip is unknown.
  """
  match = _SLICES.fullmatch(name)
  if match is None or match["chip"] not in _CHIPS:
    raise UserError(
      f"{name[:80]!r} must be a TPU slice, as v5litepod-256, v5p-512 or v5e:16x16, or several, as 2xv5litepod-256;"
      f" chips are {', '.join(_CHIPS)}"
    )
  kind, devices = _CHIPS[match["chip"]]
  if match["topology"]:
    devices *= math.prod(map(int, match["topology"].split("x")))
  else:
    size = int(match["size"])
    if match["chip"] in _COUNTED_IN_CORES and size % 2:
      raise UserError(
        f"{name[:80]!r} must have an even size: {match['chip']} counts two cores a chip"
      )
    devices *= size // 2 if match["chip"] in _COUNTED_IN_CORES else size
  num_slices = int(match["slices"] or 1)
  return Slices(kind, num_slices * devices, num_slices)
