"""What the settings of a preset are, by value, for the records of its runs. Called by figures.py.

A run's numbers depend on the values of its settings, not on the files that hold them: these change with every setting
that another preset gains.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from instructjax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
_OF_A_RUN = ("seed",)  # differs between the runs of a preset


def now(config: str) -> dict[str, object]:
  """The settings of --config, as `configs/FILE.py` or `configs/FILE.py:PRESET`: dotted name -> value as JSON has it."""
  path, _, preset = config.partition(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  found = _flat(json.loads(json.dumps(module.get_config(preset or None).to_dict())))
  return {name: value for name, value in found.items() if name not in _OF_A_RUN}


def at(commit: str, config: str, root: pathlib.Path = ROOT) -> dict[str, object]:
  """As `now`, of the files of a commit.

  Raises:
    UserError: there is no such commit, or it has no such config.
  """
  with tempfile.TemporaryDirectory() as folder:
    archive = pathlib.Path(folder) / "code.tar"
    packed = ["git", "-C", str(root), "archive", f"--output={archive}", commit]
    unpacked = ["tar", "-xf", str(archive), "-C", folder]
    for command in (packed, unpacked):
      if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        raise UserError(f"commit {commit!r} cannot be read")
    # Those of the commit are read by the code of today, in a process of its own that has only them in its path.
    code = f"import json\nfrom now import now\nprint(json.dumps(now({config!r})))"
    (pathlib.Path(folder) / "now.py").write_text(pathlib.Path(__file__).read_text(encoding="utf-8"))
    done = subprocess.run(
      [sys.executable, "-c", code],
      cwd=folder,
      env=os.environ | {"PYTHONPATH": folder},
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise UserError(f"commit {commit} has no {config}: {done.stderr.strip().splitlines()[-1]}")
  return json.loads(done.stdout)


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
  found = {}
  for name, value in tree.items():
    found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return found


def of_base() -> dict[str, object]:
  """The values that presets change, those of configs/base.py."""
  return _flat(json.loads(json.dumps(importlib.import_module("configs.base").base("").to_dict())))


def changed(
  then: dict[str, object], today: dict[str, object], base: dict[str, object] | None = None
) -> list[str]:
  """The settings of a run that are another today, or are gone, and those that came later and that the preset uses.

  A setting that came later is as if it were not there, as long as the preset leaves it at its value in base.py: that
  has to leave everything as it was. Where it does not, measure anew.

  Args:
    then: of the run, from `now` or `at`.
    today: from `now`.
    base: from `of_base`; None for today's.
  """
  base = of_base() if base is None else base
  others = [name for name, value in then.items() if name not in today or today[name] != value]
  later = [name for name in today if name not in then and today[name] != base.get(name)]
  return others + later
