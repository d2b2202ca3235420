"""Several processes as one run: finding each other, joining, and what happens when one is told to stop or dies.

Called by main (to join), by commands/cli.py (for the end of a process), and by the training loop, answers and pipeline,
which stop at points that all processes pass. JAX is imported only inside functions: joining comes before JAX is used,
and supervising before it is imported.

How one of several processes ends, with its exit code:
  - 2, a mistake, or 1, a bug: ends the process that meets it. It waits a moment for the others, which most often meet
    the same. Those that do not meet it find that this process is gone.
  - STORAGE: a disk or a bucket has failed, perhaps for a moment. Whoever starts runs may start this one again, as after
    LOST, with which the others end.
  - PREEMPTED: one process or all of them got SIGTERM. All save at the same step and wait for the slowest.
  - WAITING: people have to rank answers first. All processes find this at the same point.
  - LOST: another process is gone, or never came. On a CPU its connections break, which raises an exception here.
    Elsewhere a collective operation would wait forever. After SILENCE seconds without a sign of life JAX aborts the
    process from C++, without calling any handler in Python. So each process is the child of one that never imports JAX,
    which can still print what happened (supervisor.py).
  - LOST too: a process is stuck though alive. See watchdog.py.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from instructjax.core.errors import NotJoined, Preempted, UserError, reason
from instructjax.parallel import lobby, supervisor
from instructjax.parallel.supervisor import LOST, PREEMPTED, SILENCE
from instructjax.parallel.supervisor import STORAGE as STORAGE
from instructjax.parallel.supervisor import WAITING as WAITING
from instructjax.parallel.watchdog import Limits, Team, Watchdog

JOINING = 300  # seconds to wait for the others at the start: hosts are not ready at once
_MISTAKE = 2  # exit code after an error that the user can fix
_PARTING = 10  # seconds that a process with a mistake or a bug waits for the others to end too

_VARIABLES = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
# JAX has no exception type for a lost process. These words are in the messages of its collectives and of its
# coordination service.
_SIGNS_OF_LOSS = ("Gloo", "oordination service", "heartbeat", "Connection reset by peer")

# Global state, because signals and the exit code belong to the process too.
_told_to_stop = threading.Event()  # set by SIGTERM
_points = itertools.count(1)  # numbers of the safe points
_meetings = itertools.count(1)  # numbers of the points at which all wait for each other
_watchdog: Watchdog | None = None


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
  address: str = given["coordinator"]
  host, _, port = address.rpartition(":")
  is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16
  if not host or not is_port or not address.isprintable():
    raise UserError(
      f"--coordinator={address[:80]!r} must be HOST:PORT of process 0, with a port from 1 to 65535"
    )
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


def join(group: Group | None, *, joining: float = JOINING, silence: float = SILENCE):
  """Joins the processes of `group`, and handles SIGTERM from here on. Call it before any device is used.

  Args:
    group: from `find`; None for a single process, which has nobody to join.
    joining: seconds to wait for the others.
    silence: seconds without a sign of life after which a process counts as dead.
  Raises:
    UserError: two processes have one number, or they disagree about how many there are.
    NotJoined: process 0 cannot be reached or misses others, or JAX cannot join.
  """
  if group is None:
    _keep_sigterm()
    return
  import jax

  local_devices = None
  try:
    if group == Group():
      group, local_devices = _ask_cluster(joining)
      if group is None:  # there are TPU chips but no cluster, as in Colab: a single process
        _keep_sigterm()
        return
    address, total, process = group.coordinator, group.num_processes, group.process_id
    if address is None or total is None or process is None:
      raise ValueError(f"{group} is known in part only")
    lobby.gather(address, total, process, joining)
    jax.distributed.initialize(
      address,
      total,
      process,
      local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=int(joining),
      heartbeat_timeout_seconds=int(silence),
    )
  except UserError:
    raise
  # OSError: no metadata server, for instance.
  except (RuntimeError, ValueError, OSError, ImportError) as error:
    raise NotJoined(
      f"cannot join the other processes: {reason(error)}; --num_processes=1 runs alone"
    ) from error


def _ask_cluster(joining: float) -> tuple[Group | None, Any]:
  """The processes of this run as JAX finds them from the cluster, with the devices that it leaves to this one.

  Returns:
    (group, local device ids or None for all); the group is None where there is no cluster.
  """
  from jax._src import clusters  # not public; what `jax.distributed.initialize` itself asks

  address, total, process, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, int(joining)
  )
  return (Group(address, total, process) if address else None), devices


def _keep_sigterm():
  """Remembers SIGTERM until the next safe point. For a single process; after joining, JAX's own handler does this."""
  signal.signal(signal.SIGTERM, lambda *_: _told_to_stop.set())


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

  if _watchdog:
    _watchdog.touch()
  # After SIGTERM to one process, JAX tells the others, and they agree on the number of a coming call at which all stop.
  # So only this function may call it: another caller's numbers (Orbax's steps, say) would be mixed up with these. See
  # train/checkpoint.py.
  return _told_to_stop.is_set() or multihost_utils.reached_preemption_sync_point(next(_points))


