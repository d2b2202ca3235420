"""The type checker over the package, as pyproject.toml sets it up."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_IGNORE = re.compile(r"#\s*(?:pyrefly|type|ty|pyright):\s*ignore(?P<kind>\[[\w, -]+\])?(?P<why>.*)")
_MOST = 10  # ignores and casts in the whole package


def _checker() -> str | None:
  """pyrefly of this Python's own environment, else of the path."""
  beside = pathlib.Path(sys.executable).with_name("pyrefly")
  return str(beside) if beside.is_file() else shutil.which("pyrefly")


@pytest.mark.skipif(_checker() is None, reason="pyrefly is not installed; it is in the test extra")
def test_the_type_checker_finds_nothing():
  command = [_checker(), "check", "--python-interpreter-path", sys.executable]
  command += ["--output-format=min-text", "--min-severity=warn", "--summary=none"]
  done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_checker_is_told_to_leave_alone_is_little_and_has_a_reason():
  found = []
  for path in sorted((_ROOT / "instructjax").rglob("*.py")):
    text = path.read_text(encoding="utf-8")
    casts = bool(re.search(r"from typing import .*\bcast\b|typing\.cast", text))
    for number, line in enumerate(text.splitlines(), start=1):
      where = f"{path.relative_to(_ROOT)}:{number}: {line.strip()}"
      if match := _IGNORE.search(line):
        assert match["kind"] and match["why"].strip(), f"{where} must name its kind and a reason"
        found.append(where)
      found += [where] * (line.count("cast(") if casts else 0)
  assert len(found) < _MOST, "\n".join(found)
