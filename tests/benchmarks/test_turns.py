"""Programs measured in turn: what is said of their runs, and of one that ends or prints something else."""

import pathlib
import sys
import textwrap

import pytest

from benchmarks import turns
from instructjax.core.errors import UserError

PEERS = pathlib.Path(turns.__file__).parent / "peers"


def worker(source: str) -> list[str]:
  """A command that runs these lines; `turns` counts its repetitions from 1."""
  serve = f"""
    import itertools, os, sys
    sys.path.insert(0, {str(PEERS)!r})  # as a peer's script finds it
    import worker
    turns = itertools.count(1)
  """
  return [sys.executable, "-c", textwrap.dedent(serve) + textwrap.dedent(source)]


def test_medians_and_ranges_by_hand():
  runs = [
    {"wall_s": wall, "cpu_s": 2 * wall, "peak_rss_gb": wall / 10, "tokens": tokens}
    | {"phases": {"rollout": wall / 2}, "other_load": 0.126}
    for wall, tokens in ((4.0, 7), (1.0, 12), (2.0, 8))
  ]
  assert turns.summarize({"parameters": 4}, runs) == {
    "description": {"parameters": 4},
    "wall_s": {"median": 2.0, "min": 1.0, "max": 4.0},
    "cpu_s": {"median": 4.0, "min": 2.0, "max": 8.0},
    "peak_rss_gb": 0.4,
    "tokens": 8,
    "phases": {"rollout": 1.0},
    "other_load": [0.13, 0.13, 0.13],
  }


def test_busy_time_counts_neither_idle_nor_waiting(monkeypatch, tmp_path):
  stat = tmp_path / "stat"
  stat.write_text("cpu  100 200 300 9999 8888 400 500 600 77 7\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
  monkeypatch.setattr(turns, "_STAT", stat)
  monkeypatch.setattr(turns.os, "sysconf", lambda name: 100)
  assert turns.busy_seconds() == 21.0  # 100 + 200 + 300 + 400 + 500 + 600 ticks


def test_load_is_what_others_used(monkeypatch):
  """The machine was busy for 3 s of 2 s on several cores, of which the worker had 1."""
  busy, clock = iter([10.0, 13.0]), iter([0.0, 2.0])
  monkeypatch.setattr(turns, "busy_seconds", lambda: next(busy))
  monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
  answer = 'print(\'{"ready": {}}\', flush=True)\ninput()\nprint(\'{"wall_s": 2, "cpu_s": 1}\')'
  found = turns.measure({"one": worker(answer)}, repeats=1)
  assert found["one"]["other_load"] == [1.0]


def test_workers_run_in_turn_and_may_print(tmp_path):
  order = tmp_path / "order"
  source = """
    def once():
      print("a library's remark")
      os.system("echo another's")
      open({order!r}, "a").write({name!r})
      return {{"tokens": next(turns)}}
    worker.claim_stdout()
    print("loading")
    worker.serve(once, {{"name": {name!r}}})
  """
  commands = {name: worker(source.format(name=name, order=str(order))) for name in "ab"}
  found = turns.measure(commands, repeats=3)
  assert order.read_text() == "ababab"
  assert [found[name]["description"] for name in "ab"] == [{"name": "a"}, {"name": "b"}]
  assert [found[name]["tokens"] for name in "ab"] == [2, 2]
  assert all(len(found[name]["other_load"]) == 3 for name in "ab")
  assert all(0 < found[name]["peak_rss_gb"] < 1 for name in "ab")


def test_children_count_as_the_worker():
  source = """
    def once():
      spin = "import time\\nwhile time.process_time() < .3: pass"
      os.spawnl(os.P_WAIT, sys.executable, "python", "-c", spin)
      return {}
    worker.serve(once, {})
  """
  found = turns.measure({"one": worker(source)}, repeats=1)
  assert found["one"]["cpu_s"]["median"] >= 0.3


@pytest.mark.parametrize("when", ["worker.serve(lambda: 1 / 0, {})", "1 / 0"], ids=["run", "start"])
def test_a_worker_that_ends_is_named_with_what_it_said_last(when):
  with pytest.raises(UserError, match="^the peer ended with 1: .*ZeroDivisionError") as caught:
    turns.measure({"the peer": worker(when)}, repeats=1)
  assert "\n" not in str(caught.value)


def test_what_is_no_json_is_refused():
  with pytest.raises(UserError, match="the peer printed 'hello' on stdout"):
    turns.measure({"the peer": worker("print('hello')")}, repeats=1)
