"""metrics.jsonl across resumes, what the terminal shows."""

import io
import json
import resource

import pytest
import rich.console

from instructjax.core.errors import UserError
from instructjax.train import metrics
from instructjax.train.metrics import Display, MetricsWriter, read_metrics, sample_table


def _write(directory, steps, *, start_step=0):
  writer = MetricsWriter(directory, start_step=start_step)
  for step in steps:
    writer.write(step, {"loss": step / 10})
  writer.close()


def _display(*, terminal: bool, start_step=0):
  console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=100)
  display = Display("ppo", num_steps=20, start_step=start_step, show=("kl",), console=console)
  return display, console.file


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
  _write(tmp_path, range(1, 8))
  _write(tmp_path, range(5, 7), start_step=4)
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_never_saved_starts_a_new_file(tmp_path):
  _write(tmp_path, range(0, 3))
  _write(tmp_path, [1])
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1}]


def test_what_was_done_again_is_added_up_over_several_stops(tmp_path):
  """The time of a dropped line is lost, and so is what that line had told of an earlier stop."""
  writer = MetricsWriter(tmp_path, start_step=0)
  for step in (1, 2):
    writer.write(step, {"seconds": 5.0})
  writer.close()
  writer = MetricsWriter(tmp_path, start_step=1)
  assert writer.dropped_seconds == 5.0
  lost = {"seconds/restore": 3.0, "seconds/redone": writer.dropped_seconds, "seconds/compile": 2.0}
  writer.write(2, {"seconds": 4.0, **lost})  # compiling is a part of the line's own time
  writer.close()
  writer = MetricsWriter(tmp_path, start_step=1)
  writer.close()
  assert writer.dropped_seconds == 5.0 + 3.0 + 4.0


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
  _write(tmp_path, [1, 2])
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 3, "lo')
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
  _write(tmp_path, [3], start_step=2)
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


JUNK = {
  "half a line": b'{"step": 2, "lo\n',
  "zeros": bytes(40) + b"\n",
  "no UTF-8": b"\xff\xfe\n",
  "empty": b"\n",
  "no object": b"[1, 2]\n5\nnull\n",
  "without a step": b'{"loss": 1.0}\n',
  "another step": b'{"step": "2", "loss": 1.0}\n{"step": true}\n{"step": 2.0}\n{"step": -2}\n',
  "no number": b'{"step": 2, "loss": "1.0"}\n{"step": 2, "loss": null}\n{"step": 2, "loss": [1]}\n',
  "not finite": b'{"step": 2, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 2, "loss": 1e999}\n',
  "too large": b'{"step": 2, "loss": 1'
  + b"0" * 4000
  + b"}\n"
  + b'{"step": 1'
  + b"0" * 5000
  + b"}\n",
  "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_lines_that_are_no_records_never_block_a_resume(tmp_path, capsys, junk):
  _write(tmp_path, [1, 2, 3])
  path = tmp_path / "metrics.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(lines[0] + junk + b"".join(lines[1:]))
  expected = [{"step": step, "loss": step / 10} for step in (1, 2, 3)]
  assert read_metrics(tmp_path) == expected
  assert capsys.readouterr().err == ""  # a report that reads the file says nothing
  _write(tmp_path, [4], start_step=3)
  assert read_metrics(tmp_path) == [*expected, {"step": 4, "loss": 0.4}]
  (line,) = capsys.readouterr().err.splitlines()
  count = junk.count(b"\n")
  assert f"{path}: {count} line" in line and "moved to metrics.junk" in line
  assert (tmp_path / "metrics.junk").read_bytes() == junk
  _write(tmp_path, [5], start_step=4)  # once is enough
  assert capsys.readouterr().err == ""


def test_a_full_disk_is_one_line(tmp_path, capfd):
  writer = MetricsWriter(tmp_path, start_step=0)
  writer.write(1, {"loss": 0.5})
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = (tmp_path / "metrics.jsonl").stat().st_size
  # No file may grow by more than a few bytes, the smallest of all being the one that is asked first.
  resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))
  try:
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/metrics.jsonl: .*File too large"):
      writer.write(2, {"loss": 0.5})
    writer.close()  # does not fail again
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert capfd.readouterr().err == ""
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
  _write(tmp_path, [2], start_step=1)  # half a line is left, and makes no junk
  assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
  assert capfd.readouterr().err == ""


def test_step_comes_first_and_files_are_strict_json(tmp_path):
  _write(tmp_path, [1])
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.1}\n'
  writer = MetricsWriter(tmp_path, start_step=0)
  with pytest.raises(ValueError, match="not JSON compliant"):
    writer.write(1, {"loss": float("nan")})
  writer.close()


def test_plain_lines_at_log_steps():
  display, output = _display(terminal=False)
  display.start()
  display.step(9, {"loss": 1.0, "kl": 0.123456}, log=False)
  display.step(10, {"loss": 1.0, "kl": 0.123456}, log=True)
  display.samples(10, [{"prompt": "Say [bold]hi", "answer": "two\nlines", "score": 1.5}])
  display.stop()
  line, sample = output.getvalue().splitlines()
  assert line.startswith("ppo 10/20  kl 0.1235  ") and line.endswith("steps/s")
  assert "loss" not in line
  assert sample == "ppo step 10  prompt: Say [bold]hi  answer: two lines  score: 1.5"


def test_terminal_bar_and_table():
  display, output = _display(terminal=True, start_step=5)
  display.start()
  display.step(20, {"kl": 0.25}, log=True)
  display.samples(20, [{"prompt": "Say [bold]hi", "answer": "[/red] ok", "score": 1.5, "kl": 2.0}])
  display.stop()
  text = output.getvalue()
  for part in (
    "going on after step 5",
    "20/20",
    "kl 0.25",
    "steps/s",
    "[bold]hi",
    "[/red] ok",
    "1.5",
  ):
    assert part in text


def test_silence():
  display = Display("ppo", num_steps=2, start_step=0, show=(), console=None)
  display.start()
  display.step(1, {"kl": 0.0}, log=True)
  display.samples(1, [{"prompt": "a"}])
  display.stop()


def test_sample_table_has_a_column_a_key():
  table = sample_table([{"prompt": "a", "score": 1.0}, {"prompt": "b", "score": 2.0}], "ppo step 1")
  assert (table.columns, table.prose) == (["prompt", "score"], ["prompt"])
  assert table.rows == [["a", "1"], ["b", "2"]]


def test_first_metrics_are_shown_when_none_are_named():
  console = rich.console.Console(file=io.StringIO(), width=100)
  display = Display("rm", num_steps=2, start_step=0, show=(), console=console)
  display.step(1, {name: 1.0 for name in "abcdef"}, log=True)
  assert console.file.getvalue().startswith("rm 1/2  a 1  b 1  c 1  d 1  ")
  assert "e 1" not in console.file.getvalue()


def test_the_rate_is_of_the_steps_since_the_start_hand_worked(monkeypatch):
  """Six steps in two seconds; what an earlier run did counts for nothing."""
  clock = iter([100.0, 102.0])
  monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
  display, output = _display(terminal=False, start_step=4)
  display.step(10, {"kl": 1.0}, log=True)
  assert output.getvalue().endswith("  3 steps/s\n")


def test_records_survive_a_round_trip(tmp_path):
  _write(tmp_path, [1, 2])
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == read_metrics(tmp_path)
