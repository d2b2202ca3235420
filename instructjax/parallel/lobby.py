"""The lobby: where the processes of a run gather before JAX joins them.

Process 0 listens on the coordinator's address, and the others greet it with their number. When all have come, it lets
them go, and JAX's coordination service takes over the address. JAX alone would wait in silence for a process that is
missing, and take two processes of one number, or of two runs, for one. Called by distributed.py; never imports JAX.
"""

import dataclasses
import json
import selectors
import socket
import sys
import time
from collections.abc import Collection

from instructjax.core.errors import NotJoined, UserError, reason

FIRST_REPORT, REPORT_EVERY = 10.0, 30.0  # seconds of waiting after which those missing are named
# Seconds that another program may hold the address: an earlier run may still be ending.
_STRANGER = 60.0
# Seconds that process 0 stays to tell those who come late why the run does not start.
_TURNING_AWAY = 15.0
_GREETING = 5.0  # seconds that a connection has to say who it is
_LONGEST = 1000  # bytes of a greeting or an answer


@dataclasses.dataclass
class Waiting:
  """Says when those who are waited for are to be named: after 10 s, and from then on every 30 s."""

  started: float
  reported: int = 0

  def say(self, words: str):
    """Prints who is waited for, in `words`, with the seconds so far; but only if it is time to."""
    now = time.monotonic()
    if self.is_due(now):
      print(f"{words} ({now - self.started:.0f} s)", file=sys.stderr, flush=True)

  def is_due(self, now: float) -> bool:
    """Whether they are to be named now. True once for each report."""
    due = now - self.started >= FIRST_REPORT + self.reported * REPORT_EVERY
    self.reported += due
    return due


def numbers(processes: Collection[int]) -> str:
  """Numbers of processes in words, as `process 3` or `processes 1-3, 7`."""
  runs: list[list[int]] = []
  for number in sorted(processes):
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  spelled = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
  return f"process {spelled}" if len(processes) == 1 else f"processes {spelled}"


def gather(address: str, num_processes: int, process: int, seconds: float):
  """Returns when all processes of the run have come.

  Args:
    address: HOST:PORT of process 0.
    num_processes: processes of the run.
    process: number of this one.
    seconds: how long to wait for the others.
  Raises:
    UserError: two processes have the same number, or they disagree about how many there are.
    NotJoined: another program has the port, process 0 cannot be reached, or some have not come in time.
  """
  if process == 0:
    _host(address, num_processes, seconds)
  else:
    _greet(address, num_processes, process, seconds)


def _host(address: str, num_processes: int, seconds: float):
  """Process 0: waits for the greetings of all others, and answers them at once."""
  port = int(address.rpartition(":")[2])
  try:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
  except OSError as error:
    raise NotJoined(
      f"--coordinator={address}: process 0 cannot listen on port {port} ({reason(error)}): another program has"
      " it, or another process of this run is number 0 too; choose another port"
    ) from error
  guests: dict[int, socket.socket] = {}
  with server:
    try:
      refusal = _receive(server, guests, num_processes, address, seconds)
      kind = "refused" if refusal else "come"
    except NotJoined as error:
      refusal, kind = str(error), "late"
    answer = json.dumps({kind: refusal}) + "\n"
    for guest in guests.values():
      _send(guest, answer)
    if kind == "refused":
      _turn_away(server, answer, num_processes - 1 - len(guests))
    for guest in guests.values():
      guest.close()
  if refusal:
    raise (UserError if kind == "refused" else NotJoined)(refusal)


def _turn_away(server: socket.socket, answer: str, coming: int):
  """Gives those who are still on their way, `coming` in number, the same answer, so that they do not wait in vain."""
  deadline = time.monotonic() + _TURNING_AWAY
  while coming > 0 and (left := deadline - time.monotonic()) > 0:
    server.settimeout(left)
    try:
      guest, _ = server.accept()
    except OSError:  # the time is over
      return
    with guest:
      coming -= _hello(guest) is not None
      _send(guest, answer)


