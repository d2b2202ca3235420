"""The command that says whose answers are preferred, as a user starts it."""

import subprocess
import sys

from tests.test_main import ENV, ROOT


def test_a_mistake_is_one_line():
  words = [sys.executable, "-m", "instructjax", "preference", "--answers=x", "--out=y"]
  done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: --judges must name who judges")
