"""Tests of instructjax.stages.evaluate: which policies and prompts it judges, and what it leaves."""

import json
import types

import numpy as np
import pytest

from instructjax.stages import evaluate, measuring
from tests import micro
from tests.report import example


def test_prompts_are_the_first_of_the_test_split_that_fit():
  prompts = [types.SimpleNamespace(prompt=text) for text in ("x" * 37, "x" * 36, "a", "b")]
  ctx = types.SimpleNamespace(
    config=micro.config("ppo", {}, evaluate__num_prompts=2),
    tokenizer=types.SimpleNamespace(encode=list, bos_id=None),
    data=types.SimpleNamespace(
      records=lambda kind, split: {("prompts", "test"): prompts}[kind, split]
    ),
  )
  assert evaluate.test_prompts(ctx) == ["x" * 36, "a"]


def test_prompts_on_new_topics_are_judged_apart(monkeypatch):
  simulation = types.SimpleNamespace(is_new_topic=lambda prompt: prompt == "b")
  monkeypatch.setattr(evaluate.judging, "simulation", lambda ctx: simulation)
  monkeypatch.setattr(evaluate, "test_prompts", lambda ctx: ["a", "b", "c"])
  ctx = types.SimpleNamespace(config=micro.config("ppo", {}, evaluate__samples_per_prompt=2))
  asked = evaluate._prompts(ctx)
  assert asked.every == ["a", "a", "b", "b", "c", "c"]
  np.testing.assert_array_equal(asked.seen, [0, 1, 4, 5])
  np.testing.assert_array_equal(asked.new, [2, 3])
  assert asked.firsts == {"a": 0, "c": 2}


def test_best_of_n_is_compared_with_answers_to_its_own_prompts(monkeypatch):
  """Data may hold a prompt twice. Best-of-n asks it once, and the policies' answers after it lie further on."""
  prompts = ["a", "b", "a", "c"]
  monkeypatch.setattr(evaluate.judging, "simulation", lambda ctx: None)
  monkeypatch.setattr(evaluate, "test_prompts", lambda ctx: prompts)
  ctx = types.SimpleNamespace(config=micro.config("ppo", {}, evaluate__samples_per_prompt=2))
  firsts = evaluate._prompts(ctx).firsts
  assert firsts == {"a": 0, "b": 2, "c": 6}
  score_PN = np.array([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]])  # of a, b and c
  policy = types.SimpleNamespace(gold=np.array([1.0, 1, 2, 2, 1, 1, 9, 9]), kl=np.zeros(8))
  pool = evaluate.sampled_best.Pool(score_PN, score_PN)
  found = evaluate._best_at_kl(pool, [*firsts.values()], {"ppo": policy}, 2)
  np.testing.assert_array_equal(found["ppo"].wins_P, [0.5, 0.5, 0.5])


def test_there_are_no_examples_for_a_larger_base_that_there_is_not():
  """Where policy and reward model are given, no base is judged, with examples or without."""
  judged = lambda **changes: evaluate.judged_policies(
    types.SimpleNamespace(config=micro.config("ppo_ptx", {"prompts": "demo:"}, **changes))
  )
  assert judged() == ["base", "few_shot", "sft", "ppo_init", "ppo_ptx"]
  assert judged(model__weights="a")[:2] == ["base", "few_shot"]
  given = dict(sft__weights="a", ppo_init__weights="b", rm__weights="c")
  assert judged(**given) == ["sft", "ppo_init", "ppo_ptx"]
  assert judged(rm__weights="c", reward_model__d_mlp=48) == ["base", "sft", "ppo_init", "ppo_ptx"]


@pytest.mark.parametrize("names", [["base", "few_shot", "sft"], ["base", "sft"]])
def test_room_for_worked_examples_is_checked_if_they_are_judged(monkeypatch, names):
  checked = []
  monkeypatch.setattr(evaluate, "judged_policies", lambda ctx: names)
  monkeypatch.setattr(evaluate, "test_prompts", lambda ctx: "prompts")
  monkeypatch.setattr(measuring, "few_shot_prompts", lambda ctx, prompts: checked.append(prompts))
  evaluate.check("ctx", "evaluate")
  assert checked == (["prompts"] if "few_shot" in names else [])


def test_the_tables_at_the_end_have_a_cell_for_each_value():
  summary = {
    "base": {"gold": 1.0, "repeats": 0.5},
    "best_of_n/ppo": {"gold": 2.0, "kl": 1.0, "n": 6.0},
  }
  scores = evaluate._table(summary, evaluate._SCORES, "scores")
  assert scores.columns == ["answers of", "gold", "kl"]
  assert scores.rows == [["base", "1.000", ""], ["best_of_n/ppo", "2.000", "1.000"]]
  assert evaluate._table(summary, evaluate._HABITS, "habits").rows == [["base", "0.500"]]


def test_the_scores_of_each_answer_are_saved_beside_it(tmp_path):
  results = example.results()
  evaluate._write(tmp_path, results, {}, example.PROMPTS, results.measured, {})
  answers, scores = (
    [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    for name in ("answers.jsonl", "scores.jsonl")
  )
  assert [row["prompt"] for row in scores] == [row["prompt"] for row in answers]
  for i, row in enumerate(scores):
    assert row["scores"].keys() == answers[i]["answers"].keys()
    assert row["scores"]["ppo"]["gold"] == float(results.measured["ppo"].gold[i])
    assert ("kl" in row["scores"]["base"]) == (results.measured["base"].kl is not None)


def test_each_answer_of_a_checkpoint_is_saved_with_its_scores(tmp_path):
  found, path = example.with_checkpoints().checkpoints, tmp_path / "checkpoints.jsonl"
  evaluate._write_checkpoints(tmp_path, found, example.PROMPTS)
  rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  assert len(rows) == 3 * 2 * 24
  one = next(row for row in rows if (row["policy"], row["step"]) == ("ppo_ptx", 4))
  first = found["ppo_ptx"][4]
  assert one == {
    "policy": "ppo_ptx",
    "step": 4,
    "prompt": example.PROMPTS[0],
    "answer": first.answer[0],
    "scores": {name: float(getattr(first, name)[0]) for name in ("reward", "gold", "kl", "length")},
  }
  # An evaluation without checkpoints leaves none of an earlier one.
  evaluate._write_checkpoints(tmp_path, {}, example.PROMPTS)
  assert not path.exists()
