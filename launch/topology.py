"""Describes TPU slices without access to one: their devices as libtpu's compiler defines them, and their chips' rates.

The memory of a chip is the limit that the compiler enforces per device. Rates are the vendor's public figures, for each
device that JAX sees. `clock` converts the compiler's estimates of cycles to seconds. It is the clock rate at which the
number of matrix units gives the public peak rate; for a product of 4096 x 4096 matrices, the compiler's estimate then
reaches 81 to 97% of the peak.

Called by plan.py and planning.py. JAX is imported inside `devices` only, after the environment is set.
"""

import dataclasses
import importlib.util
import os
import re

from instructjax.core.errors import UserError
from instructjax.parallel.chips import PEAK_FLOPS, TPU_GIB

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of device.

  Attributes:
    name: its usual name.
    hbm_bytes: memory that a program may use, without the compiler's reserve [bytes].
    flops: peak rate in bfloat16 [FLOPs per second].
    hbm_rate: bandwidth of HBM [bytes per second].
    link_rate: rate at which a ring along one axis of the torus sends, both directions together [bytes per second].
    dcn_rate: a device's share of its host's bandwidth to the data centre's network [bytes per second].
    clock: clock rate [cycles per second].
    devices: devices of a chip.
  """

  name: str
  hbm_bytes: float
  flops: float
  hbm_rate: float
  link_rate: float
  dcn_rate: float
  clock: float
  devices: int = 1


def _chip(name: str, kind: str, devices: int = 1, **rates: float) -> Chip:
  """The figures of a `jax.Device.device_kind`: those of parallel/chips.py, and the rates that only a plan needs."""
  rates |= {"hbm_bytes": TPU_GIB[kind] * GIB, "flops": PEAK_FLOPS[kind]}
  return Chip(name, devices=devices, **rates)


CHIPS = {
  "v4": _chip("TPU v4", "TPU v4", hbm_rate=1200e9, link_rate=90e9, dcn_rate=0.78e9, clock=1.05e9),
  "v5e": _chip(
    "TPU v5e", "TPU v5 lite", hbm_rate=819e9, link_rate=90e9, dcn_rate=3.125e9, clock=1.5e9
  ),
  "v5p": _chip(
    "TPU v5p", "TPU v5p", hbm_rate=2765e9, link_rate=180e9, dcn_rate=6.25e9, clock=1.75e9
  ),
  "v6e": _chip(
    "TPU v6e", "TPU v6 lite", hbm_rate=1638e9, link_rate=180e9, dcn_rate=12.5e9, clock=1.75e9
  ),
  # A chip has two devices, which share its links.
  "tpu7x": _chip(
    "TPU7x", "TPU7x", 2, hbm_rate=3690e9, link_rate=90e9, dcn_rate=6.25e9, clock=2.2e9
  ),
}
# A v4 chip is one device on Google Cloud, but libtpu's default is two.
_CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}

# These chips have SparseCores. jaxlib cannot read the text of a program in which libtpu has moved lookups to them.
_COMPILER_OPTIONS = dict.fromkeys(
  ("v5p", "v6e", "tpu7x"), {"xla_tpu_offload_gather_to_sparsecore": "false"}
)

_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<slice>(?P<chip>[a-z]\w*):\d+(x\d+)*)")
# Without these variables, libtpu looks for the metadata server of a TPU VM, prints warnings, and allows only one
# process at a time.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any valid type; the requested topology overrides it
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _parse(topology: str) -> re.Match:
  """Matches a topology's name, with the groups slices, slice and chip.

  Raises:
    UserError: the name has another form, or the chip is unknown.
  """
  match = _NAME.fullmatch(topology)
  if match is None or match["chip"] not in CHIPS or match["slices"] == "0":
    raise UserError(
      f"--topology={topology} must be CHIP:AxB or CHIP:AxBxC with CHIP one of {', '.join(CHIPS)},"
      " as v5e:16x16 or v5p:4x4x4, or several such slices, as 2xv5e:16x16"
    )
  return match


def chip(topology: str) -> Chip:
  """The figures of a topology's devices.

  Args:
    topology: [SLICESx]CHIP:AxB[xC], such as v5e:16x16.
  Raises:
    UserError: the name has another form, or the chip is unknown.
  """
  return CHIPS[_parse(topology)["chip"]]


def compiler_options(topology: str) -> dict[str, str]:
  """The options that a topology's programs are compiled with.

  Raises:
    UserError: the name has another form, or the chip is unknown.
  """
  return _COMPILER_OPTIONS.get(_parse(topology)["chip"], {})


def devices(topology: str) -> list:
  """The devices of a topology. They can be compiled for, but cannot run anything.

  It sets the environment that JAX and libtpu read, so it must be called before JAX is used.

  Raises:
    UserError: libtpu is not installed, or there is no such slice.
  """
  name = _parse(topology)
  options = _CHIP_CONFIG.get(name["chip"], {})
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "planning needs libtpu, the TPU's compiler: pip install 'instructjax[plan]', or -e '.[plan]'"
    )
  os.environ.update(_ENVIRONMENT)
  os.environ.pop("XLA_FLAGS", None)  # libtpu aborts the process if it finds a flag for CPUs
  from jax.experimental import topologies

  slices = int(name["slices"] or 1)
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name["slice"], num_slices=slices, **options
    )
    return list(found.devices)
  except Exception as error:  # libtpu raises several types, most often RuntimeError
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"--topology={topology} must be a slice that exists: {reason}") from error