def is_loss(error: Exception) -> bool:
  """Whether an exception means that another process is gone, judged by its message."""
  return is_joined() and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


def is_ending() -> bool:
  """Whether the watchdog has said why this process ends, and ends it: whatever goes wrong meanwhile is no news."""
  return _watchdog is not None and _watchdog.verdict is not None


def watch(limits: Limits):
  """Begins to watch whether this process makes headway. Call it once, from the main thread, after `join`."""
  global _watchdog
  ear = supervisor.ear()
  if ear is None:
    # Python's own handler runs in the main thread only. The number of a signal is written here at once, even while the
    # main thread is stuck.
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
  _watchdog = Watchdog(limits, _leave, (LOST, PREEMPTED, _MISTAKE), team(), ear)
  _watchdog.start()


def at(
  where: str, *, step: bool = False, first: bool = False, save: bool = False, within: bool = False
):
  """Says where this process stands, for the watchdog; arguments as `Watchdog.at`."""
  if _watchdog:
    _watchdog.at(where, step=step, first=first, save=save, within=within)


def progress():
  """Says that this process makes headway in work of its own, without safe points; see `Watchdog.progress`."""
  if _watchdog:
    _watchdog.progress()


def forget():
  """Tells the watchdog that another stage begins, whose steps take another time."""
  if _watchdog:
    _watchdog.forget()


def team() -> Team | None:
  """The processes of this run and the store that they share; None for a single process."""
  if not is_joined():
    return None
  from jax._src import distributed  # JAX's store has no public name

  state = distributed.global_state
  if state.client is None:
    return None
  return Team(state.client, state.process_id, state.num_processes)


def meet(name: str, *, save: bool = False):
  """Waits until all processes have come to this point. Those who are waited for are named after 10 s.

  All processes must pass the same points in order.

  Args:
    name: the point, in words.
    save: one of them is saving something, for which even a run that was told to stop has time.
  """
  from jax.experimental import multihost_utils

  there = team()
  if there is None:
    return
  folder = f"met/{next(_meetings)}"
  there.put(folder, name)
  with _watchdog.meeting(folder, name, save=save) if _watchdog else contextlib.nullcontext():
    multihost_utils.sync_global_devices(name)


def end(code: int, mistake: str = ""):
  """Ends this process with an exit code. It first waits for the other processes, where that can help.

  Args:
    code: the exit code.
    mistake: what the user has to mend. The others end with it too, unless they have met it themselves.
  """
  if is_ending():
    time.sleep(SILENCE)  # the watchdog ends the process meanwhile
  if _watchdog:
    _watchdog.stop()
  there = team()
  if there is None:
    sys.exit(code)
  # From here on JAX may abort at any time, for instance when process 0 ends first. The supervisor then uses this code.
  supervisor.say_code(code)
  if mistake:
    there.put("mistake", mistake)
    _await_readers(there)
  elif code != LOST:
    # After SIGTERM all have agreed to stop, so a missing process is only slow. After a bug the others may not come.
    seconds = SILENCE if code == PREEMPTED else _PARTING
    try:
      from orbax.checkpoint import multihost

      multihost.get_barrier_sync_fn()(key="end", timeout_ms=seconds * 1000)
    except Exception:  # the others go on, or are gone; either way this process ends
      pass
  _leave(code)


def tell_mistake(mistake: str):
  """Tells the others of a mistake that this process has met, before it ends with it.

  Whoever has told of one is not ended by another process's word of it, and may finish what is under way.
  """
  there = team()
  if there is not None:
    there.put("mistake", mistake)


def _await_readers(there: Team):
  """Waits a moment until all others know of the mistake, or have met it too."""
  deadline = time.monotonic() + _PARTING
  knowing = set()
  while len(knowing) < there.num_processes and time.monotonic() < deadline:
    time.sleep(0.1)
    knowing = there.said("mistake").keys() | there.said("read").keys()
  if there.process == 0:  # it holds the store, in which the others look
    time.sleep(1)


def _leave(code: int):
  """Ends this process at once, from any thread."""
  supervisor.say_code(code)
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit: JAX's shutdown would wait for the others again, and abort if they do not come.
  os._exit(code)
