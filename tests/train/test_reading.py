"""Reading what a run wrote: a library's complaint becomes one line, and other code's warnings are left alone."""

import logging
import pathlib
import subprocess
import sys
import types

import pytest
from absl import logging as absl_logging

from instructjax.core.errors import UserError
from instructjax.train import reading

PATH = pathlib.Path("run/sft")


def test_what_can_be_read_is_returned():
  assert reading.read(PATH, lambda: {"step": 3}, advice="") == {"step": 3}


@pytest.mark.parametrize("kind", [Exception, ValueError, KeyError])
def test_whatever_a_library_raises_becomes_one_line_with_the_path(kind):
  def damaged():
    raise kind("zarr: checksum\nof chunk 3")

  with pytest.raises(UserError, match="^cannot read run/sft: .*checksum") as error:
    reading.read(PATH, damaged, advice="Delete it.")
  assert "\n" not in str(error.value) and str(error.value).endswith(". Delete it.")
  assert error.value.__cause__ is None


def test_ctrl_c_is_no_damage():
  def interrupted():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    reading.read(PATH, interrupted, advice="")


def test_logging_and_the_hook_are_as_they_were_afterwards():
  hook, verbosity = sys.unraisablehook, absl_logging.get_verbosity()
  with pytest.raises(ZeroDivisionError), reading.quiet_orbax(absl_logging.FATAL):
    assert absl_logging.get_verbosity() == absl_logging.FATAL != verbosity
    assert not logging.getLogger("absl").isEnabledFor(logging.ERROR)
    assert sys.unraisablehook is not hook
    _ = 1 / 0
  assert (sys.unraisablehook, absl_logging.get_verbosity()) == (hook, verbosity)


@pytest.fixture
def asyncio_log():
  """asyncio's logger as a process begins with it: a failed save in an earlier test silences it for good."""
  log = logging.getLogger("asyncio")
  before = log.level
  log.setLevel(logging.WARNING)  # setting `level` would leave the answers that the logger remembers
  yield log
  log.setLevel(before)


def test_asyncio_says_nothing_of_further_failed_writes(asyncio_log):
  log = asyncio_log
  with reading.quiet_orbax(absl_logging.FATAL):
    assert not log.isEnabledFor(logging.ERROR)
  assert log.isEnabledFor(logging.ERROR)


def test_late_writes_are_silenced_once_and_nothing_else(monkeypatch, asyncio_log):
  heard = []
  monkeypatch.setattr(sys, "unraisablehook", heard.append)
  log = absl_logging.get_absl_logger()
  monkeypatch.setattr(log, "filters", [])
  reading.silence_late_writes()
  hook = sys.unraisablehook
  reading.silence_late_writes()
  assert sys.unraisablehook is hook and len(log.filters) == 1
  late, other = (
    types.SimpleNamespace(object=None, exc_value=RuntimeError(message))
    for message in ("Event loop is closed", "a bug")
  )
  hook(late)
  hook(other)
  assert heard == [other]
  for path, shown in (("/lib/orbax/checkpoint/future.py", False), ("/lib/jax/core.py", True)):
    record = log.makeRecord("absl", logging.ERROR, path, 1, "failed", (), None)
    assert bool(log.filter(record)) == shown


_FAILING = """
import pathlib, resource, sys
from absl import app
from instructjax.commands import cli
from instructjax.train import checkpoint
import jax.numpy as jnp

def main(_):
  state = {f"w{number}": jnp.arange(30000.0) * number for number in range(12)}
  with checkpoint.Checkpoints(pathlib.Path(FOLDER), keep=2) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, -1))
    for step in range(1, SAVES + 1):
      checkpoints.save(step, state, {}, {}, {}, {})

sys.argv = ["failing"]
cli.run(main, interrupted="")
"""


@pytest.mark.parametrize("size, saves", [(50, 2), (3000, 1)])
def test_a_save_that_fails_in_the_background_is_one_line(tmp_path, size, saves):
  values = f"FOLDER, SIZE, SAVES = {str(tmp_path)!r}, {size}, {saves}\n"
  done = subprocess.run(
    [sys.executable, "-c", values + _FAILING],
    cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"error: cannot write {tmp_path}/checkpoints/1: ")
  assert "File too large" in line
