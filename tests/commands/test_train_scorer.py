"""The command that trains scorers: what it asks of the run, and its mistakes. The parts have tests of their own."""

import subprocess
import types

import pytest
from absl import flags

from instructjax.core.errors import UserError
from tests import own_flags
from tests.micro import write_lines


@pytest.fixture(scope="module")
def train_scorer():
  with own_flags.command("instructjax.commands.train_scorer") as module:
    yield module


@pytest.fixture
def command(train_scorer, tmp_path, monkeypatch):
  """Runs the command with flags; the run itself is replaced, and its command line returned."""
  asked = []

  def run(words):
    asked.append(words)
    return types.SimpleNamespace(returncode=run.code)

  run.code = 0
  monkeypatch.setattr(subprocess, "run", run)
  monkeypatch.setattr(train_scorer, "_measure", lambda *_: None)
  write_lines(tmp_path / "rows.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(90)])

  def one(*words, code=0, rest=()):
    run.code = code
    values = flags.FLAGS
    saved = {name: (values[name].value, values[name].present) for name in values}
    try:
      values(["", f"--data={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'out'}", *words])
      train_scorer.main([*rest])
    finally:
      for name, (value, present) in saved.items():
        values[name].value, values[name].present = value, present
    return asked[-1]

  return one


def test_the_run_gets_the_texts_and_what_stands_after_the_flags(command, tmp_path):
  words = command("--seed=3", rest=["--config.rm.batch_size=32"])
  assert f"--workdir={tmp_path / 'out' / 'run'}" in words
  assert "--config.seed=3" in words and words[-1] == "--config.rm.batch_size=32"
  for kind in ("documents", "comparisons", "demonstrations"):
    assert f"--config.data.{kind}=jsonl:{tmp_path / 'out' / 'data' / kind}.jsonl" in words
    assert (tmp_path / "out" / "data" / f"{kind}.jsonl").stat().st_size


@pytest.mark.parametrize(
  ("words", "code", "says"),
  [
    (["--label=label", "--label=b"], 0, "--text and --label go in pairs, got 1 and 2"),
    (["--passes=0"], 0, "--passes=0 must be at least 1"),
    (["--pair={question}"], 0, "must hold {prompt} and {answer} only"),
    (["--threshold=7"], 0, "part for train"),
    ([], 2, "ended with code 2"),
  ],
)
def test_mistakes(command, words, code, says):
  with pytest.raises(UserError, match=says):
    command(*words, code=code)
