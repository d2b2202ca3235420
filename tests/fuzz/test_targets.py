"""A few inputs of each target, of the many that the fuzz command tries; and that the command notices what it must."""

import argparse
import itertools
import random
import subprocess
import time

import pytest

from instructjax.core.errors import UserError
from tests.fuzz import mutants, stand_in, targets, worker
from tests.fuzz.__main__ import COLUMNS, Findings, _excess, _Worker, campaign, tasks
from tests.fuzz.worker import ACCEPTED, EXCEPTION, REFUSED, Outcome

# Others run elsewhere: data in data/test_sources.py, weights in models/interop/test_interop.py.
NUMBERS = {
  **{"tokenizers": 80, "templates": 40, "commands": 60, "done": 12, "checkpoints": 30},
  **{"metrics": 40, "checksums": 10, "tokens": 15, "programs": 10},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_inputs_are_accepted_or_refused_in_one_line(name, tmp_path):
  cases = targets.TARGETS[name].cases(random.Random(0))
  for number, (what, files) in enumerate(itertools.islice(cases, NUMBERS[name])):
    folder = tmp_path / str(number)
    folder.mkdir()
    mutants.write(folder, files)
    try:
      targets.TARGETS[name].run(folder)
    except UserError as error:
      assert not mutants.bad_message(error, folder), what
    except BaseException as error:
      raise AssertionError(f"input {number} of {name}: {what}") from error


def test_every_target_is_tried_in_the_suite():
  assert targets.TARGETS.keys() - NUMBERS.keys() == {"data", "weights"}


def _raise(error):
  raise error


@pytest.mark.parametrize(
  "run, kind, what",
  [
    (lambda folder: None, ACCEPTED, ""),
    (lambda folder: _raise(UserError(f"no such file: {folder}")), REFUSED, ""),
    (lambda folder: _raise(UserError("x" * 1300)), EXCEPTION, "a message of 1300 characters"),
    (lambda folder: _raise(UserError("")), EXCEPTION, "a message of 0 characters"),
    (lambda folder: _raise(UserError("a\nb")), EXCEPTION, "a message that is not printable"),
    (lambda folder: _raise(UserError("\u202e")), EXCEPTION, "a message that is not printable"),
    (lambda folder: _raise(KeyError("x")), EXCEPTION, "KeyError: \"'x'\""),
    (lambda folder: _raise(SystemExit(1)), EXCEPTION, "SystemExit: '1'"),
  ],
)
def test_anything_but_a_refusal_in_one_line_is_a_finding(run, kind, what, tmp_path):
  outcome = worker.attempt(run, tmp_path)
  assert outcome.kind == kind and outcome.what.startswith(what)
  assert bool(outcome.what) == (kind == EXCEPTION)


def test_time_and_memory_of_an_input(tmp_path):
  def run(folder):
    block = bytearray(80_000_000)
    block[:] = b"x" * len(block)
    began = time.process_time()
    while time.process_time() - began < 0.05:
      pass

  outcome = worker.attempt(run, tmp_path)
  assert 0.05 <= outcome.seconds < 5 and 80e6 < outcome.bytes < 400e6


@pytest.mark.parametrize(
  "outcome, kinds",
  [
    (Outcome(ACCEPTED, seconds=4.9, bytes=10**9), {ACCEPTED}),
    (Outcome(ACCEPTED, seconds=5.1), {ACCEPTED, "over time"}),
    (Outcome(REFUSED, bytes=10**9 + 1), {REFUSED, "over memory"}),
    (Outcome(EXCEPTION, "KeyError: x", "a.py:1", 6, 2 * 10**9), {EXCEPTION, *COLUMNS[3:5]}),
  ],
)
def test_findings_are_counted_printed_and_saved(outcome, kinds, tmp_path, capsys):
  found = Findings(tmp_path, 5.0, 1.0)
  found.add("done", 0, 7, outcome)
  assert {kind for (_, kind), count in found.counts.items() if count == 1} == kinds
  is_finding = kinds - {ACCEPTED, REFUSED}
  assert len(capsys.readouterr().out.splitlines()) == len(is_finding)
  assert (tmp_path / "done-0-7").exists() == bool(is_finding)
  assert found.table(["done"]).splitlines()[1].split()[:2] == ["done", "1"]


def test_all_inputs_are_tried_once():
  numbers = {}
  for name, _, some in tasks(1234, 0, [*targets.TARGETS]):
    numbers.setdefault(name, []).extend(some)
  assert sum(map(len, numbers.values())) == 1234
  assert all(sorted(each) == list(range(len(each))) for each in numbers.values())


def test_an_input_that_ends_or_holds_up_its_process_is_a_finding(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(worker, "serve", stand_in.serve)
  options = argparse.Namespace(
    inputs=6, seed=0, jobs=1, seconds=0.3, gigabytes=1.0, findings=str(tmp_path)
  )
  found = Findings(tmp_path, options.seconds, options.gigabytes)
  campaign(options, ["metrics"], found)
  assert found.counts["metrics", REFUSED] == 4
  assert found.counts["metrics", "process ended"] == found.counts["metrics", "over time"] == 1
  assert found.table(["metrics"]).splitlines()[1].split()[:2] == ["metrics", "6"]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics-0-1", "metrics-0-3"]
  assert "process ended: exit code 9 at" in capsys.readouterr().out


def test_a_process_that_waits_without_end_is_noticed():
  with subprocess.Popen(["sleep", "100"]) as process:
    one = _Worker(process, None, resident=1, task=("done", 0, range(1)))
    one.since = (time.monotonic(), 0.0)
    assert _excess(one, 5.0, 1.0) is None
    one.since = (time.monotonic() - 61, 0.0)
    deadline = time.monotonic() + 60
    # While it starts it works now and then, so one look is not enough. The command looks again and again too.
    while not (excess := _excess(one, 5.0, 1.0)) and time.monotonic() < deadline:
      time.sleep(0.01)
    assert excess.kind == "over time"
    one.since = (time.monotonic(), -11.0)
    assert _excess(one, 5.0, 1.0).kind == "over time"
    one.since, one.resident = (time.monotonic(), 0.0), -4_000_000_000
    assert _excess(one, 5.0, 1.0).kind == "over memory"
    process.kill()
