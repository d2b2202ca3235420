"""What pip installs: the wheel's files, the version, and the table of commands."""

import configparser
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import instructjax
from instructjax.core import running

ROOT = pathlib.Path(__file__).parents[1]
# What setuptools would copy into the wheel, without building one.
LIST = """
import json
from setuptools import Distribution
dist = Distribution({"script_name": "setup.py"})
dist.parse_config_files(["setup.cfg"])
build = dist.get_command_obj("build_py")
build.ensure_finalized()
modules = [path for _, _, path in build.find_all_modules()]
data = [f"{where}/{name}" for _, where, _, names in build.data_files for name in names]
print(json.dumps([dist.get_version(), modules + data]))
"""


@pytest.fixture(scope="module")
def wheel() -> tuple[str, set[str]]:
  """(version, paths of its files)."""
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", LIST], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  version, files = json.loads(done.stdout.splitlines()[-1])
  return version, set(map(os.path.normpath, files))


def test_the_wheel_holds_every_file_of_its_packages(wheel):
  """instructjax with what is no Python (templates), configs and launch beside it, and nothing else."""
  files = {
    str(path.relative_to(ROOT))
    for folder in ("instructjax", "configs", "launch")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  assert wheel[1] == files
  assert {"configs/ppo_ptx.py", "launch/plan.py", "launch/tpu_vm.sh"} <= wheel[1]


def test_there_is_one_version(wheel):
  assert wheel[0] == instructjax.__version__
  assert re.fullmatch(r"\d+\.\d+\.\d+", instructjax.__version__)


def test_every_extra_that_a_message_names_is_there_with_a_lower_bound():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  extras = setup["options.extras_require"]
  named = {
    name
    for path in (ROOT / "instructjax").rglob("*.py")
    for name in re.findall(r"pip install 'instructjax\[(\w+)\]'", path.read_text(encoding="utf-8"))
  }
  services = set(running.TRACKERS) - {"tensorboard"}
  assert services | named <= set(extras) and "hub" in named
  for name in services:  # tracking.py takes the extra's name for the package's
    packages = [Requirement(line) for line in extras[name].splitlines() if line and line[0] != "#"]
    assert [package.name for package in packages] == [name]
    assert all(bound.operator == ">=" for package in packages for bound in package.specifier)
    assert all(package.specifier for package in packages)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_file_pins_every_requirement_within_its_bounds(python):
  """`constraints/lock.txt` is made from setup.cfg by hand, and would otherwise fall behind it."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  assert python in SpecifierSet(setup["options"]["python_requires"])
  extras = setup["options.extras_require"]
  wanted = [setup["options"]["install_requires"], extras["test"], extras["tpu"]]
  required = [
    Requirement(line) for line in "\n".join(wanted).splitlines() if line and line[0] != "#"
  ]
  lines = (ROOT / "constraints/lock.txt").read_text().splitlines()
  pins = [Requirement(line) for line in lines if not line.lstrip().startswith("#")]
  here = {"python_version": python, "python_full_version": f"{python}.0"}
  pinned = {
    canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
    for pin in pins
    if pin.marker is None or pin.marker.evaluate(here)
  }
  outside = {
    str(row) for row in required if pinned.get(canonicalize_name(row.name)) not in row.specifier
  }
  assert not outside
