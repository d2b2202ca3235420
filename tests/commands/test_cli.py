"""How commands end: what is the user's to mend is one line, what is a bug keeps its traceback."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags

from instructjax.commands import cli

ROOT = pathlib.Path(__file__).parents[2]
# What takes long to import, in the order in which it would be.
HEAVY = (
  "numpy", "jax", "jaxlib", "flax", "optax", "orbax", "grain", "rich", "sentencepiece", "tokenizers",
  "tensorboardX", "matplotlib",
)  # fmt: skip


@pytest.mark.parametrize(
  ("module", "arguments", "code", "says"),
  [
    ("instructjax.main", ["--help"], 0, "--workdir"),
    ("instructjax.commands.generate", ["--help"], 0, "--top_p"),
    ("instructjax.commands.export", ["--help"], 0, "--format"),
    ("launch.plan", ["--help"], 0, "--topology"),
    ("instructjax.main", ["--config=configs/ppo.py", "--workdir=w", "--wrkdir=x"], 2, "wrkdir"),
    ("instructjax.main", ["--config=configs/ppo.py", "--workdir=w", "--config.sed=1"], 2, "'sed'"),
    ("instructjax.commands.generate", ["--temprature=1"], 2, "temprature"),
    ("instructjax.commands.export", ["--format=onnx"], 2, "--format=onnx"),
    ("launch.plan", ["--config=configs/ppo.py"], 2, "--topology"),
  ],
)
def test_help_and_a_bad_flag_come_at_once(module, arguments, code, says):
  """Before anything that takes seconds to import."""
  script = (
    f"import runpy, sys; sys.argv = {[module, *arguments]!r}\n"
    f"try: runpy.run_module({module!r}, run_name='__main__')\n"
    f"finally: print('imported:', *[name for name in {HEAVY!r} if name in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == code
  *text, imported = done.stdout.splitlines()
  assert imported == "imported:"
  assert any(says in line for line in text + done.stderr.splitlines())


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
  assert "--config.execution.remat=full" in stderr


def test_other_runtime_errors_are_bugs(monkeypatch, capsys):
  with pytest.raises(RuntimeError, match="a bug"):
    ending(monkeypatch, capsys, RuntimeError("a bug"))
