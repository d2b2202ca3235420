"""TPU slices that are not here: their devices by libtpu's compiler, their chips' public figures. Called by plan.py.

Bytes of memory are what the compiler enforces a device; rates are the vendor's public figures, per device that JAX
sees. `clock` turns the compiler's cycle estimates into seconds: the rate at which the public peak follows from the
number of matrix units, of which the compiler's estimate for a product of 4096 x 4096 matrices is 81 to 97%. Imports JAX
inside `devices` only, after the environment is set.
"""

import dataclasses
import importlib.util
import os
import re

from instructjax.core.errors import UserError
from instructjax.parallel.chips import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of device.

  Attributes:
    name: as people say it.
    hbm_bytes: what a program may use; the compiler has taken its reserve off.
    flops: bfloat16 peak a second.
    hbm_rate: bytes a second.
    link_rate: bytes a second that one ring of a torus axis sends, both directions together.
    dcn_rate: bytes a second of the data centre's network, a device's share of its host's.
    clock: cycles a second.
  """

  name: str
  hbm_bytes: float
  flops: float
  hbm_rate: float
  link_rate: float
  dcn_rate: float
  clock: float


CHIPS = {
  "v4": Chip("TPU v4", 30.75 * GIB, PEAK_FLOPS["TPU v4"], 1200e9, 90e9, 0.78e9, 1.05e9),
  "v5e": Chip("TPU v5e", 15.75 * GIB, PEAK_FLOPS["TPU v5 lite"], 819e9, 90e9, 3.125e9, 1.5e9),
  "v5p": Chip("TPU v5p", 95.73 * GIB, PEAK_FLOPS["TPU v5p"], 2765e9, 180e9, 6.25e9, 1.75e9),
  "v6e": Chip("TPU v6e", 31.24 * GIB, PEAK_FLOPS["TPU v6 lite"], 1638e9, 180e9, 12.5e9, 1.75e9),
  # Two devices a chip, which share its links.
  "tpu7x": Chip("TPU7x", 94.74 * GIB, PEAK_FLOPS["TPU7x"], 3690e9, 90e9, 6.25e9, 2.2e9),
}
# A v4 chip is one device on Cloud, and two by libtpu's default.
_CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}

# jaxlib cannot read a program whose lookups libtpu has moved to the SparseCores that these chips have.
_COMPILER_OPTIONS = dict.fromkeys(
  ("v5p", "v6e", "tpu7x"), {"xla_tpu_offload_gather_to_sparsecore": "false"}
)

_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<slice>(?P<chip>[a-z]\w*):\d+(x\d+)*)")
# Without them libtpu looks for a TPU VM's metadata server, warns, and lets one process in at a time.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any valid one; what counts is the topology asked for
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _parse(topology: str) -> re.Match:
  match = _NAME.fullmatch(topology)
  if match is None or match["chip"] not in CHIPS or match["slices"] == "0":
    raise UserError(
      f"--topology={topology} must be CHIP:AxB or CHIP:AxBxC with CHIP one of {', '.join(CHIPS)},"
      " as v5e:16x16 or v5p:4x4x4, or several such slices, as 2xv5e:16x16"
    )
  return match


def chip(topology: str) -> Chip:
  """The figures of a topology's devices.

  Raises:
    UserError: the name is not [SLICESx]CHIP:AxB[xC], or of a chip whose figures are not known here.
  """
  return CHIPS[_parse(topology)["chip"]]


def compiler_options(topology: str) -> dict[str, str]:
  """What to tell the compiler besides the program."""
  return _COMPILER_OPTIONS.get(_parse(topology)["chip"], {})


def devices(topology: str) -> list:
  """The topology's devices, to compile for; none of them can run anything.

  Raises:
    UserError: libtpu is not installed.
    UserError: there is no such slice.
  """
  name = _parse(topology)
  options = _CHIP_CONFIG.get(name["chip"], {})
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "planning needs libtpu, the TPU's compiler: pip install 'instructjax[plan]', or -e '.[plan]'"
    )
  os.environ.update(_ENVIRONMENT)
  os.environ.pop("XLA_FLAGS", None)  # libtpu aborts the process at a flag that only the CPU has
  from jax.experimental import topologies

  slices = int(name["slices"] or 1)
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name["slice"], num_slices=slices, **options
    )
    return list(found.devices)
  except Exception as error:  # libtpu's own kinds, RuntimeErrors most often
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"--topology={topology} must be a slice that exists: {reason}") from error
