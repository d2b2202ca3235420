"""Several processes as one run: who they are, how they join, what happens when one is told to stop or is gone.

Called by main (join), cli (how a process ends), and by loop, answers and pipeline, which stop where all processes can.
Imports JAX only inside functions: joining comes before JAX is used, and supervising before it is imported.

How a process of several ends:
  - A mistake (2) or a bug (1) ends the process that meets it. It waits a moment for the others, which most often meet
    the same; those that do not are left behind and end as if it had died.
  - PREEMPTED: one process or all got SIGTERM; all saved at the same step, and wait for the slowest.
  - LOST: another process is gone, or never came. On a CPU its connections break and an exception tells. Elsewhere
    what is computed together never ends, and after SILENCE seconds without a sign of life JAX aborts the process, from
    C++, where no handler of Python's is called. So each process is the child of one that never imports JAX and can
    still say so.
"""

import ctypes
import dataclasses
import glob
import importlib.util
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from instructjax.core.errors import NotJoined, Preempted, UserError, reason

# Exit codes, as in sysexits.h.
LOST = 69  # EX_UNAVAILABLE
PREEMPTED = 75  # EX_TEMPFAIL

JOINING = 300  # seconds to wait for the others at the start: hosts are not ready at once
SILENCE = 40  # seconds without a sign of life after which a process counts as dead
_PARTING = 10  # seconds that a process which must end waits for the others to end too

_VARIABLES = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
# JAX's answer where none of its cluster detections finds one.
_NO_CLUSTER = "coordinator_address should be defined"
# What errors of a collective or of the coordination service say when another process is gone.
_SIGNS_OF_LOSS = ("Gloo", "oordination service", "heartbeat", "Connection reset by peer")

# Signals and the exit code are the process's own: so is what is known of them here.
_told_to_stop = threading.Event()
_points = itertools.count(1)
# Where this process tells the one that supervises it how it is about to end.
_word: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
  """This process's place among several; all None where JAX finds them out from the cluster."""

  coordinator: str | None = None  # HOST:PORT of process 0
  num_processes: int | None = None
  process_id: int | None = None


def find(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  environ: Mapping[str, str] = os.environ,
) -> Group | None:
  """The processes of this run by flags, else by environment, else by cluster; None for a single one.

  Looks at files and the environment only: on a machine that is no cluster nothing is asked of a network.

  Raises:
    UserError: they are given in part, or make no sense.
  """
  flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  given: dict[str, Any] = {name: _given(name, value, environ) for name, value in flags.items()}
  if all(value is None for value in given.values()):
    return Group() if _is_cluster(environ) else None
  if given["num_processes"] == 1:
    return None
  missing = [name for name, value in given.items() if value is None]
  if missing:
    spelled = ", ".join(f"--{name} (or {_VARIABLES[name]})" for name in missing)
    raise UserError(
      f"several processes need --coordinator=HOST:PORT, --num_processes and --process_id, and"
      f" {spelled} is missing; a single process needs none of them"
    )
  group = Group(**given)
  if not 0 <= given["process_id"] < given["num_processes"]:
    raise UserError(
      f"--process_id={group.process_id} must be from 0 to num_processes - 1 = {given['num_processes'] - 1}"
    )
  host, _, port = given["coordinator"].rpartition(":")
  if not host or not port.isdecimal() or int(port) >= 2**16:
    raise UserError(f"--coordinator={group.coordinator} must be HOST:PORT of process 0")
  return group


def _given(name: str, flag: str | int | None, environ: Mapping[str, str]) -> str | int | None:
  value = environ.get(_VARIABLES[name]) if flag is None else flag
  if value is None or name == "coordinator":
    return value
  return _whole(_VARIABLES[name], value)


def _whole(name: str, value: str | int) -> int:
  try:
    return int(value)
  except ValueError:
    raise UserError(f"{name}={value} must be a whole number") from None


def _count(name: str, environ: Mapping[str, str]) -> int:
  return _whole(name, environ.get(name, 1))


