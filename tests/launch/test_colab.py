"""The Colab notebook: well formed, without outputs, and its cells run from the first to the last."""

import html
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import jax
import pytest

from configs import base, models
from instructjax.core.config import from_config_dict
from instructjax.parallel import sharding
from instructjax.train import finished
from launch import programs, sketch, topology
from tests import micro, quick

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"


@pytest.fixture(scope="module")
def cells():
  return json.loads(NOTEBOOK.read_text())["cells"]


def test_it_is_a_notebook_without_outputs(cells):
  """nbformat's schema of version 4.5, as far as these cells use it."""
  notebook = json.loads(NOTEBOOK.read_text())
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
  assert notebook["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
  ids = [cell["id"] for cell in cells]
  assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", id) for id in ids)
  for cell in cells:
    fields = {"cell_type", "id", "metadata", "source"}
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None
      fields |= {"outputs", "execution_count"}
    assert cell.keys() == fields and cell["cell_type"] in ("code", "markdown")
    assert isinstance(cell["source"], list) and isinstance(cell["metadata"], dict)
    assert all(line.endswith("\n") for line in cell["source"][:-1])


# Llama 3.2 1B's shape, by its config.json.
_1B = dict(
  num_layers=16, d_model=2048, num_heads=32, num_kv_heads=8, head_dim=64, d_mlp=8192,
  max_length=131072, position="rope", norm="rmsnorm", mlp="swiglu", use_bias=False,
  attention_window=0, tie_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo_init", "ppo_ptx"])
def test_a_1b_model_with_adapters_fits_one_v5e_chip_by_the_planner(cells, stage):
  """With the notebook's own flags, by the planner's estimate; without adapters it does not."""
  (cell,) = (cell for cell in cells if cell["id"] == "adapters")
  flags = re.findall(
    r"--config\.([\w.]+)=(\S+)", re.search(r'"""(.*?)"""', "".join(cell["source"]), re.S)[1]
  )
  values = models.get(stage, "tiny")
  values.update(base.base(stage))
  for network in (values.model, values.reward_model):
    network.update(_1B)
  values.tokenizer.vocab_size = 128256
  values.update_from_flattened_dict(
    {name: text if name.endswith("remat") else json.loads(text) for name, text in flags}
  )

  def needed(rank: int) -> float:
    values.adapter.rank = rank
    config = from_config_dict(values)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    program, chip = programs.make(config, mesh, stage), topology.CHIPS["v5e"]
    return sketch.sketch(config, stage, program, dict(mesh.shape), chip).bytes / chip.hbm_bytes

  assert needed(16) < 0.9
  assert needed(0) > 1


def as_python(source: str, fields: dict) -> str:
  """A cell as IPython reads it: `!` and `%` lines become calls; the form's fields get these values."""
  lines = []
  for line in source.splitlines():
    indent, mark, command = re.fullmatch(r"(\s*)([!%]?)(.*)", line).groups()
    if mark:
      line = f"{indent}{'shell' if mark == '!' else 'magic'}(f{command!r})"
    name = re.match(r"(\w+) = .*# @param", line)
    if name and name[1] in fields:
      line = f"{name[1]} = {fields.pop(name[1])!r}"
    lines.append(line)
  return "\n".join(lines)


def differences(config, default, prefix="--config"):
  """The flags that make `default` into `config`."""
  for name, value in config.items():
    if hasattr(value, "items"):
      yield from differences(value, default[name], f"{prefix}.{name}")
    elif value != default[name]:
      yield f"{prefix}.{name}={value}"


def test_every_cell_runs(cells, tmp_path, monkeypatch):
  """All but the installation, at the smallest size, from the notebook's own folder."""
  shown, commands, magics = [], [], []

  def shell(command):
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    commands.append((command, done.stdout))

  display = types.SimpleNamespace(HTML=str, display=shown.append)
  monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
  monkeypatch.setitem(sys.modules, "IPython.display", display)
  monkeypatch.chdir(NOTEBOOK.parent)
  monkeypatch.setenv("XLA_FLAGS", quick.FLAGS)
  python = pathlib.Path(sys.executable).parent
  monkeypatch.setenv("PATH", os.pathsep.join([str(python), os.environ["PATH"]]))
  config = micro.config_dict("ppo_ptx", micro.write_data(tmp_path / "data"))
  flags = differences(config, models.get("ppo_ptx", "tiny"))
  first, second = tmp_path / "demo", tmp_path / "changed"
  fields = {
    "WORKDIR": str(first), "CHANGED_WORKDIR": str(second), "OVERRIDES": shlex.join(flags), "WEIGHTS": "",
  }  # fmt: skip
  namespace = {"shell": shell, "magic": magics.append}
  for cell in cells:
    if cell["cell_type"] == "code":
      code = as_python("".join(cell["source"]), fields)
      exec(compile(code, cell["id"], "exec"), namespace)
  assert not fields  # each is a field of the form
  assert magics == ['pip install -q "."']
  (_, devices), (_, whole), (_, changed) = commands
  assert "CpuDevice" in devices
  assert f"finished: {first}" in whole and f"finished: {second}" in changed
  table, report, *again = shown
  for finding in json.loads((first / "report" / "findings.json").read_text()):
    assert html.escape(finding["claim"]) in table
  assert report.startswith("<iframe") and "PPO-ptx" in report and len(again) == 2
  # The second run trained the RL stage anew, with the change, and nothing before it.
  for stage in ("pretrain", "rm", "ppo_init"):
    files = [next((run / stage / "checkpoints").rglob("_METADATA")) for run in (first, second)]
    assert files[0].stat().st_mtime_ns == files[1].stat().st_mtime_ns
  betas = [
    json.loads(finished.read_done(run / "ppo_ptx").fingerprint["config.ppo"])["beta"]
    for run in (first, second)
  ]
  assert betas == [0.2, 0.05]
