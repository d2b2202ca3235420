"""The command that measures reward models, as a user starts it."""

import subprocess
import sys

from tests.test_main import ENV, ROOT


def test_a_mistake_is_one_line():
  words = [sys.executable, "-m", "instructjax", "rewards", "--data=jsonl:x"]
  done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "error: --models must have a value, as in rm=runs/demo/rm\n"
