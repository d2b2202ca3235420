"""The command line: what it prints, how it ends, and that a mistake is one line and exit code 2."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from tests import micro, quick

ROOT = pathlib.Path(__file__).parents[1]
# As a user's shell has it, neither platform nor fake devices chosen; but programs compile sooner.
SHELL = {
  k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS", "PYTHONWARNINGS")
}
ENV = SHELL | {"XLA_FLAGS": quick.FLAGS, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}


def command(*arguments):
  return [sys.executable, "-m", "instructjax.main", *map(str, arguments)]


def run(*arguments, **kwargs):
  return subprocess.run(
    command(*arguments), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120, **kwargs
  )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  """A user's own config file, of the smallest size: `config_file:STAGE`."""
  folder = tmp_path_factory.mktemp("config")
  specs = micro.write_data(folder / "data")
  path = folder / "mine.py"
  path.write_text(
    textwrap.dedent(f"""
      from tests import micro, quick
      def get_config(stage):
        return micro.config_dict(stage, {specs!r})
    """)
  )
  return path


# --- flags ----------------------------------------------------------------------------------------


PPO = "--config=configs/ppo.py"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--config must have a value"),
    ([PPO], "--workdir must have a value"),
    ([PPO, "--workdir="], "--workdir must have a value"),
    (
      ["--config=configs/none.py", "W"],
      "--config=configs/none.py: *no such file *ppo_ptx, pretrain",
    ),
    (["--config=configs", "W"], "--config=configs is a folder"),
    (["--config=README.md", "W"], "--config=README.md: README.md, line "),
    (["--config=ppo:huge", "W"], "--config=ppo:huge: preset 'huge' must be one of tiny, "),
    ([PPO + ":huge", "W"], "preset 'huge' must be one of"),
    (
      [PPO, "W", "--config.ppo.bta=1"],
      "--config has no field ppo.bta; did you mean --config.ppo.beta?",
    ),
    ([PPO, "W", "--config.beta=1"], "no field beta; did you mean --config.ppo.beta?"),
    (
      [PPO, "W", "--config.ppo.optim.b1=1"],
      "did you mean --config.ppo.policy_optim.b1 or --config.ppo.value_optim.b1?",
    ),
    ([PPO, "W", "--config.ppo.data.prompts=a"], "did you mean --config.data.prompts?"),
    ([PPO, "W", "--config.preset=gpt2"], "--config.preset *--config=configs/ppo.py:PRESET"),
    ([PPO, "W", "--config.ppo.beta=None"], "ppo.beta=None must be of type float"),
    ([PPO, "W", "--config.ppo.value_clip=no"], "value_clip=no: could not convert"),
    ([PPO, "W", "--config.ppo=5"], "--config.ppo=5: *is not a dict"),
    ([PPO, "W", "--config.evaluate.compare=5"], "evaluate.compare[0]=5 must be of type str"),
    (["--flagfile=none.txt", "W"], "Unable to open flagfile: *none.txt"),
    ([PPO, "W", "--config.ppo.beta=abc"], "--config.ppo.beta=abc: *not convert string to float"),
    ([PPO, "W", "--config.seed=1.5"], "--config.seed=1.5: invalid literal for int"),
    ([PPO, "W", "--config.ppo.clip=-1.0"], "ppo.clip=-1.0 must be > 0"),
    ([PPO, "W", "--config.data.max_prompt_length=999"], "= 1019 must not exceed"),
    ([PPO, "W", "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    ([PPO, "W", "ppo.beta=1"], "unexpected arguments ['ppo.beta=1']; *--config.NAME=VALUE"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
  arguments = [f"--workdir={tmp_path / 'run'}" if a == "W" else a for a in arguments]
  done = run(*arguments)
  assert done.returncode == 2
  assert done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ")
  rest = line
  for part in message.split(" *"):  # the parts in this order
    assert part in rest, line
    rest = rest.split(part, 1)[1]
  assert not (tmp_path / "run").exists()


def test_a_bug_keeps_its_traceback(tmp_path):
  (tmp_path / "mine.py").write_text(
    textwrap.dedent(f"""
      from instructjax.train import supervised
      from tests import micro
      def bug(*arguments):
        raise ValueError("deliberate")
      def get_config():
        supervised.create_state = bug
        return micro.config_dict("pretrain", {micro.write_data(tmp_path / "data")!r})
    """)
  )
  done = run(f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 1
  first, second, *_, last = done.stderr.splitlines()
  assert first.startswith("This is a fault of instructjax ") and "please report it" in first
  assert second == "Traceback (most recent call last):"
  assert "in bug" in done.stderr and last == "ValueError: deliberate"


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, config_file):
  (tmp_path / "file").write_text("")
  done = run(f"--config={config_file}:pretrain", f"--workdir={tmp_path / 'file' / 'run'}")
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert "Not a directory" in line and str(tmp_path / "file" / "run") in line


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_prints_stages_and_progress_only(tmp_path, config_file):
  done = run(f"--config={config_file}:pretrain", f"--workdir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  head, *steps, _, titles, _, times, _, end, talk, export = done.stdout.splitlines()
  assert head == "[1/1] pretrain"
  assert [line.split("  ")[0] for line in steps] == [f"pretrain {i}/4" for i in range(1, 5)]
  assert "seconds a step" in titles and re.match(r"│ pretrain │ +\d+\.\d │ +4 │ ", times)
  assert end.startswith("finished: ")
  folder = f"--checkpoint={tmp_path / 'pretrain'}"
  assert talk == f"  to talk to it: instructjax generate {folder} --interactive"
  assert (
    export == f"  for transformers: instructjax export {folder} --format=hf --out=export/pretrain"
  )


def test_one_run_a_workdir_and_ctrl_c(tmp_path, config_file):
  arguments = (f"--config={config_file}:pretrain", f"--workdir={tmp_path}")
  # Where the tests are a shell's background job, what they start would ignore Ctrl-C as they do.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  first = subprocess.Popen(
    command(*arguments, "--config.pretrain.num_steps=1000000", "--config.log.every_steps=10"),
    cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  signal.signal(signal.SIGINT, before)
  try:
    while "pretrain 10/" not in (line := first.stdout.readline()):
      assert line, first.stderr.read()
    second = run(*arguments)
    assert (second.returncode, second.stdout) == (2, "")
    (line,) = second.stderr.splitlines()
    assert f"{tmp_path} is in use by another run (process {first.pid} on " in line
    first.send_signal(signal.SIGINT)
    _, stderr = first.communicate(timeout=60)
  finally:
    first.kill()
    first.communicate()
  assert first.returncode == 130
  assert "interrupted: the same command goes on from the last checkpoint" in stderr.splitlines()
  assert list((tmp_path / "pretrain" / "checkpoints").glob("[0-9]*"))
