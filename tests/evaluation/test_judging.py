"""Answers are scored by other models, and again only by other scorers."""

import json

import pytest

from instructjax.core.errors import UserError
from instructjax.evaluation import journal, judging, rows, runner, tasks
from instructjax.evaluation.scorers import Scorer
from tests.evaluation.fake import Fake

SETTINGS = runner.Settings({"truthful_qa": ("qa",)}, None, 0, False, "float32")


@pytest.fixture
def planned(tmp_path):
  folder = tmp_path / "data" / "truthful_qa"
  folder.mkdir(parents=True)
  lines = [
    {"question": f"why {i}?", "correct_answers": ["a"], "incorrect_answers": ["b"]}
    for i in range(2)
  ]
  (folder / "TruthfulQA.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  found, _ = runner.plan(
    tasks.found(), rows.Data((str(tmp_path / "data"),), {}, False), SETTINGS, tmp_path / "out"
  )
  runner.answer_all([Fake().model("sft")], found, SETTINGS, tmp_path / "out", lambda *args: None)
  return found


def judge(planned, out, specs, calls, value=0.75, models=("sft",)):
  def load(spec):
    calls.append(spec)
    return Scorer(spec, 0.9, lambda items: [value if "0" in asked else 0.25 for asked, _ in items])

  judges = {name: judging.Judge(spec, load) for name, spec in specs.items()}
  return judging.judge_all(models, planned, judges, out, lambda line: None)


def samples(planned, out):
  files = journal.part(out, "sft", "truthful_qa", "qa")
  return journal.read_samples(files, 2, "sft")


def test_answers_are_judged_once(planned, tmp_path):
  out, calls = tmp_path / "out", []
  assert judge(planned, out, {"truth": "a"}, calls) == {}  # the task needs both
  used = judge(planned, out, {"truth": "a", "info": "b"}, calls)
  assert used == {"truth": {"name": "a", "auc": 0.9}, "info": {"name": "b", "auc": 0.9}}
  assert calls == ["a", "b"]
  first, second = samples(planned, out)
  assert first["answer"] == "nothing" and first["judged"] == {"truth": 0.75, "info": 0.75}
  assert first["scores"] == {"true": 1, "info": 1, "true_info": 1}
  assert second["scores"] == {"true": 0, "info": 0, "true_info": 0}
  assert judge(planned, out, {"truth": "a", "info": "b"}, calls) == used
  assert calls == ["a", "b"]
  # The models' answers stay what they were made with, and another scorer reads them again.
  journal.require_same(
    journal.part(out, "sft", "truthful_qa", "qa"),
    {"model": "1", **planned[0].made_with},
    redo=False,
    title="sft",
  )
  # Without scorers the numbers stay, and it is said whose they are.
  assert judge(planned, out, {}, calls) == used and calls == ["a", "b"]
  judge(planned, out, {"truth": "c", "info": "b"}, calls, value=0.25)
  assert calls == ["a", "b", "c", "b"] and samples(planned, out)[0]["scores"]["true"] == 0


def test_numbers_of_two_scorers_are_not_laid_side_by_side(planned, tmp_path):
  out = tmp_path / "out"
  runner.answer_all([Fake().model("ppo")], planned, SETTINGS, out, lambda *args: None)
  both = ("sft", "ppo")
  judge(planned, out, {"truth": "a", "info": "b"}, [], models=both)
  judge(planned, out, {"truth": "c", "info": "b"}, [], models=("ppo",))
  with pytest.raises(UserError, match="^ppo on truthful_qa/qa and sft on .* two scorers as truth"):
    judge(planned, out, {}, [], models=both)
  assert judge(planned, out, {"truth": "a", "info": "b"}, [], models=both)["truth"]["name"] == "a"


@pytest.mark.parametrize("spec", ["{}", "{}?label=toxic", "judge:{}?ask=True:"])
def test_a_scorer_that_was_trained_anew_is_another(tmp_path, spec):
  path = tmp_path / "judge"
  path.mkdir()
  (path / "weights").write_text("1")
  judge = judging.Judge(spec.format(path), Scorer)
  before = judge.identity
  assert judging.Judge(spec.format(path), Scorer).identity == before
  (path / "weights").write_text("12")
  assert judge.identity != before


def test_a_function_that_was_mended_is_another(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  path = tmp_path / "mended_scorer.py"
  path.write_text("f = lambda items: [.9] * len(items)\n")
  judge = judging.Judge("python:mended_scorer:f", Scorer)
  before = judge.identity
  assert judge.identity == before
  path.write_text("f = lambda items: [.1] * len(items)\n")
  assert judge.identity != before


def test_one_of_two_scorers_is_refused(planned, tmp_path):
  with pytest.raises(UserError, match="truthful_qa is judged as truth and as info, .* has no info"):
    judging.require_all(planned, {"truth": "a"})
  judging.require_all(planned, {})
  judging.require_all(planned, {"truth": "a", "info": "b", "toxicity": "c"})


def test_numbers_that_are_no_probabilities_are_refused(planned, tmp_path):
  with pytest.raises(UserError, match="scorer a must give probabilities from 0 to 1 .* as truth"):
    judge(planned, tmp_path / "out", {"truth": "a", "info": "a"}, [], value=7.5)
