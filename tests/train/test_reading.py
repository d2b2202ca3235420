"""Reading what a run wrote: a library's complaint becomes one line, and other code's warnings are left alone."""

import logging
import pathlib
import sys

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


def test_asyncio_says_nothing_of_further_failed_writes():
  log = logging.getLogger("asyncio")
  with reading.quiet_orbax(absl_logging.FATAL):
    assert not log.isEnabledFor(logging.ERROR)
  assert log.isEnabledFor(logging.ERROR)
