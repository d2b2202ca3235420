"""Real pods on this machine: a run that goes from pod to pod of other sizes and meshes equals one on a single device.

One run is stopped by SIGTERM, killed, and resumed by other numbers of processes; what it leaves is compared with the
same run made at once in this process. Slow: each process of each pod imports and compiles for itself.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from instructjax.parallel import distributed
from instructjax.stages import pipeline
from instructjax.train.metrics import MEASURED, read_metrics
from launch import local_pod
from tests import micro, quick

ROOT = pathlib.Path(__file__).parents[2]
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
ENV |= {"XLA_FLAGS": quick.FLAGS, "COLUMNS": "100"}
# Adam's usual eps makes whole steps out of rounding noise where gradients are zero (the bias of the reward model's
# head, say), and large steps of PPO add to it.
# Each evaluation of pretraining is saved: so it takes the seconds that JAX needs to notice a signal.
CHANGES = {
  "pretrain__num_steps": 30,
  "pretrain__evaluate_every": 3,
  "rm__optim__eps": 1e-3,
  "ppo__num_iterations": 4,
  "ppo__policy_optim__eps": 1e-3,
  "ppo__value_optim__eps": 1e-3,
  "ppo__policy_optim__learning_rate": 5e-3,
  "ppo__value_optim__learning_rate": 5e-3,
}
# Processes, devices of each, (data, fsdp, tensor).
TWO = 2, 1, (2, 1, 1)
FOUR = 4, 1, (1, 2, 2)  # tensor across processes: two and two bring the same rows
EIGHT = 4, 2, (1, 4, 2)


class Pod:
  """A pod under way: `until` reads on to a line, `end` waits for it."""

  def __init__(self, config_file: str, workdir, layout, *flags: str):
    processes, devices, mesh = layout
    axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    self._read = []
    self.process = subprocess.Popen(
      [
        *(sys.executable, "-m", "launch.local_pod"),
        *(f"--processes={processes}", f"--devices_per_process={devices}", "--"),
        *(sys.executable, "-m", "instructjax.main"),
        *(f"--config={config_file}", f"--workdir={workdir}", *flags),
        *(f"--config.mesh.{axis}={size}" for axis, size in axes),
      ],
      cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.kill()  # its processes die with it
    self.process.communicate()

  def until(self, part: str) -> str:
    while part not in (line := self.process.stdout.readline()):
      self._read.append(line)
      assert line, "".join(self._read)
    self._read.append(line)
    return line

  def end(self) -> tuple[int, list[str]]:
    """(exit code, all lines)."""
    rest, _ = self.process.communicate(timeout=600)
    return self.process.returncode, [line.rstrip() for line in self._read] + rest.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("pods")


@pytest.fixture(scope="module")
def specs(folder):
  return micro.write_data(folder / "data")


@pytest.fixture(scope="module")
def config_file(folder, specs):
  path = folder / "mine.py"
  path.write_text(
    textwrap.dedent(f"""
      from tests import micro
      def get_config(stage):
        config = micro.config_dict(stage, {specs!r})
        for name, value in {CHANGES!r}.items():
          config.update_from_flattened_dict({{name.replace("__", "."): value}})
        return config
    """)
  )
  return str(path)


@pytest.fixture(scope="module")
def alone(folder, specs):
  """The whole run on one device of this process."""
  with micro.one_device():
    pipeline.run(micro.config("ppo_ptx", specs, **CHANGES), folder / "alone")
  return folder / "alone"


@pytest.fixture(scope="module")
def uninterrupted(folder, config_file):
  """The first stage by two processes, at once."""
  with Pod(f"{config_file}:pretrain", folder / "uninterrupted", TWO) as pod:
    code, lines = pod.end()
  assert code == 0, "\n".join(lines)
  return folder / "uninterrupted"


@pytest.fixture(scope="module")
def wandering(folder, config_file):
  """One run by several pods; what each said and ended with, by name, and the workdir."""
  workdir, said = folder / "wandering", {}
  start = lambda layout, *flags: Pod(f"{config_file}:ppo_ptx", workdir, layout, *flags)
  with start(TWO, "--config.checkpoint.every_steps=1000") as pod:
    pod.until("pretrain 3/30")
    pod.process.send_signal(signal.SIGTERM)
    said["told"] = pod.end()
  with start(TWO) as pod:
    pids = pod.until("pids ").split("pids ")[1].split()
    pod.until("sft 2/6")
    os.kill(int(pids[1]), signal.SIGKILL)
    said["killed"] = pod.end()
  with start(EIGHT) as pod:
    pids = pod.until("pids ").split("pids ")[1].split()
    pod.until("] sft")
    os.kill(int(pids[2]), signal.SIGTERM)  # one host only: the machine under it is taken away
    said["one told"] = pod.end()
  with start(FOUR) as pod:
    pod.until("ppo_ptx 2/4")
    pod.process.send_signal(signal.SIGTERM)
    said["told late"] = pod.end()
  with start(TWO) as pod:
    said["last"] = pod.end()
  return workdir, said


def numbers(workdir, stage: str) -> list[dict]:
  return [
    {k: v for k, v in row.items() if not k.startswith(MEASURED)}
    for row in read_metrics(workdir / stage)
  ]


def own_words(lines: list[str], process: int) -> list[str]:
  prefix = f"[{process}] "
  return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]


def test_sigterm_saves_and_ends_all_with_the_code_for_it(wandering):
  _, said = wandering
  code, lines = said["told"]
  assert code == distributed.PREEMPTED
  (told,) = {line for p in (0, 1) for line in own_words(lines, p) if "told to stop" in line}
  stage, step = re.match(r"(\w+): told to stop .SIGTERM., saved at step (\d+);", told).groups()
  assert f"{stage}: going on after step {step}" in own_words(said["killed"][1], 0)


def test_seconds_of_each_process_are_in_the_metrics(uninterrupted):
  row = read_metrics(uninterrupted / "pretrain")[-1]
  assert {"seconds/process_0", "seconds/process_1"} <= row.keys()
  assert "seconds/process_2" not in row and 0 < row["seconds/process_0"] < 100


def test_one_process_speaks(wandering):
  _, said = wandering
  assert any(line.startswith("finished: ") for line in own_words(said["last"][1], 0)[-4:])
  assert own_words(said["last"][1], 1) == []


def test_when_one_is_killed_the_others_end_and_say_why(wandering):
  _, said = wandering
  code, lines = said["killed"]
  assert code == 128 + signal.SIGKILL
  assert any("another process of this run is gone" in line for line in own_words(lines, 0))
  assert f"[0] {distributed.LOST}" in lines[-1] and "[1] 137" in lines[-1]
  assert not any("still ran" in line for line in lines)


def test_sigterm_to_one_process_ends_all(wandering):
  _, said = wandering
  code, lines = said["one told"]
  assert code == distributed.PREEMPTED, "\n".join(lines)
  assert lines[-1].count(f" {distributed.PREEMPTED}") == 4
  assert said["told late"][0] == distributed.PREEMPTED, "\n".join(said["told late"][1])
  assert said["last"][0] == 0, "\n".join(said["last"][1])


def test_resumed_on_the_same_layout_it_is_the_same_bit_for_bit(wandering, uninterrupted):
  workdir, _ = wandering
  assert numbers(workdir, "pretrain") == numbers(uninterrupted, "pretrain")
  assert len(numbers(workdir, "pretrain")) == CHANGES["pretrain__num_steps"]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "ppo_init", "ppo_ptx"])
def test_pods_of_any_layout_train_as_one_device_does(wandering, alone, stage):
  got, expected = numbers(wandering[0], stage), numbers(alone, stage)
  assert len(got) == len(expected) > 0
  for one, other in zip(got, expected, strict=True):
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5, atol=1e-5)


def test_pods_judge_and_answer_as_one_device_does(wandering, alone):
  workdir, _ = wandering
  read = lambda folder, name: (folder / name).read_text(encoding="utf-8")
  assert read(workdir, "evaluate/answers.jsonl") == read(alone, "evaluate/answers.jsonl")
  for stage in ("rm", "sft_select", "evaluate"):
    one, other = (
      _values(json.loads((folder / stage / "done.json").read_text())["result"])
      for folder in (workdir, alone)
    )
    assert one, stage
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  assert (workdir / "report" / "index.html").is_file()


def _values(tree) -> list[float]:
  """All numbers of nested dicts and lists, in order."""
  if isinstance(tree, dict):
    return [value for name in sorted(tree) for value in _values(tree[name])]
  if isinstance(tree, list):
    return [value for item in tree for value in _values(item)]
  return [float(tree)] if isinstance(tree, int | float) else []


def test_one_code_for_all():
  lost, preempted = distributed.LOST, distributed.PREEMPTED
  assert local_pod.exit_code([0, 0]) == 0
  assert local_pod.exit_code([preempted] * 3) == preempted
  assert local_pod.exit_code([lost, 137, lost]) == 137
  assert local_pod.exit_code([2, lost]) == local_pod.exit_code([lost, 2]) == 2
  assert local_pod.exit_code([lost, lost]) == lost


def run(code: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60
  )


def test_a_process_that_stays_is_killed():
  command = ["sh", "-c", "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES; sleep ${JAX_PROCESS_ID}00"]
  done = run(
    "from launch import local_pod\n"
    f"raise SystemExit(local_pod.run({command!r}, processes=2, devices=1, grace=0.5))"
  )
  assert done.returncode == 137
  assert {"[0] 0 of 2", "[1] 1 of 2"} <= set(done.stdout.splitlines())
  assert done.stderr == "local_pod: [1] still ran 0.5 s after the first had ended\n"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--processes=2"], "no command: give it after --, as -- python -m instructjax.main"),
    (["--processes=2", "--", "no-such-program"], "cannot start no-such-program: *after --"),
    (["--processes=0", "--", "true"], "processes=0"),
  ],
)
def test_a_mistake_is_one_line(arguments, message):
  code = f"import runpy, sys; sys.argv[1:] = {arguments!r}; runpy.run_module('launch.local_pod', run_name='__main__')"
  done = run(code)
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  first, _, rest = message.partition("*")
  assert line.startswith("error: ") and first in line and rest in line
