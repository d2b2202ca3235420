"""launch/skypilot.yaml: fields of SkyPilot's task file, and the usual command.

SkyPilot's own schema (`sky.utils.schemas`, 0.14.1) was asked by hand; it is not a dependency.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
TASK = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
SCRIPT = (ROOT / "launch" / "tpu_vm.sh").read_text()


def test_its_fields_are_skypilots():
  assert TASK.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
  resources = TASK["resources"]
  assert resources.keys() <= {
    "infra",
    "accelerators",
    "accelerator_args",
    "use_spot",
    "job_recovery",
  }
  assert resources["accelerator_args"].keys() <= {
    "runtime_version",
    "tpu_name",
    "gcp_queued_resource",
  }
  assert resources["job_recovery"].keys() <= {
    "strategy",
    "max_restarts_on_errors",
    "recover_on_exit_codes",
  }
  # What is told to stop, or alone, or met a passing fault of storage, starts again; a mistake (2) and a bug (1) would
  # only come back.
  assert resources["job_recovery"]["recover_on_exit_codes"] == [69, 74, 75]


def test_the_image_is_that_of_the_accelerator():
  kind = re.fullmatch(r"tpu-(v\w+?)-\d+:1", TASK["resources"]["accelerators"])[1]
  version = TASK["resources"]["accelerator_args"]["runtime_version"]
  assert f"{kind}-*) echo {version} ;;" in SCRIPT


def test_variables_without_a_value_are_those_of_the_example():
  example = (ROOT / "launch" / "skypilot.yaml").read_text().partition("name:")[0]
  wanted = {name for name, value in TASK["envs"].items() if value is None}
  assert set(re.findall(r"--env (\w+)=", example)) == wanted == {"BUCKET", "RUN"}


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_the_command_is_the_usual_one(tmp_path):
  """`run` as a worker's shell runs it, with the parts of Python and of tpu_worker.sh played by stubs."""
  for name, text in {
    "launch/tpu_worker.sh": 'echo "$@" >&2',
    "home/venv/bin/python": 'echo "$JAX_PLATFORMS" && printf "%s\\n" "$@"',
  }.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
  values = TASK["envs"] | {"BUCKET": "my-bucket", "RUN": "gpt3"}
  environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
  shell = lambda script: subprocess.run(
    ["bash", "-c", script], env=environ | values, cwd=tmp_path, capture_output=True, text=True
  )
  assert shell(TASK["setup"]).stderr == "install tpu\n"
  done = shell(TASK["run"])
  assert done.returncode == 0, done.stderr
  platforms, *words = done.stdout.splitlines()
  assert platforms == "tpu,cpu"
  expected = (
    "-u -m instructjax.main --config=configs/ppo_ptx.py:gpt3_1p3b --workdir=/mnt/my-bucket/gpt3"
  )
  flags = TASK["envs"]["FLAGS"].replace("BUCKET", "my-bucket")
  assert words == [*shlex.split(expected), *shlex.split(flags)]
  assert done.stderr == "mount my-bucket\n"
