"""A small budget of hostile command lines, and that the check of an answer can fail."""

import pytest

from instructjax.core.errors import UserError

command_lines = pytest.importorskip("tests.fuzz.command_lines")


def test_every_line_is_taken_or_refused_in_one_line():
  assert command_lines.faults(60, seed=3) == []


@pytest.mark.parametrize(
  "error, found",
  [
    (UserError("no such file"), ""),
    (UserError("x\n" * 10_000), ""),  # cut and in one line where it is printed
    (KeyError("x"), "KeyError: "),
    (SystemExit(1), "exit code 1"),
    (SystemExit(0), ""),
  ],
)
def test_anything_but_a_user_error_is_a_fault(error, found):
  def ask(_):
    raise error

  assert command_lines.fault([], ask).startswith(found) and bool(found) == bool(
    command_lines.fault([], ask)
  )