def _receive(
  server: socket.socket,
  guests: dict[int, socket.socket],
  num_processes: int,
  address: str,
  seconds: float,
) -> str:
  """Fills `guests`, number -> connection, until all are there or one must be refused.

  Returns:
    Why the run cannot start, or '' if all have come.
  Raises:
    NotJoined: some have not come in time.
  """
  started = time.monotonic()
  waiting = Waiting(started)
  with selectors.DefaultSelector() as selector:
    selector.register(server, selectors.EVENT_READ)
    while missing := set(range(1, num_processes)) - guests.keys():
      now = time.monotonic()
      waiting.say(f"waiting for {numbers(missing)} of {num_processes} at {address}")
      if now - started > seconds:
        raise NotJoined(
          f"{numbers(missing)} of {num_processes} did not come to --coordinator={address} within {seconds:.0f} s:"
          " see their own logs"
        )
      for key, _ in selector.select(timeout=0.2):
        # One who waited is gone, since nobody says more than a greeting.
        if key.fileobj is not server:
          selector.unregister(key.fileobj)
          guests.pop(key.data).close()
          continue
        guest, (host, *_) = server.accept()
        hello = _hello(guest)
        if hello is None:  # a port scanner, say
          guest.close()
          continue
        number, total = hello
        refusal = _refusal(number, total, guests, num_processes, host.removeprefix("::ffff:"))
        if refusal:
          guests[-1] = guest  # to be answered like the others
          return refusal
        guests[number] = guest
        selector.register(guest, selectors.EVENT_READ, number)
  return ""


def _refusal(
  number: int, total: int, guests: Collection[int], num_processes: int, host: str
) -> str:
  """Why a run with this guest cannot start; '' if it can."""
  rule = "each process needs a number of its own, and all the same --num_processes"
  if total != num_processes:
    return f"process {number} (from {host}) has --num_processes={total}, and process 0 has {num_processes}: {rule}"
  if number in guests or not 0 < number < num_processes:
    return f"--process_id={number} was given to two processes, one of them from {host}: {rule}"
  return ""


def _hello(guest: socket.socket) -> tuple[int, int] | None:
  """Who a new connection is: (its number, how many processes it knows of); None if it is no process of a run."""
  guest.settimeout(_GREETING)
  said = _line(guest)
  if not isinstance(said, dict):
    return None
  number, total = said.get("process"), said.get("of")
  return (number, total) if type(number) is int and type(total) is int else None


def _greet(address: str, num_processes: int, process: int, seconds: float):
  """Any other process: greets process 0 and waits for its answer."""
  host, _, port = address.rpartition(":")
  started = time.monotonic()
  waiting, answered = Waiting(started), 0.0
  greeting = json.dumps({"process": process, "of": num_processes}) + "\n"
  while True:
    try:
      with socket.create_connection((host.strip("[]"), int(port)), timeout=_GREETING) as link:
        answered = answered or time.monotonic()
        _send(link, greeting)
        link.settimeout(seconds + _TURNING_AWAY)  # process 0 gives up first, and says so
        said = _line(link)
        why = "what answers there is not process 0 of a run that is starting"
    except OSError as error:
      said, why, answered = None, reason(error), 0.0
    for kind, error_type in (("refused", UserError), ("late", NotJoined)):
      if isinstance(said, dict) and kind in said:
        raise error_type(" ".join(str(said[kind]).split())[:500])
    if isinstance(said, dict) and "come" in said:
      return
    now = time.monotonic()
    waiting.say(f"process {process} waits for process 0 at {address}: {why}")
    if now - started > seconds or (answered and now - answered > _STRANGER):
      raise NotJoined(
        f"--coordinator={address} could not be reached for {now - started:.0f} s ({why}): start process 0 there,"
        " with the same --coordinator and --num_processes"
      )
    time.sleep(0.5)


def _send(link: socket.socket, line: str):
  try:
    link.sendall(line.encode())
  except OSError:  # it has left; it learns so from its own end
    pass


def _line(link: socket.socket):
  """A line of JSON from the other side; None if there comes none."""
  said = b""
  try:
    while not said.endswith(b"\n") and len(said) < _LONGEST:
      part = link.recv(_LONGEST)
      if not part:
        return None
      said += part
    return json.loads(said)
  except (OSError, ValueError, RecursionError):
    return None
