"""The parent of a process: how it reports that its child was stopped, killed or told to stop."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from instructjax.parallel import supervisor

ROOT = pathlib.Path(__file__).parents[2]
CHILD = """
import os, signal, sys, time
from instructjax.parallel import supervisor
supervisor.SILENCE = 1
supervisor.supervise()
how = sys.argv[1]
if how == "code":
  os._exit(7)
if how == "word":
  supervisor.say_code(75)
  os.abort()
if how == "told":
  signal.signal(signal.SIGTERM, lambda *_: None)
  print("ready", flush=True)
  os.read(supervisor.ear(), 1) == bytes([signal.SIGTERM]) and os._exit(75)
if how == "stopped, then told":
  signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
  print(os.getpid(), flush=True)
if how == "aborted":
  os.abort()
os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
"""


def wait_until_stopped(process: str) -> bool:
  """Waits until this process is stopped; False if it is not within a minute."""
  stat = pathlib.Path("/proc", process, "stat")
  for _ in range(600):
    if not stat.exists():  # no Linux: by then it is, most likely
      time.sleep(2)
      return True
    if stat.read_text().rpartition(")")[2].split()[0] == "T":
      return True
    time.sleep(0.1)
  return False


@pytest.mark.parametrize(
  "how, code, line",
  [
    ("code", 7, ""),
    ("word", 75, ""),
    ("told", 75, ""),
    ("stopped", supervisor.LOST, "error: stopped by a signal for 1 s"),
    ("stopped, then told", 75, ""),
    ("aborted", supervisor.LOST, "error: another process of this run is gone"),
    ("killed", 128 + signal.SIGKILL, "error: killed by SIGKILL"),
  ],
)
def test_how_a_process_ends(how, code, line):
  child = subprocess.Popen(
    [sys.executable, "-c", CHILD, how],
    cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  try:
    if "told" in how:
      ready = child.stdout.readline().strip()
      assert ready == "ready" or wait_until_stopped(ready)
      child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=120)
  finally:
    child.kill()
  assert child.returncode == code
  assert said.startswith(line) and len(said.splitlines()) == (1 if line else 0)


def test_a_signal_that_comes_before_it_can_be_passed_on_waits():
  early = """
import os, signal, sys, time
from instructjax.parallel import supervisor
fork = os.fork
def fork_and_be_told():
  child = fork()
  if child:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)  # until the child is ready for it
  else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
  return child
os.fork = fork_and_be_told
supervisor.supervise()
time.sleep(60)
"""
  assert subprocess.run([sys.executable, "-c", early], cwd=ROOT, timeout=120).returncode == 75


def test_a_signal_that_comes_when_the_process_has_ended_changes_nothing():
  late = """
import os, signal
from instructjax.parallel import supervisor
end_of = supervisor._end_of
def end_and_be_told(child):
  code = end_of(child)
  os.kill(os.getpid(), signal.SIGTERM)
  return code
supervisor._end_of = end_and_be_told
supervisor.supervise()
os._exit(75)
"""
  done = subprocess.run(
    [sys.executable, "-c", late], cwd=ROOT, timeout=120, capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (75, "")
