"""Several processes as one run: finding each other, joining, and what happens when one is told to stop or dies.

Called by main (to join), by commands/cli.py (for the end of a process), and by the training loop, answers and pipeline,
which stop at points that all processes pass. JAX is imported only inside functions: joining comes before JAX is used,
and supervising before it is imported.

How one of several processes ends, with its exit code:
  - 2, a mistake, or 1, a bug: ends the process that meets it. It waits a moment for the others, which most often meet
    the same. Those that do not meet it find that this process is gone.
  - PREEMPTED: one process or all of them got SIGTERM. All save at the same step and wait for the slowest.
  - LOST: another process is gone, or never came. On a CPU its connections break, which raises an exception here.
    Elsewhere a collective operation would wait forever. After SILENCE seconds without a sign of life JAX aborts the
    process from C++, without calling any handler in Python. So each process is the child of one that never imports JAX,
    which can still print what happened.
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
_PARTING = 10  # seconds that a process with a mistake or a bug waits for the others to end too

_VARIABLES = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
# Part of JAX's error message if none of its cluster detections succeeds.
_NO_CLUSTER = "coordinator_address should be defined"
# JAX has no exception type for a lost process. These words are in the messages of its collectives and of its
# coordination service.
_SIGNS_OF_LOSS = ("Gloo", "oordination service", "heartbeat", "Connection reset by peer")

# Global state, because signals and the exit code belong to the process too.
_told_to_stop = threading.Event()  # set by SIGTERM
_points = itertools.count(1)  # numbers of the safe points
# Write end of the pipe on which this process tells its supervisor its exit code.
_word: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
  """This process's place among several. All fields are None if JAX finds them from the cluster."""

  coordinator: str | None = None  # HOST:PORT of process 0
  num_processes: int | None = None
  process_id: int | None = None


def find(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  environ: Mapping[str, str] = os.environ,
) -> Group | None:
  """Finds the processes of this run: by flags, else by the environment, else by the cluster.

  It looks at files and the environment only, so on a machine that is no cluster it never waits for a network.

  Args:
    coordinator, num_processes, process_id: the flags, or None.
    environ: variables to read.
  Returns:
    The group, or None for a single process.
  Raises:
    UserError: only some of the values are given, or they make no sense.
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
  """The value of a flag, else of its variable, else None; UserError if it must be a number and is not."""
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
  """Whether `jax.distributed.initialize()` finds the processes by itself: on Slurm, Open MPI or Cloud TPU hosts.

  Raises:
    UserError: a variable that counts processes is no whole number.
  """
  # Each test follows one of JAX's own cluster detections. It must not claim a cluster on an ordinary machine: JAX would
  # then wait for others, or ask a metadata server that does not exist.
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
  if workers is not None:  # set by GKE; a single host has one name
    return "," in workers
  if "TPU_SKIP_MDS_QUERY" in environ:  # a TPU, but no Cloud TPU VM with metadata to ask
    return False
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def supervise():
  """Forks. The child goes on as the run; this process passes signals on to it and reports how it ended.

  The parent never imports JAX, so it is still there when JAX aborts the child, and can print what the abort means. Call
  it before JAX is imported: JAX has threads, which a fork does not copy. In the parent this function never returns.
  """
  global _word
  sys.stdout.flush()
  sys.stderr.flush()
  word, _word = os.pipe()
  child = os.fork()
  if not child:
    os.close(word)
    os.setpgid(0, 0)  # the terminal's Ctrl-C then reaches the parent only, which passes it on once
    die_with_parent()
    return
  os.close(_word)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(child, number))
  _, status = os.waitpid(child, 0)
  code = os.waitstatus_to_exitcode(status)
  # The child's own children may still hold the pipe's other end, so a read could wait forever.
  os.set_blocking(word, False)
  try:
    last_word = os.read(word, 1)
  except BlockingIOError:
    last_word = b""
  # If the child aborted after it wrote its exit code to the pipe, it was already ending, and the coordinator ended
  # before it. If it aborted without writing one, JAX has lost another process.
  if code == -signal.SIGABRT and last_word:
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
  """Asks the kernel to kill this process if its parent is killed, since nothing would pass signals on any more.

  Works on Linux only; elsewhere it does nothing.
  """
  if sys.platform == "linux":
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def join(group: Group | None, *, joining: float = JOINING, silence: float = SILENCE):
  """Joins the processes of `group`, and handles SIGTERM from here on. Call it before any device is used.

  Args:
    group: from `find`; None for a single process, which has nobody to join.
    joining: seconds to wait for the others.
    silence: seconds without a sign of life after which a process counts as dead.
  Raises:
    NotJoined: process 0 cannot be reached, or JAX cannot join. If process 0 misses others, JAX aborts: see `supervise`.
  """
  if group is None:
    _keep_sigterm()
    return
  if group.process_id and group.coordinator:  # process 0 starts the coordinator itself
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
  # OSError: no metadata server, for instance.
  except (RuntimeError, ValueError, OSError, ImportError) as error:
    # There are TPU chips but no cluster, as in Colab: a single process.
    if group == Group() and _NO_CLUSTER in str(error):
      _keep_sigterm()
      return
    raise NotJoined(
      f"cannot join the other processes: {reason(error)}; --num_processes=1 runs alone"
    ) from error


def _keep_sigterm():
  """Remembers SIGTERM until the next safe point. For a single process; after joining, JAX's own handler does this."""
  signal.signal(signal.SIGTERM, lambda *_: _told_to_stop.set())


def _await_coordinator(address: str, seconds: float):
  """Waits until the coordinator accepts connections. JAX itself would abort the process if it never does.

  Raises:
    NotJoined: it cannot be reached within `seconds`.
  """
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
  """A safe point: ends the run here if a process was told to stop. All processes must pass the same points in order.

  Args:
    saved: what the same command would go on from, for the message.
  Raises:
    Preempted: in all processes at the same point.
  """
  if is_told_to_stop():
    raise Preempted(f"told to stop (SIGTERM): the same command goes on from {saved}")


def is_told_to_stop() -> bool:
  """A safe point like `require_going_on`, for a caller that saves before it ends. The answer is the same everywhere."""
  from jax.experimental import multihost_utils

  # After SIGTERM to one process, JAX tells the others, and they agree on the number of a coming call at which all stop.
  # So only this function may call it: another caller's numbers (Orbax's steps, say) would be mixed up with these. See
  # train/checkpoint.py.
  return _told_to_stop.is_set() or multihost_utils.reached_preemption_sync_point(next(_points))


def is_loss(error: Exception) -> bool:
  """Whether an exception means that another process is gone, judged by its message."""
  return is_joined() and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


def lost_message(why: str) -> str:
  """What to print if another process is gone."""
  return (
    f"another process of this run is gone ({why}): its own log says more. The same command goes on from the"
    " last checkpoint"
  )


def end(code: int):
  """Ends this process with an exit code. It first waits for the other processes, where that can help."""
  if not is_joined():
    sys.exit(code)
  # From here on JAX may abort at any time, for instance when process 0 ends first. The supervisor then uses this code.
  if _word is not None:
    os.write(_word, bytes([code]))
  if code != LOST:
    # After SIGTERM all have agreed to stop, so a missing process is only slow. After a mistake the others may not come.
    seconds = SILENCE if code == PREEMPTED else _PARTING
    try:
      from orbax.checkpoint import multihost

      multihost.get_barrier_sync_fn()(key="end", timeout_ms=seconds * 1000)
    except Exception:  # the others go on, or are gone; either way this process ends
      pass
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit: JAX's shutdown would wait for the others again, and abort if they do not come.
  os._exit(code)
