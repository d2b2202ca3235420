r"""Simulates a pod on one machine: starts a command several times, as the processes of one run on CPU devices.

  python -m launch.local_pod --processes=4 -- python -m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/pod

Every line that a process prints is prefixed with the number of the process. Ctrl-C and SIGTERM are passed on to all
processes. When one process has ended, the others have a minute to end too.

The exit code is 0 if all processes exit with 0. Otherwise it is the code of the first process that failed on its own,
rather than because another process was gone.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from absl import flags

from instructjax.commands import cli
from instructjax.core.errors import UserError
from instructjax.parallel import distributed, supervisor

_PROCESSES = flags.DEFINE_integer("processes", None, "How many.", lower_bound=1)
_DEVICES = flags.DEFINE_integer(
  "devices_per_process", 1, "Simulated devices of each; the mesh has them all.", lower_bound=1
)
flags.mark_flags_as_required(["processes"])

_GRACE = 60.0  # seconds that the other processes have to end after the first one
# Printed by JAX's CPU collectives whenever processes connect.
_NOISE = re.compile(r"^\[Gloo\] Rank ")


def environment(process: int, *, processes: int, devices: int, port: int) -> dict[str, str]:
  """The environment of one process: a copy of this one, with variables that tell `distributed.find` about the pod."""
  # The number of devices is set below. A flag from the caller's environment must not contradict it.
  chosen = re.sub(
    r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
  )
  return os.environ | {
    "XLA_FLAGS": chosen,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": str(processes),
    "JAX_PROCESS_ID": str(process),
    "PYTHONUNBUFFERED": "1",
  }


def run(command: Sequence[str], *, processes: int, devices: int, grace: float = _GRACE) -> int:
  """Starts the processes, passes on their output and the signals to them, and returns one exit code for all.

  Args:
    command: the command line of one process.
    processes: number of processes.
    devices: simulated devices per process.
    grace: seconds that the other processes have to end after the first one.
  Raises:
    UserError: the command cannot be started.
  """
  port = free_port()
  pod: list[subprocess.Popen] = []
  signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    # Before the first process is started, so that a signal in between reaches those that already run.
    for number in signals:
      signal.signal(number, lambda number, _: [one.send_signal(number) for one in pod])
    for process in range(processes):
      env = environment(process, processes=processes, devices=devices, port=port)
      pod.append(_start(command, env))
    pids = " ".join(str(one.pid) for one in pod)
    print(f"local_pod: {processes} processes of {devices} devices, pids {pids}", flush=True)
    readers = [reader for process, one in enumerate(pod) for reader in _readers(process, one)]
    codes = _wait(pod, grace)
    for reader in readers:
      reader.join()
  finally:
    for one in pod:
      _kill(one)
    for number, handler in signals.items():
      signal.signal(number, handler)
  ended = ", ".join(f"[{process}] {code}" for process, code in codes)
  print(f"local_pod: exit codes in order of ending: {ended}", flush=True)
  return exit_code([code for _, code in codes])


def free_port() -> int:
  """A port that is not in use now."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _start(command: Sequence[str], env: dict[str, str]) -> subprocess.Popen:
  """Starts one process.

  Raises:
    UserError: the command cannot be started.
  """
  try:
    return subprocess.Popen(
      command,
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      errors="replace",
      start_new_session=True,  # otherwise Ctrl-C would reach it twice: from the terminal and from here
      preexec_fn=supervisor.die_with_parent,
    )
  except OSError as error:
    raise UserError(f"cannot start {command[0]}: {error}; give the command after --") from error


def _readers(process: int, one: subprocess.Popen) -> list[threading.Thread]:
  """Starts threads that pass on a process's output, line by line."""

  def copy(source, target):
    for line in source:
      if not _NOISE.match(line):
        # In one call, so that lines of processes do not mix.
        target.write(f"[{process}] {line.rstrip()}\n")
        target.flush()

  pairs = ((one.stdout, sys.stdout), (one.stderr, sys.stderr))
  readers = [threading.Thread(target=copy, args=pair, daemon=True) for pair in pairs]
  for reader in readers:
    reader.start()
  return readers


def _wait(pod: list[subprocess.Popen], grace: float) -> list[tuple[int, int]]:
  """Waits for all processes, and kills those that still run `grace` seconds after the first one has ended.

  Returns:
    (process, exit code) in the order in which they ended. Exit codes are a shell's: 128 + N after signal N.
  """
  ended: dict[int, int] = {}
  deadline = float("inf")
  while len(ended) < len(pod):
    for process, one in enumerate(pod):
      if process in ended or (code := one.poll()) is None:
        continue
      ended[process] = code if code >= 0 else 128 - code
      deadline = min(deadline, time.monotonic() + grace)
    if time.monotonic() > deadline:
      for process, one in enumerate(pod):
        if process not in ended:
          print(
            f"local_pod: [{process}] still ran {grace:g} s after the first had ended",
            file=sys.stderr,
          )
          _kill(one)
      deadline = float("inf")
    time.sleep(0.05)
  return list(ended.items())


def _kill(one: subprocess.Popen):
  """Kills a process and all its children, which would otherwise keep the pipes open and the readers waiting."""
  if one.poll() is None:
    os.killpg(one.pid, signal.SIGKILL)


def exit_code(codes: Sequence[int]) -> int:
  """One exit code for all processes, given their codes in the order in which they ended.

  A process that ends with LOST only says that another process is gone, so the first other failure is preferred.
  """
  failed = [code for code in codes if code]
  return next((code for code in failed if code != distributed.LOST), failed[0] if failed else 0)


def main(command: list[str]):
  """Runs the command.

  Raises:
    UserError: no command is given, or it cannot be started.
  """
  if not command:
    raise UserError("no command: give it after --, as -- python -m instructjax.main --config=...")
  sys.exit(run(command, processes=_PROCESSES.value, devices=_DEVICES.value))


if __name__ == "__main__":
  cli.run(main, interrupted="interrupted")
