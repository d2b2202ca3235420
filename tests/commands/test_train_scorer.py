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


def test_a_given_model_is_trained_by_adapters_and_fewer_passes(command, tmp_path):
  lines = lambda: (tmp_path / "out" / "data" / "comparisons.jsonl").read_text().splitlines()
  words = command()
  assert "--config=rm" in words and "--config.reward_model.num_layers=2" in words
  eight = lines()
  words = command("--weights=package:a/b.gguf")
  assert "--config=rm:weights" in words and "--config.adapter.rank=16" in words
  assert "--config.reward_model.weights=package:a/b.gguf" in words
  # The shape is the file's.
  assert not [
    word for word in words if word.startswith(("--config.model.", "--config.reward_model.num"))
  ]
  two = lines()
  assert len(two) < len(eight) / 3
  command("--passes=2")
  assert lines() == two
  command("--weights=package:a/b.gguf", "--passes=8")
  assert lines() == eight


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
