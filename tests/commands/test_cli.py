"""How commands end: what is the user's to mend is one line, what is a bug keeps its traceback."""

import logging
import pathlib
import subprocess
import sys
import traceback
import types

import ml_collections
import pytest
from absl import flags

import instructjax
from instructjax.commands import cli
from instructjax.core.errors import UserError, Waiting

ROOT = pathlib.Path(__file__).parents[2]
# What takes long to import, in the order in which it would be.
HEAVY = (
  "numpy", "jax", "jaxlib", "flax", "optax", "orbax", "grain", "rich", "sentencepiece", "tokenizers",
  "tensorboardX", "matplotlib",
)  # fmt: skip


@pytest.mark.parametrize(
  ("module", "arguments", "code", "says"),
  [
    ("instructjax", ["--help"], 0, "usage: instructjax COMMAND"),
    ("instructjax", ["rnu"], 2, "did you mean run?"),
    ("instructjax", ["run", "--help"], 0, "--workdir"),
    ("instructjax", ["generate", "--help"], 0, "--top_p"),
    ("instructjax", ["export", "--help"], 0, "--format"),
    ("instructjax", ["plan", "--help"], 0, "--topology"),
    ("instructjax", ["plan", "--help"], 0, "--config:"),
    ("instructjax.main", ["--help"], 0, "--config:"),
    ("instructjax.main", ["--help"], 0, "settings:"),
    ("instructjax.main", ["--help"], 0, "--workdir"),
    ("launch.plan", ["--help"], 0, "--topology"),
    ("instructjax", ["run", "--config=ppo", "--workdir=w", "--wrkdir=x"], 2, "wrkdir"),
    ("instructjax.main", ["--config=configs/ppo.py", "--workdir=w", "--wrkdir=x"], 2, "wrkdir"),
    ("instructjax.main", ["--config=ppo", "--workdir=w", "--config.sed=1"], 2, "field sed"),
    ("instructjax", ["generate", "--temprature=1"], 2, "temprature"),
    ("instructjax", ["export", "--format=onnx"], 2, "--format=onnx"),
    ("instructjax", ["plan", "--config=ppo"], 2, "--topology"),
  ],
)
def test_help_and_a_bad_flag_come_at_once(module, arguments, code, says):
  """Before anything that takes seconds to import, and before another command's module."""
  script = (
    f"import runpy, sys; sys.argv = {[module, *arguments]!r}\n"
    f"try: runpy.run_module({module!r}, run_name='__main__')\n"
    f"finally: print('imported:', *[name for name in {HEAVY!r} if name in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == code, done.stderr
  *text, imported = done.stdout.splitlines()
  assert imported == "imported:"
  assert any(says in line for line in text + done.stderr.splitlines())


def ending(monkeypatch, capsys, error):
  """(exit code, stderr) of a command that raises the error; None for one that ends well."""
  monkeypatch.setattr("sys.argv", ["command"])
  monkeypatch.setattr(cli.memory, "keep_freed_memory", lambda: True)  # not in the tests' process
  flags.FLAGS.mark_as_parsed()  # not parsed: other tests' imports may have defined required ones

  def main(argv):
    if error:
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


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("a bug"),
    ValueError("a bug"),
    KeyError("a bug"),
    OSError("a bug without a file"),
    AssertionError(),
  ],
)
def test_whatever_else_is_raised_is_a_bug_and_keeps_its_traceback(monkeypatch, capsys, error):
  code, stderr = ending(monkeypatch, capsys, error)
  assert code == 1
  first, second, *_, last = stderr.splitlines()
  assert first.startswith(
    f"This is a fault of instructjax {instructjax.__version__}, not a mistake"
  )
  assert "please report it with the traceback" in first
  assert second == "Traceback (most recent call last):"
  assert last == traceback.format_exception_only(error)[-1].strip()


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (UserError("beta=0 must be\n  positive"), "beta=0 must be positive"),
    (
      FileNotFoundError(2, "No such file or directory", "a.json"),
      "[Errno 2] No such file or directory: 'a.json'",
    ),
    (
      RuntimeError("Unable to initialize backend 'cuda': no GPU\nmore"),
      "JAX has no device to run on: Unable to initialize backend 'cuda': no GPU; see JAX_PLATFORMS and the driver",
    ),
  ],
)
def test_what_can_be_mended_is_one_line(monkeypatch, capsys, error, line):
  assert ending(monkeypatch, capsys, error) == (2, f"error: {line}\n")


