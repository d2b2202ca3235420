"""Who the processes of a run are, and how each ends: by a mistake, by SIGTERM, or because another is gone."""

import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

import jax
import pytest
from jax._src import clusters

from instructjax.parallel import distributed
from instructjax.parallel.distributed import Group
from launch import local_pod

ROOT = pathlib.Path(__file__).parents[2]
JOB = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}

# --- who they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("flags", "environ", "expected"),
  [
    ((None, None, None), {}, None),
    (("h:1", 2, 1), {}, Group("h:1", 2, 1)),
    (("h:1", 2, 1), JOB, Group("h:1", 2, 1)),
    ((None, None, None), JOB, Group("10.0.0.1:1234", 4, 0)),
    ((None, None, 3), JOB, Group("10.0.0.1:1234", 4, 3)),
    ((None, 1, None), JOB, None),
    ((None, 1, None), SLURM, None),
    ((None, None, None), SLURM, Group()),
    ((None, None, None), SLURM | {"SLURM_NTASKS": "1"}, None),
    ((None, None, None), {"SLURM_NTASKS": "4"}, None),  # inside sbatch, not started by srun
    ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "2"}, Group()),
    ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, Group()),
    ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}, Group()),
    ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Group()),
    ((None, None, None), {"TPU_SKIP_MDS_QUERY": "1"}, None),
  ],
)
def test_flags_before_environment_before_cluster(flags, environ, expected):
  assert distributed.find(*flags, environ) == expected


@pytest.mark.parametrize(("has_package", "expected"), [(True, Group()), (False, None)])
def test_a_tpu_vm_is_known_by_its_chips(monkeypatch, has_package, expected):
  monkeypatch.setattr(
    distributed.glob, "glob", lambda pattern: ["/dev/accel0"] * ("acc" in pattern)
  )
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: has_package or None)
  assert distributed.find(environ={}) == expected
  assert distributed.find(environ={"TPU_SKIP_MDS_QUERY": "1"}) is None


def ask_cluster(monkeypatch, **answer):
  detect = mock.Mock(**answer)
  monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", detect)


def test_a_tpu_that_is_no_cloud_vm_runs_alone(monkeypatch):
  ask_cluster(monkeypatch, return_value=(None, None, None, None))
  set_handler = mock.Mock()
  monkeypatch.setattr(distributed.signal, "signal", set_handler)
  distributed.join(Group())
  set_handler.assert_called_once_with(signal.SIGTERM, mock.ANY)


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
  ask_cluster(monkeypatch, side_effect=OSError("metadata.google.internal does not answer"))
  with pytest.raises(distributed.NotJoined, match="cannot join .*: metadata.* runs alone"):
    distributed.join(Group())


def test_a_cluster_says_who_they_are_and_which_devices_are_whose(monkeypatch):
  ask_cluster(monkeypatch, return_value=("10.0.0.1:8476", 4, 2, [2]))
  gather, initialize = mock.Mock(), mock.Mock()
  monkeypatch.setattr(distributed.lobby, "gather", gather)
  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  distributed.join(Group(), joining=7)
  gather.assert_called_once_with("10.0.0.1:8476", 4, 2, 7)
  assert initialize.call_args.args == ("10.0.0.1:8476", 4, 2, [2])


