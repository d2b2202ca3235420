"""`python -m instructjax`: the table of commands, the version, and what is no command."""

import importlib.util
import pathlib

import pytest

import instructjax
from instructjax import __main__ as table


def test_every_command_of_the_table_is_a_module_that_runs():
  for module, says in table.COMMANDS.values():
    source = pathlib.Path(importlib.util.find_spec(module).origin).read_text()
    assert "cli.run(main, interrupted=" in source and says


@pytest.mark.parametrize(
  ("arguments", "code", "stream", "says"),
  [
    (["--version"], 0, "out", f"instructjax {instructjax.__version__}\n"),
    ([], 2, "out", "usage: instructjax COMMAND"),
    (["exprot"], 2, "err", "error: exprot is not a command of instructjax; did you mean export?\n"),
    (
      ["x"],
      2,
      "err",
      "error: x is not a command of instructjax; there are run, generate, evaluate, ",
    ),
  ],
)
def test_what_is_no_command(capsys, arguments, code, stream, says):
  with pytest.raises(SystemExit) as end:
    table.main(arguments)
  assert end.value.code == code
  assert says in getattr(capsys.readouterr(), stream)
