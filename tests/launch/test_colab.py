"""The Colab notebook: well formed, without outputs, and its cells run from the first to the last."""

import configparser
import html
import json
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


def test_it_opens_on_a_tpu_and_knows_where_the_code_is(cells):
  """The metadata are what Colab itself writes for a v5e-1 runtime. The badges lead to this notebook."""
  notebook = json.loads(NOTEBOOK.read_text())
  assert notebook["metadata"]["accelerator"] == "TPU"
  assert notebook["metadata"]["colab"]["gpuType"] == "V5E1"
  settings = configparser.ConfigParser()
  settings.read(ROOT / "setup.cfg")
  url = settings["metadata"]["url"]
  (repository,) = re.findall(r'^REPOSITORY = "(.*)"  #', text_of(cells, "settings"), re.MULTILINE)
  assert repository == url
  target = url.replace("https://github.com/", "https://colab.research.google.com/github/")
  for text in (
    text_of(cells, "what-this-is"),
    *map(read, ("docs/launching.md", "docs/running.md")),
  ):
    assert re.findall(r"colab-badge.svg\)\]\((\S+)\)", text) == [
      f"{target}/blob/main/launch/colab.ipynb"
    ]


def text_of(cells, id: str) -> str:
  (cell,) = (cell for cell in cells if cell["id"] == id)
  return "".join(cell["source"])


def read(page: str) -> str:
  return (ROOT / page).read_text()


# Llama 3.2 1B's shape, by its config.json.
_1B = dict(
  num_layers=16, d_model=2048, num_heads=32, num_kv_heads=8, head_dim=64, d_mlp=8192,
  max_length=131072, position="rope", norm="rmsnorm", mlp="swiglu", use_bias=False,
  attention_window=0, tie_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo_init", "ppo_ptx"])
def test_a_1b_model_with_adapters_fits_one_v5e_chip_by_the_planner(cells, stage):
  """With the notebook's own flags, by the planner's estimate; without adapters it does not."""
  text = text_of(cells, "adapters")
  flags = re.findall(r"--config\.([\w.]+)=(\S+)", re.search(r'"""(.*?)"""', text, re.S)[1])
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
  """A cell as IPython reads it: `!` lines become calls; the form's fields get these values."""
  lines = []
  for line in source.splitlines():
    indent, mark, command = re.fullmatch(r"(\s*)(!?)(.*)", line).groups()
    if mark:
      line = f"{indent}shell(f{command!r})"
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


@pytest.mark.parametrize("id", ["main-job", "change", "adapters"])
def test_a_run_that_fails_stops_the_notebook(cells, id, tmp_path):
  """Else the next cell would show the findings of an earlier run as those of this one."""
  namespace = {"shell": lambda command: None, "_exit_code": 0, "pathlib": pathlib}
  namespace |= {"PYTHON": "python", "WORKDIR": "a", "OVERRIDES": ""}
  if id != "main-job":
    exec(as_python(text_of(cells, "main-job"), {}), namespace)
  namespace["_exit_code"] = 2
  fields = {"REUSE": False, "WEIGHTS": "a.gguf"}
  with pytest.raises(RuntimeError, match="the run has not ended"):
    exec(as_python(text_of(cells, id), fields), namespace)


def test_every_cell_runs(cells, tmp_path, monkeypatch):
  """From an empty folder, at the smallest size; this checkout is cloned, and installed already."""
  shown, commands, setup = [], [], []

  def shell(command):
    program, *words = shlex.split(command)
    if (program, *words[:2]) in (("git", "clone", "--depth"), (sys.executable, "-m", "pip")):
      setup.append(command)
    elif words[:2] == ["-m", "uv"]:
      setup.append(command)
    else:
      command = command.replace(namespace["PYTHON"], sys.executable)
      done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
      assert done.returncode == 0, done.stderr
      commands.append((command, done.stdout))
    if program == "git":
      pathlib.Path(words[-1]).symlink_to(ROOT)
    namespace["_exit_code"] = 0

  display = types.SimpleNamespace(HTML=str, display=shown.append)
  monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
  monkeypatch.setitem(sys.modules, "IPython.display", display)
  (tmp_path / "content").mkdir()
  monkeypatch.chdir(tmp_path / "content")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv(
    "TTY_COMPATIBLE", ""
  )  # and this, which the notebook sets, are as before afterwards
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a kernel's
  monkeypatch.setenv("XLA_FLAGS", quick.FLAGS)
  config = micro.config_dict("ppo_ptx", micro.write_data(tmp_path / "data"))
  flags = differences(config, models.get("ppo_ptx", "tiny"))
  first, second = tmp_path / "demo", tmp_path / "changed"
  fields = {
    "WORKDIR": str(first), "CHANGED_WORKDIR": str(second), "OVERRIDES": shlex.join(flags), "WEIGHTS": "",
  }  # fmt: skip
  namespace = {"shell": shell}
  for cell in cells:
    if cell["cell_type"] == "code":
      code = as_python("".join(cell["source"]), fields)
      exec(compile(code, cell["id"], "exec"), namespace)
  assert not fields  # each is a field of the form
  clone, _, environment, install = setup
  assert clone == "git clone --depth 1 https://github.com/instructjax/instructjax instructjax"
  assert environment.endswith(" .colab") and install.endswith(' constraints/lock.txt ".[hub]"')
  assert namespace["PYTHON"] in install
  (_, devices), (_, whole), (_, changed) = commands
  assert "CpuDevice" in devices
  assert f"finished: {first}" in whole and f"finished: {second}" in changed
  table, report, *again = shown
  for finding in json.loads((first / "report" / "findings.json").read_text()):
    assert html.escape(finding["claim"]) in table
  assert report.startswith("<div><iframe") and "PPO-ptx" in report and len(again) == 2
  # The second run trained the RL stage anew, with the change, and nothing before it.
  for stage in ("pretrain", "rm", "ppo_init"):
    files = [next((run / stage / "checkpoints").rglob("_METADATA")) for run in (first, second)]
    assert files[0].stat().st_mtime_ns == files[1].stat().st_mtime_ns
  betas = [
    json.loads(finished.read_done(run / "ppo_ptx").fingerprint["config.ppo"])["beta"]
    for run in (first, second)
  ]
  assert betas == [0.2, 0.05]