def _is_cluster(environ: Mapping[str, str]) -> bool:
  """Whether `jax.distributed.initialize()` finds the processes by itself: Slurm, Open MPI or Cloud TPU hosts."""
  if _count("SLURM_NTASKS", environ) > 1 and "SLURM_STEP_NODELIST" in environ:
    return True
  if _count("OMPI_COMM_WORLD_SIZE", environ) > 1:
    return True
  platforms = environ.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms:
    return False
  if _count("MEGASCALE_NUM_SLICES", environ) > 1:
    return True
  workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
  if workers is not None:  # set by GKE; on a single host to one name
    return "," in workers
  if "TPU_SKIP_MDS_QUERY" in environ:  # a TPU, but no Cloud TPU VM with metadata to ask
    return False
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def supervise():
  """Goes on in a child; this process stays, passes signals on, and says what an abort means. Before JAX is imported."""
  global _word
  sys.stdout.flush()
  sys.stderr.flush()
  word, _word = os.pipe()
  child = os.fork()
  if not child:
    os.close(word)
    os.setpgid(0, 0)  # so that Ctrl-C reaches it once, from its parent
    die_with_parent()
    return
  os.close(_word)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(child, number))
  _, status = os.waitpid(child, 0)
  code = os.waitstatus_to_exitcode(status)
  os.set_blocking(word, False)  # processes of its own may still hold the other end
  try:
    last_word = os.read(word, 1)
  except BlockingIOError:
    last_word = b""
  if code == -signal.SIGABRT and last_word:  # it was ending when the coordinator ended before it
    code = last_word[0]
  elif code == -signal.SIGABRT:
    print(f"error: {lost_message('no sign of life from it, or it never came')}", file=sys.stderr)
    code = LOST
  elif code < 0:
    print(f"error: killed by {signal.Signals(-code).name}", file=sys.stderr)
    code = 128 - code
  sys.stderr.flush()
  os._exit(code)


def die_with_parent():
  """Where the parent is killed, nobody would be left to pass signals on."""
  if sys.platform == "linux":
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def join(group: Group | None, *, joining: float = JOINING, silence: float = SILENCE):
  """Joins the processes of `group`, or sees to SIGTERM alone. Before any device is used.

  Args:
    group: from `find`.
    joining: seconds to wait for the others.
    silence: seconds without a sign of life after which a process counts as dead.
  Raises:
    NotJoined: process 0 is not there. Where others stay away, JAX aborts: see `supervise`.
  """
  if group is None:
    _keep_sigterm()
    return
  if group.process_id and group.coordinator:  # not process 0, whose own the coordinator is
    _await_coordinator(group.coordinator, joining)
  import jax

  try:
    jax.distributed.initialize(
      group.coordinator,
      group.num_processes,
      group.process_id,
      cluster_detection_method="deactivate" if group.coordinator else None,
      initialization_timeout=int(joining),
      heartbeat_timeout_seconds=int(silence),
    )
  except (
    RuntimeError,
    ValueError,
    OSError,
    ImportError,
  ) as error:  # OSError: no metadata server, say
    if group == Group() and _NO_CLUSTER in str(error):  # a TPU of its own, as in Colab
      _keep_sigterm()
      return
    raise NotJoined(
      f"cannot join the other processes: {reason(error)}; --num_processes=1 runs alone"
    ) from error


def _keep_sigterm():
  """Until the next safe point. Where processes are joined, JAX's own handler does this."""
  signal.signal(signal.SIGTERM, lambda *_: _told_to_stop.set())


def _await_coordinator(address: str, seconds: float):
  """Returns when somebody listens there: JAX itself would abort."""
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      why = reason(error)
    if time.monotonic() > deadline:
      raise NotJoined(
        f"--coordinator={address} could not be reached for {seconds:.0f} s ({why}): start process 0 there, with"
        " the same --coordinator and --num_processes"
      )
    time.sleep(0.5)


def is_joined() -> bool:
  """Whether this process is one of several."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def require_going_on(saved: str = "the last checkpoint"):
  """A safe point, which all processes pass in the same order: ends the run here if one was told to stop.

  Args:
    saved: what the same command goes on from.
  Raises:
    Preempted: in all processes at the same call.
  """
  if is_told_to_stop():
    raise Preempted(f"told to stop (SIGTERM): the same command goes on from {saved}")


def is_told_to_stop() -> bool:
  """`require_going_on` for a caller that saves first."""
  from jax.experimental import multihost_utils

  # JAX's own handler of SIGTERM tells the other processes, and they agree on the number of a call to come. Nobody else
  # may ask it, under other numbers: see `checkpoint`.
  return _told_to_stop.is_set() or multihost_utils.reached_preemption_sync_point(next(_points))


def is_loss(error: Exception) -> bool:
  """Whether an exception means that another process is gone."""
  return is_joined() and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


def lost_message(why: str) -> str:
  return (
    f"another process of this run is gone ({why}): its own log says more. The same command goes on from the"
    " last checkpoint"
  )


def end(code: int):
  """Ends this process; one of several together with the others, as far as they end too."""
  if not is_joined():
    sys.exit(code)
  if _word is not None:
    os.write(_word, bytes([code]))
  if code != LOST:
    # All have agreed to stop, and one is only slow; where one met a mistake, the others may not come.
    seconds = SILENCE if code == PREEMPTED else _PARTING
    try:
      from orbax.checkpoint import multihost

      multihost.get_barrier_sync_fn()(key="end", timeout_ms=seconds * 1000)
    except Exception:  # the others go on or are gone: this is no reason to stay
      pass
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)  # JAX would wait for the others again, and abort where they do not come
