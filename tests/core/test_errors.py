"""What counts as a failed write: by what an error says, not by its type."""

import errno
import os
import pathlib

import pytest

from instructjax.core import errors
from instructjax.core.errors import UserError

PATH = pathlib.Path("runs/demo")


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError("it needs 5 MiB and the disk has 1 MiB left"),
    # As tensorstore 0.1.8 says it.
    ValueError(
      'RESOURCE_EXHAUSTED: Error writing "/a/b": [OS error 28: ENOSPC No space left on device]'
      " [source locations='tensorstore/internal/os/file_util_posix.cc:395']"
    ),
    RuntimeError("write failed: Disk quota exceeded"),
    Exception("I/O error: File too large (os error 27)"),
  ],
)
def test_what_the_file_system_refuses_names_the_path(error):
  with pytest.raises(UserError, match="cannot write runs/demo: .*make room if") as told:
    with errors.writing(PATH):
      raise error
  assert told.value.__cause__ is error


def test_an_error_that_a_library_wraps_is_found():
  def save():
    try:
      raise PermissionError(errno.EACCES, "Permission denied")
    except PermissionError as error:
      raise RuntimeError("the save failed") from error

  with pytest.raises(UserError, match="cannot write runs/demo: the save failed"):
    with errors.writing(PATH):
      save()


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("INTERNAL: a compiler's fault"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes"),
    ValueError("a bug"),
    UserError("another rule"),
    KeyError("w"),
  ],
)
def test_other_errors_pass_through(error):
  with pytest.raises(type(error)) as raised:
    with errors.writing(PATH):
      raise error
  assert raised.value is error


@pytest.mark.parametrize("shorten", [errors.reason, errors.one_line])
def test_an_error_without_a_message_is_told_by_its_type(shorten):
  assert shorten(KeyError()) == "KeyError"
  assert shorten(ValueError("\n ")) == "ValueError"


def test_one_line_is_the_whole_message():
  assert errors.one_line(ValueError(" size must\n  be odd\n")) == "size must be odd"


def test_a_librarys_message_holds_no_control_characters():
  assert errors.reason(ValueError("bad type \x1b[31m\x07 in \u00e9")) == (
    r"bad type \x1b[31m\x07 in é"
  )


def test_the_details_behind_a_librarys_words_are_left_out():
  told = 'Error writing "/a/b": [OS error 27: EFBIG File too large]'
  details = f" [source locations='a.cc:395'] [tensorstore_spec='{'x' * 900}']"
  assert errors.reason(ValueError(told + details)) == told
  assert errors.reason(ValueError(f"{told} [os_error_code='27']")) == told


def _caused(cause):
  error = errors.UserError("cannot write x")
  error.__cause__ = cause
  return error


@pytest.mark.parametrize(
  ("error", "passes"),
  [
    (OSError(errno.EIO, "Input/output error"), True),
    (_caused(OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/mnt/b/x")), True),
    (_caused(ValueError("Error writing [OS error 116: ESTALE Stale file handle]")), True),
    (_caused(type("HttpError", (Exception,), {"code": 503})()), True),
    (_caused(type("ClientError", (Exception,), {"status": 429})()), True),
    (_caused(type("HttpError", (Exception,), {"code": 403})()), False),
    (OSError(errno.ENOSPC, "No space left on device"), False),
    (_caused(PermissionError(errno.EACCES, "Permission denied")), False),
    (errors.UserError("config.ppo.beta=-1 must be >= 0"), False),
  ],
)
def test_what_may_pass_by_itself(error, passes):
  assert errors.may_pass(error) is passes
