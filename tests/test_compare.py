"""The command that compares finished runs, as a user starts it."""

import subprocess
import sys

from tests.stages import test_finished_runs
from tests.test_main import ENV, ROOT


def command(*arguments):
  words = [sys.executable, "-m", "instructjax", "compare", *map(str, arguments)]
  return subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)


def test_two_seeds_become_a_page_and_a_table(tmp_path):
  folders = [test_finished_runs.write(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1)]
  done = command(*folders, f"--out={tmp_path / 'out'}")
  assert (done.returncode, done.stderr) == (0, "")
  assert "holds in 2 of 2" in done.stdout
  assert done.stdout.splitlines()[-1] == f"comparison: {tmp_path / 'out' / 'index.html'}"
  assert (tmp_path / "out" / "comparison.json").is_file()


def test_no_run_is_a_mistake_of_one_line(tmp_path):
  for arguments, message in (
    ((), "name the folders of finished runs"),
    ((tmp_path,), "is no finished run"),
  ):
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
