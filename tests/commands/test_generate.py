"""The command that answers prompts: each mistake is one line. That it answers is in tests/serve/test_dialogue.py."""

import subprocess
import sys

import pytest

from tests import test_main


def command(*arguments, of="generate", **kwargs):
  command = [sys.executable, "-m", "instructjax", of, *arguments]
  return subprocess.run(
    command, cwd=test_main.ROOT, env=test_main.ENV, capture_output=True, text=True, **kwargs
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--prompt=a"], "--checkpoint must have a value"),
    (["--checkpoint=x"], "one of --prompt, --prompt_file and --interactive must be given"),
    (["--checkpoint=x", "--prompt=a", "--interactive"], "one of --prompt, --prompt_file and"),
    (["--checkpoint=x", "hello"], "unexpected arguments ['hello']; a prompt is given as --prompt="),
    (
      ["--checkpoint=x", "--prompt_file=no.txt"],
      "--prompt_file=no.txt cannot be read: No such file",
    ),
    (["--top_p=a"], "flag --top_p=a: could not convert string to float"),
    (["--checkpoint=x", b"--prompt=a\xff"], "--prompt is not UTF-8 (character 2)"),
    (["--checkpoint=x", "--prompt=a", b"--system=\xff"], "--system is not UTF-8 (character 1)"),
    (["--checkpoint", b"x\xff", "--prompt=a"], "argument 2 is not UTF-8 (character 2)"),
    ([b"--prompt_file=\xff"], "--prompt_file is not UTF-8 (character 1)"),
    (["--checkpoint=x", "--interactive", "--num_samples=2"], "--num_samples=2 must be 1 with"),
    (["--checkpoint=\x1b[2J[/b]", "--prompt=a"], "--checkpoint=?[2J[/b] must be"),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  done = command(*arguments)
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and message in line