@pytest.mark.parametrize(
  ("flags", "environ", "message"),
  [
    (("h:1", None, None), {}, "--num_processes .or JAX_NUM_PROCESSES., --process_id .* is missing"),
    ((None, 2, None), {}, "--coordinator .or JAX_COORDINATOR_ADDRESS., --process_id"),
    ((None, None, 0), SLURM, "--coordinator .*, --num_processes .* is missing"),
    (("h:1", 2, 2), {}, "--process_id=2 must be from 0 to num_processes - 1 = 1"),
    (("h:1", 0, 0), {}, "--process_id=0 must be from 0"),
    (("h", 2, 0), {}, "--coordinator='h' must be HOST:PORT"),
    (("h:70000", 2, 0), {}, "--coordinator='h:70000' must be HOST:PORT"),
    (("h:0", 2, 0), {}, "with a port from 1 to 65535"),
    (("h:-1", 2, 0), {}, "with a port from 1 to 65535"),
    (("h:" + "9" * 5000, 2, 0), {}, "with a port from 1 to 65535"),
    ((None, None, None), {"SLURM_NTASKS": "2(x3)"}, "SLURM_NTASKS=2.x3. must be a whole number"),
    ((None, None, None), JOB | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one must be a whole"),
  ],
)
def test_what_is_given_in_part_or_makes_no_sense_is_refused(flags, environ, message):
  with pytest.raises(ValueError, match=message):
    distributed.find(*flags, environ)


# --- one process ----------------------------------------------------------------------------------


def test_sigterm_is_kept_until_a_safe_point(monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(distributed, "_told_to_stop", distributed.threading.Event())
  try:
    distributed.join(None)
    distributed.require_going_on()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(distributed.Preempted, match="SIGTERM.* goes on from the last checkpoint"):
      distributed.require_going_on()
  finally:
    signal.signal(signal.SIGTERM, before)


# --- several --------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys, time
from instructjax.commands import cli
from instructjax.parallel import agreement, distributed, supervisor
from instructjax.parallel.watchdog import Limits
from instructjax.core.errors import Preempted, UserError

process, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.argv = sys.argv[:1]

def main(_):
  supervisor.supervise()
  distributed.join(distributed.find(f"127.0.0.1:{port}", 2, process), joining=60 if what else 1, silence=20)
  distributed.watch(Limits(20.0, 60.0, 15.0 if what == "stuck" else 100.0, 60.0))
  from jax.experimental import multihost_utils
  multihost_utils.sync_global_devices("met")
  if what == "all_mistaken":
    agreement.require_same(distributed.team(), "settings", {"config.seed": str(process)})
  if process == 1:
    if what == "mistaken":
      raise UserError("the disk is full")
    if what == "stuck":
      while True:
        pass
    if what == "hung":
      os.kill(os.getpid(), signal.SIGSTOP)
    if what == "late":
      leave = os._exit
      os._exit = lambda code: (time.sleep(15), leave(code))  # longer than process 0
    if what in ("told", "slow", "late"):
      os.kill(os.getppid(), signal.SIGTERM)
  try:
    for number in range(100_000):
      distributed.require_going_on(f"point {number}")
      multihost_utils.sync_global_devices(str(number))
  except Preempted:
    if what == "slow" and process == 1:  # to end, process 0 being the coordinator
      time.sleep(distributed._PARTING + 3)
    raise

cli.run(main, interrupted="")
"""
HOW = ("all_mistaken", "mistaken", "hung", "told", "slow", "late", "stuck")


@pytest.fixture(scope="module")
def ended():
  """how -> [(exit code, stderr) of process 0 and 1], and `alone`: a process 1 without process 0."""
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  start = lambda *arguments: subprocess.Popen(
    [sys.executable, "-c", WORKER, *map(str, arguments)],
    cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  pods = {}
  try:
    for how in HOW:
      port = local_pod.free_port()
      pods[how] = [start(process, port, how) for process in (0, 1)]
    pods["alone"] = [start(1, local_pod.free_port(), "")]
    result = {}
    for how, pod in pods.items():
      if how == "hung":
        pod[0].wait(timeout=600)
        pod[1].kill()  # stopped processes stay; this one's parent does not
      result[how] = [(one.communicate(timeout=600)[1], one.returncode)[::-1] for one in pod]
    return result
  finally:
    for one in (one for pod in pods.values() for one in pod):
      one.kill()
      one.communicate()


def last_line(stderr: str) -> str:
  return stderr.splitlines()[-1]


def test_a_mistake_that_all_meet_such_as_that_they_differ_is_2_everywhere(ended):
  assert [code for code, _ in ended["all_mistaken"]] == [2, 2]
  (said,) = {stderr for _, stderr in ended["all_mistaken"]}
  assert len(said.splitlines()) == 1
  assert said.startswith(
    "error: the processes of this run are not the same: config.seed is 1 on process 1 and 0 on"
  )


def test_a_mistake_of_one_ends_the_other_with_the_same_words_and_code(ended):
  (code, told), (own_code, own) = ended["mistaken"]
  assert (code, own_code) == (2, 2)
  assert last_line(own) == "error: the disk is full"
  assert last_line(told) == "error: process 1: the disk is full"


def test_a_silent_process_ends_the_other_with_a_message(ended):
  code, stderr = ended["hung"][0]
  assert code == distributed.LOST
  assert last_line(stderr).startswith("error: another process of this run is gone")
  assert "The same command goes on" in last_line(stderr)


def test_a_process_that_loops_ends_all_and_is_named(ended):
  for code, stderr in ended["stuck"]:
    assert code == distributed.LOST
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: stuck (") and ": process 1 at " in line
    assert "where the others wait for it" in line
  assert "in main" in ended["stuck"][1][1]  # the stack


@pytest.mark.parametrize("how", ["told", "slow", "late"])
def test_sigterm_to_one_ends_all_at_the_same_point(ended, how):
  assert [code for code, _ in ended[how]] == [distributed.PREEMPTED] * 2
  # JAX may log after it that a connection is gone.
  told = [
    [x for x in stderr.splitlines() if x.startswith("told to stop")] for _, stderr in ended[how]
  ]
  (first,), (second,) = told
  assert first == second and "goes on from point " in first


def test_a_coordinator_that_is_not_there_is_one_line(ended):
  ((code, stderr),) = ended["alone"]
  assert code == distributed.LOST
  (line,) = stderr.splitlines()
  assert "could not be reached for 1 s (" in line and "start process 0 there" in line
