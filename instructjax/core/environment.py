"""Keeps variables of the shell from changing the numbers of a run, or from ending it.

Called by commands/cli.py before JAX and matplotlib are imported. JAX takes each of its settings from a variable: with
JAX_DEFAULT_PRNG_IMPL, JAX_ENABLE_X64 or JAX_THREEFRY_PARTITIONABLE a run would draw other numbers, or find that its own
checkpoint does not fit. Only variables that say where and how a run computes, and what JAX logs of it, are kept.
XLA_FLAGS are not JAX's and are the user's own.
"""

import os
import re
import sys
from collections.abc import MutableMapping

# Named are the variables to keep, so that a setting which a later JAX brings is not let through.
_KEPT = re.compile(
  "JAX_("
  # where: devices, platforms, and the processes of a run
  "PLATFORMS|PLATFORM_NAME|[A-Z]*_VISIBLE_DEVICES|NUM_CPU_DEVICES|FORCE_TPU_INIT|PJRT_CLIENT_CREATE_OPTIONS"
  "|COORDINATOR_[A-Z]*|NUM_PROCESSES|PROCESS_ID|LOCAL_DEVICE_IDS|PARTITION_INDEX|SLICE_INDEX"
  "|CPU_COLLECTIVES_IMPLEMENTATION|CPU_GET_[A-Z_]*_TIMEOUT_MINUTES|CROSS_HOST_[A-Z_]*"
  "|CHECK_PROXY_ENVS"
  # the cache of compiled programs
  "|ENABLE_COMPILATION_CACHE|COMPILATION_CACHE_[A-Z_]*|PERSISTENT_CACHE_[A-Z_]*"
  "|SHARE_BINARY_BETWEEN_HOSTS[A-Z_]*"
  # what is logged and shown
  "|LOG_COMPILES|LOGGING_LEVEL|DEBUG_LOG_MODULES|EXPLAIN_CACHE_MISSES|DISTRIBUTED_DEBUG"
  "|DUMP_IR_TO|DUMP_IR_MODES|INCLUDE_DEBUG_INFO_IN_DUMPS|TRACEBACK_[A-Z_]*"
  "|TRACER_ERROR_NUM_TRACEBACK_FRAMES"
  ")"
)


def fix(environ: MutableMapping[str, str] = os.environ):
  """Removes JAX's variables that could change a run's numbers, and names them in a line on stderr.

  Reports draw into files, so that matplotlib is not asked for a window. In a notebook it would be asked for one of
  Jupyter's, which another environment need not have.
  """
  environ["MPLBACKEND"] = "agg"
  ignored = sorted(
    name for name in environ if name.startswith("JAX_") and not _KEPT.fullmatch(name)
  )
  for name in ignored:
    del environ[name]
  if ignored:
    verb = "has" if len(ignored) == 1 else "have"
    print(
      f"{', '.join(ignored)} {verb} no effect: the config alone decides a run's numbers",
      file=sys.stderr,
    )
