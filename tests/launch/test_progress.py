"""What the planner says while it works."""

import time

import pytest

from launch import progress


def test_it_says_what_begins_how_long_it_takes_and_how_it_ends(capsys):
  with progress.telling("compiling x", every=0.02):
    time.sleep(0.1)
  first, *between, last = capsys.readouterr().err.splitlines()
  assert first == "compiling x ..." and last == "compiling x: took 0 s"
  assert between and set(between) == {"compiling x: 0 s so far"}


def test_a_failure_ends_it_too(capsys):
  with pytest.raises(ValueError, match="no"), progress.telling("compiling x"):
    raise ValueError("no")
  assert capsys.readouterr().err.endswith("compiling x: took 0 s\n")
  assert capsys.readouterr().out == ""
