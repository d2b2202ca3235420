"""--check: what would end a run on a slice is said without one."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import models
from instructjax.commands import check
from instructjax.core.config import from_config_dict
from instructjax.core.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = {f"data.{kind}": "jsonl:/mnt/bucket/x" for kind in ("documents", "demonstrations")}
SOURCES |= {f"data.{kind}": "jsonl:/mnt/bucket/y" for kind in ("comparisons", "prompts")}


@pytest.fixture(autouse=True)
def platforms(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", os.environ["JAX_PLATFORMS"])  # which `check` sets


def config(preset="gpt3_1p3b", stage="ppo_ptx", **changes):
  values = models.get(stage, preset)
  values.update_from_flattened_dict(SOURCES | changes)
  return from_config_dict(values)


def test_a_run_that_would_start():
  """The open axis of the mesh is settled as on the slice."""
  line, rest = check.check([("", config())], "v5litepod-256")
  assert line.startswith("would start on 256 x TPU v5 lite (slice 1, data 1, fsdp 32, tensor 8): ")
  assert line.endswith("ppo_ptx, evaluate") and "pretrain, " in line
  assert rest == "not checked: data, weights, workdir"


@pytest.mark.parametrize(
  "changes, slices, words",
  [
    (
      {"mesh.fsdp": 256},
      "v5litepod-256",
      "sft.batch_size=32 must be divisible by mesh slice * data * fsdp = 256",
    ),
    ({"mesh.fsdp": 8, "mesh.tensor": 8}, "v5litepod-256", "multiply to the number of devices"),
    ({"mesh.tensor": 8}, "2xv5litepod-256", "have as many slices as the devices lie in, got 2"),
    ({"mesh.tensor": 8}, "v5litepod-16", "needs at least"),
    ({"mesh.tensor": 8, "data.prompts": ""}, "v5litepod-256", "must name a source of prompts"),
    (
      {"mesh.tensor": 8, "execution.attention": "cudnn"},
      "v5litepod-256",
      "needs NVIDIA GPUs of Ampere or later, not tpu",
    ),
  ],
)
def test_what_would_end_it_is_said(changes, slices, words):
  with pytest.raises(UserError) as told:
    check.check([("", config(**changes))], slices)
  assert words in str(told.value)


def in_files(name: str, bucket: str) -> dict[str, str]:
  """The settings of a file of launch/, which writes each as --config.NAME=VALUE."""
  text = (ROOT / "launch" / name).read_text()
  return dict(re.findall(rf"--config\.(data\.\w+)=(jsonl:/mnt/{bucket}/\S+)", text))


@pytest.mark.parametrize(
  "name, bucket, slices",
  [
    ("tpu_vm.sh", "my-bucket", "v5litepod-256"),
    ("skypilot.yaml", "BUCKET", "v5litepod-256"),
    ("gke.yaml", "BUCKET", "v5e:16x16"),
  ],
)
def test_what_launch_has_as_an_example_would_start(name, bucket, slices):
  """A slice that is rented for a command that ends at once costs all the same."""
  values = models.get("ppo_ptx", "gpt3_1p3b")
  values.update_from_flattened_dict({"mesh.tensor": 8} | in_files(name, bucket))
  line, _ = check.check([("", from_config_dict(values))], slices)
  assert line.startswith("would start on 256 x TPU v5 lite")


def test_every_point_of_a_sweep_is_checked():
  good, bad = config(), config(**{"mesh.fsdp": 256})
  with pytest.raises(UserError, match="^point seed_1: sharding: "):
    check.check([("seed_0", good), ("seed_1", bad)], "v5litepod-256")
  lines = check.check([("seed_0", good), ("seed_1", good)], "v5litepod-256")
  assert [line.partition(":")[0] for line in lines] == [
    "point seed_0",
    "point seed_1",
    "not checked",
  ]


def test_the_command_needs_no_workdir_and_leaves_none(tmp_path):
  command = [sys.executable, "-m", "instructjax.main", "--config=ppo_ptx:gpt3_1p3b"]
  sources = [f"--config.{name}={value}" for name, value in SOURCES.items()]
  workdir = tmp_path / "run"
  done = subprocess.run(
    [*command, *sources, "--config.mesh.tensor=8", "--check=v6e:16x16", f"--workdir={workdir}"],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert "would start on 256 x TPU v6 lite" in done.stdout and not workdir.exists()
