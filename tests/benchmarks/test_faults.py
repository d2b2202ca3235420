"""The campaign of faults: its flags, its table, and what counts as survived; one kill of a small process."""

import os
import sys
import time

import pytest

from benchmarks import fault_runs, faults, moments


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--kinds=kill,fire"], "fire must be one of kill, bits, disk, limit, pair"),
    (["--kinds="], "must be one of"),
    (["--tries=0"], "--tries=0 must be > 0"),
    (["--tries=many"], "invalid int value"),
  ],
)
def test_bad_flags_are_named(capsys, flags, message):
  with pytest.raises(SystemExit) as ended:
    faults.main(flags)
  assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_table_counts_by_kind_and_kills_by_stage():
  tries = [
    faults.Try("kill", "sft", ""),
    faults.Try("kill", "sft", "another end in sft/state"),
    faults.Try("kill", "ppo (saving)", ""),
    faults.Try("bits", "rm, manifest.json, bit 7", ""),
  ]
  rows = [line.rsplit(None, 2) for line in faults.table(tries).splitlines()]
  assert rows == [
    ["kind", "tried", "survived"],
    ["kill", "3", "2"],
    ["  sft", "2", "1"],
    ["  ppo (saving)", "1", "1"],
    ["bits", "1", "1"],
  ]


@pytest.mark.parametrize("wrong", ["", "another end in sft/state"])
def test_the_command_ends_with_1_if_one_has_not_survived(monkeypatch, capsys, tmp_path, wrong):
  found = [faults.Try("bits", "rm", ""), faults.Try("bits", "sft", wrong)]
  monkeypatch.setattr(faults, "campaign", lambda *_: found)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # main sets both
  monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
  assert faults.main(["--kinds=bits", "--tries=2", f"--folder={tmp_path}"]) == bool(wrong)
  assert f'"bits": [2, {1 if wrong else 2}]' in capsys.readouterr().out


def test_an_end_that_differs_or_cannot_be_read_is_not_the_reference(monkeypatch, tmp_path):
  bench = faults.Bench(
    tmp_path, {"sft/state": "a", "rm/state": "b"}, moments.Timeline((), 0.0), fault_runs.STAGE
  )
  ends = iter([{"sft/state": "a", "rm/state": "b"}, {"sft/state": "c"}, {"digest": "run: why"}])
  monkeypatch.setattr(fault_runs, "read_digest", lambda workdir: next(ends))
  assert bench.compare(tmp_path) == ""
  assert bench.compare(tmp_path) == "another end in rm/state, sft/state"
  assert bench.compare(tmp_path).startswith("another end in digest, ")


@pytest.mark.parametrize(
  "text, code, words",
  [
    ("finished: run\n", 0, ""),
    ("error: cannot write run/sft: No space left on device\n", 2, ""),
    ("error: cannot read run/sft\n", 2, "it does not say what cannot be written"),
    ("error: cannot write a\nerror: cannot write b\n", 2, "exit code 2"),
    ("error: cannot write a\nloop is closed\n", 2, "not in one last line"),
    ("E1129 18:00:01.0 1 tasks.cc:1] loop\nerror: cannot write a\n", 2, "exit code 2: E1129"),
    ("Traceback (most recent call last):\nfinished: run\n", 0, "exit code 0"),
    ("Killed\n", 1, "exit code 1"),
  ],
)
def test_a_refusal_is_one_line_and_code_2(tmp_path, text, code, words):
  workdir = tmp_path / "run"
  fault_runs.log_of(workdir).write_text(text)
  assert words in faults._refused(workdir, _ended(code)) and bool(words) == bool(
    faults._refused(workdir, _ended(code))
  )


def _ended(code: int) -> int:
  return os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {code}"], os.environ)


# Other tests of this process may have started JAX's threads. The children do nothing that could wait for them.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore:.*use of fork")
def test_a_child_is_killed_and_its_log_is_kept(tmp_path):
  def body():
    os.write(1, b"begun\n")  # pytest has sys.stdout
    time.sleep(60)

  log = fault_runs.log_of(tmp_path / "run")
  log.touch()
  child = fault_runs.fork(body, log)
  while not log.read_text():
    assert fault_runs.wait(child, 0.01) is None
  fault_runs.end_with(child)
  assert fault_runs.last_line(tmp_path / "run") == "begun"
  for code in (0, 3):
    assert fault_runs.wait(fault_runs.fork(lambda code=code: sys.exit(code), log), 60) == code


def test_the_runs_config_has_all_stages():
  from instructjax.core.config import from_config_dict
  from instructjax.stages import lineage

  stages = lineage.plan(from_config_dict(fault_runs.get_config(fault_runs.STAGE)))
  assert {"pretrain", "sft", "collect", "rm", "ppo", "ppo_ptx", "evaluate"} <= set(stages)