def test_a_fault_of_storage_that_may_pass_has_a_code_that_is_started_again(monkeypatch, capsys):
  error = UserError("cannot write a")
  error.__cause__ = OSError(107, "Transport endpoint is not connected")
  assert ending(monkeypatch, capsys, error) == (74, "error: cannot write a\n")
  error = OSError(116, "Stale file handle", "a")
  assert ending(monkeypatch, capsys, error)[0] == 74


def test_a_run_that_waits_for_people_has_a_code_of_its_own(monkeypatch, capsys):
  assert ending(monkeypatch, capsys, Waiting("rank 3 items")) == (3, "rank 3 items\n")


def test_out_of_the_hosts_memory_is_out_of_memory(monkeypatch, capsys):
  code, stderr = ending(monkeypatch, capsys, MemoryError("Unable to allocate 9 TiB"))
  assert (code, stderr.count("\n")) == (2, 1)
  assert stderr.startswith("error: out of memory: Unable to allocate 9 TiB. Use smaller")


@pytest.mark.parametrize(("error", "words"), [(None, [0]), (UserError("a mistake"), [])])
def test_the_supervisor_hears_that_all_is_done_before_jax_shuts_down(
  monkeypatch, capsys, error, words
):
  said = []
  monkeypatch.setattr(cli.supervisor, "say_code", said.append)
  ending(monkeypatch, capsys, error)
  assert said == words


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("a bug"), UserError("a mistake")])
def test_what_our_own_flag_parser_raises_is_what_it_is(monkeypatch, error):
  def fail(argument):
    raise error

  # Made a function of the package, where the error then comes from.
  fail = types.FunctionType(fail.__code__, vars(cli), closure=fail.__closure__)
  values = flags.FlagValues()
  flags.DEFINE_string("config", None, "", flag_values=values)
  monkeypatch.setattr(values["config"].parser, "parse", fail)
  monkeypatch.setattr(cli.flags, "FLAGS", values)
  with pytest.raises(type(error)) as raised:
    cli._parse(["command", "--config=ppo"])
  assert raised.value is error


def test_a_value_that_the_config_cannot_hold_is_a_mistake(monkeypatch):
  values = flags.FlagValues()
  flags.DEFINE_string("field", None, "", flag_values=values)
  config = ml_collections.ConfigDict({"size": 1})
  monkeypatch.setattr(values["field"], "parse", lambda value: setattr(config, "size", value))
  monkeypatch.setattr(cli.flags, "FLAGS", values)
  with pytest.raises(UserError, match="--config cannot be changed so: .*size"):
    cli._parse(["command", "--field=x"])


def test_a_warning_is_a_sentence():
  record = logging.LogRecord(
    "a", logging.WARNING, "/x/a.py", 7, "%s: 3 of 9\x1b[2J", ("rows",), None
  )
  assert cli._Sentence().format(record) == r"warning: rows: 3 of 9\x1b[2J"
  try:
    raise ValueError("why")
  except ValueError:
    record.exc_info = sys.exc_info()
  first, *rest = cli._Sentence().format(record).splitlines()
  assert first.startswith("warning: rows") and rest[-1] == "ValueError: why"


@pytest.mark.parametrize(
  ("words", "says"),
  [
    (["--workdir=a\udcff"], r"^--workdir is not UTF-8 .character 2.$"),
    (
      ["--config.data.prompts=jsonl:\udce9.jsonl"],
      r"^--config.data.prompts is not UTF-8 .character 7",
    ),
    (["--workdir", "\udcff"], r"^argument 2 is not UTF-8 .character 1.$"),
    (["--\udcff=a"], r"^argument 1 is not UTF-8 .character 3.$"),
  ],
)
def test_bytes_that_are_not_utf8_are_refused_by_the_flag(words, says):
  with pytest.raises(UserError, match=says):
    cli._require_unicode(["instructjax", *words])
  cli._require_unicode(["instructjax", "--prompt=é日\u202e"])


def test_a_character_that_stdout_lacks_does_not_end_a_command():
  program = "from instructjax.commands import cli; cli._show_odd_characters(); print('é日')"
  env = {"PYTHONIOENCODING": "ascii", "PATH": "/bin"}
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True)
  assert (done.returncode, done.stdout) == (0, rb"\xe9\u65e5" + b"\n"), done.stderr
