"""The parent of a process that runs JAX: passes signals on to it, and reports how it ended.

It never imports JAX, so it is still there when JAX aborts its child from C++, and can print what the abort means.
Called by main, before JAX is imported. The child calls `say_code` when it ends by itself.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time

# Exit codes, as in sysexits.h.
LOST = 69  # EX_UNAVAILABLE
STORAGE = 74  # EX_IOERR
PREEMPTED = 75  # EX_TEMPFAIL
WAITING = 3  # for people, who rank what the run has sampled

SILENCE = 40  # seconds without a sign of life after which a process counts as dead

# Global state, because the exit code and the signals belong to the process too.
# Write end of the pipe on which this process tells its supervisor its exit code.
_word: int | None = None
# Read end of the pipe on which the supervisor tells this process that it is to stop.
_ear: int | None = None


def supervise():
  """Forks. The child goes on as the run; this process passes signals on to it and reports how it ended.

  Call it before JAX is imported: JAX has threads, which a fork does not copy. In the parent this function never
  returns.
  """
  global _word, _ear
  sys.stdout.flush()
  sys.stderr.flush()
  word, _word = os.pipe()
  _ear, tell = os.pipe()
  # Until this process can pass a signal on, it waits: it would end this process, and the child with it.
  passed_on = (signal.SIGINT, signal.SIGTERM)
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
  child = os.fork()
  if not child:
    os.close(word)
    os.close(tell)
    os.setpgid(0, 0)  # the terminal's Ctrl-C then reaches the parent only, which passes it on once
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return
  os.close(_word)
  os.close(_ear)
  os.set_blocking(tell, False)

  def pass_on(number: int, _):
    with contextlib.suppress(OSError):  # it has come to its end meanwhile, which is reported below
      os.kill(child, number)
      if number == signal.SIGTERM:
        # JAX catches the signal in C++ and tells Python only at a safe point, which a stuck process never reaches.
        os.write(tell, bytes([number]))
        os.kill(child, signal.SIGCONT)  # a process that is stopped cannot save

  for number in passed_on:
    signal.signal(number, pass_on)
  signal.pthread_sigmask(signal.SIG_SETMASK, mask)
  code = _end_of(child)
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


def _end_of(child: int) -> int:
  """Waits for the child, and ends one that somebody has stopped (SIGSTOP): the others of the run have given it up.

  Returns:
    Its exit code, or minus the signal that killed it.
  """
  stopped_at = None
  while True:
    options = os.WUNTRACED | os.WCONTINUED | (os.WNOHANG if stopped_at else 0)
    pid, status = os.waitpid(child, options)
    if pid and os.WIFSTOPPED(status):
      stopped_at = time.monotonic()
    elif pid and os.WIFCONTINUED(status):
      stopped_at = None
    elif pid:
      return os.waitstatus_to_exitcode(status)
    if stopped_at is None:
      continue
    if time.monotonic() - stopped_at > SILENCE:
      print(
        f"error: stopped by a signal for {SILENCE} s, in which the others of this run have given it up. The same"
        " command goes on from the last checkpoint",
        file=sys.stderr,
      )
      os.kill(child, signal.SIGKILL)
      os.waitpid(child, 0)
      return LOST
    time.sleep(0.2)


def lost_message(why: str) -> str:
  """What to print if another process is gone."""
  return (
    f"another process of this run is gone ({why}): its own log says more. The same command goes on from the"
    " last checkpoint"
  )


def say_code(code: int):
  """Tells the supervisor, if there is one, with which exit code this process ends, whatever JAX does meanwhile."""
  if _word is not None:
    os.write(_word, bytes([code]))


def ear() -> int | None:
  """The file descriptor from which SIGTERM can be read once it has come; None without a supervisor."""
  return _ear


def die_with_parent():
  """Asks the kernel to kill this process if its parent is killed, since nothing would pass signals on any more.

  Works on Linux only; elsewhere it does nothing.
  """
  if sys.platform == "linux":
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
