"""What the command that measures reward models does, with a small model."""

import json

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import language_model, rewards_command
from tests.evaluation import small_models


def run(**values):
  settings = {"models": [], "data": [], "out": "", "bootstrap": 10, "seed": 0}
  rewards_command.run(**(settings | values))


def test_mistakes_are_named_before_anything_is_opened(tmp_path):
  for values, message in (
    ({}, "--models must have a value, as in rm=runs/demo/rm"),
    ({"models": ["a=x", "a=y"]}, "names a twice"),
    ({"models": ["rm=x"]}, "--data must name rankings"),
    ({"models": ["rm=x"], "data": ["f.jsonl", "f.jsonl"]}, "--data names a source twice"),
    ({"models": ["rm=x"], "data": ["f.jsonl"]}, "--out must have a value"),
    (
      {"models": ["rm=x"], "data": ["none.jsonl"], "out": str(tmp_path)},
      "none.jsonl cannot be read",
    ),
    (
      {"models": ["rm=x"], "data": ["demo:"], "out": str(tmp_path)},
      "--data='demo:' must name rankings that lie somewhere",
    ),
    (
      {"models": ["rm=x"], "data": ["x"], "out": str(tmp_path)},
      "--data='x' must start with one of demo:",
    ),
  ):
    with pytest.raises(UserError, match=message):
      run(**values)


def test_a_model_is_measured_on_rankings_and_on_rewardbench(tmp_path, monkeypatch, capsys):
  model = small_models.language_model(tmp_path, head="scalar")
  monkeypatch.setattr(language_model, "open_reward_model", lambda path, mesh: model)
  (tmp_path / "pairs.jsonl").write_text(
    "".join(
      json.dumps(
        {"prompt": f"the cat {word}", "chosen": "sat on", "rejected": "a sea", "labeler": who}
      )
      + "\n"
      for word in ("sat", "saw")
      for who in ("ann", "bob")
    )
  )
  row = {
    "id": "7",
    "subset": "Math",
    "prompt": "who",
    "chosen": ["sea"],
    "rejected": ["on", "at", "a"],
  }
  (tmp_path / "rb2.jsonl").write_text(json.dumps(row) + "\n")
  run(
    models=["rm=somewhere"],
    data=[f"jsonl:{tmp_path / 'pairs.jsonl'}", f"rewardbench2:{tmp_path / 'rb2.jsonl'}"],
    out=str(tmp_path / "out"),
    bootstrap=20,
  )
  pairs, bench = json.loads((tmp_path / "out" / "rewards.json").read_text())["rm"].values()
  rows = [
    json.loads(line) for line in (tmp_path / "out" / "scores-rm-1.jsonl").read_text().splitlines()
  ]
  right = [row["scores"][0] > row["scores"][1] for row in rows]
  assert pairs["all"]["accuracy"][0] == sum(right) / 4 and pairs["agreement"][0] == 1.0
  expected = language_model.rewards(model, [("the cat sat", "sat on"), ("the cat sat", "a sea")])
  assert rows[0]["scores"] == pytest.approx(expected, abs=1e-5)
  assert set(bench["rewardbench2"]) == {"Math", "mean"}
  printed = capsys.readouterr().out
  assert "labeler ann" in printed and "RewardBench 2" in printed
