"""Registering a run's reward models: only with the project that they learned from, with what was measured."""

import dataclasses
import types

import pytest

from instructjax.commands import label_training
from instructjax.core.errors import UserError
from instructjax.core.provenance import Source
from instructjax.labels import trainings
from instructjax.train import finished
from tests.labels import app


def done(spec, round_="a"):
  judged = types.SimpleNamespace(accuracy=0.7, accuracy_stderr=0.02, pairs=50)
  made = types.SimpleNamespace(
    sources={"comparisons": Source(spec, "")} if spec else {},
    date="2026-01-02T03:04:05Z",
    seconds=5.0,
  )
  return types.SimpleNamespace(
    identity=round_ * 64,
    result=types.SimpleNamespace(validation=judged),
    require_provenance=lambda: made,
  )


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(stage -> spec of its comparisons, ...) -> lines of the registration."""
  database = app.make_project(tmp_path / "p", [app.item(wanted=2)])

  def one(**specs):
    found = {tmp_path / "run" / name: done(spec, name[-1]) for name, spec in specs.items()}
    monkeypatch.setattr(finished, "read_done", lambda folder: found.get(folder))
    return label_training.register(str(tmp_path / "p"), str(tmp_path / "run"), 1.0)

  return one, database, f"labels:{tmp_path}/p"


def test_each_reward_model_of_a_run(run):
  register, database, spec = run
  first, second = register(rm=f"{spec}?until=7", rm_2=f"{spec}/../p")
  assert first == (
    "run/rm: right on 0.700 of 50 held-out pairs (0.661 to 0.739); no item was ranked by two labelers; registered"
  )
  assert second.startswith("run/rm_2:")
  assert register(rm=spec)[0].endswith("registered before")
  with database.read() as connection:
    (one, _), _ = trainings.read(connection)
  assert dataclasses.astuple(one)[1:3] == ("run/rm", 0.7)
  assert one.at == 1767323045.0  # `date -u -d 2026-01-02T03:04:05Z +%s`


def test_not_of_another_project(run):
  register, _, spec = run
  for wrong, said in (
    (f"{spec}q", "was trained on labels:"),
    ("jsonl:a", "jsonl:a, not"),
    ("", "its own run"),
  ):
    with pytest.raises(UserError, match=said):
      register(rm=wrong)
  with pytest.raises(UserError, match="holds no finished reward model"):
    register()
