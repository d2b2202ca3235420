"""How commands end: what is the user's to mend is one line, what is a bug keeps its traceback."""

import pytest
from absl import flags

from instructjax import cli


def ending(monkeypatch, capsys, error):
  """(exit code, stderr) of a command that raises the error."""
  monkeypatch.setattr("sys.argv", ["command"])
  monkeypatch.setattr(cli.memory, "keep_freed_memory", lambda: True)  # not in the tests' process
  flags.FLAGS.mark_as_parsed()  # not parsed: other tests' imports may have defined required ones

  def main(argv):
    raise error

  monkeypatch.setattr(cli, "_parse", lambda argv: argv)
  with pytest.raises(SystemExit) as end:
    cli.run(main, interrupted="")
  return end.value.code, capsys.readouterr().err


def test_out_of_memory_is_one_line_that_says_what_to_change(monkeypatch, capsys):
  error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nmore lines")
  code, stderr = ending(monkeypatch, capsys, error)
  assert code == 2
  assert stderr.count("\n") == 1
  assert stderr.startswith("error: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 17")
  assert "--config.model.remat=full" in stderr


def test_other_runtime_errors_are_bugs(monkeypatch, capsys):
  with pytest.raises(RuntimeError, match="a bug"):
    ending(monkeypatch, capsys, RuntimeError("a bug"))
