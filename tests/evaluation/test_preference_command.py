"""What the command that judges answers does: reading them, judges of each kind, and what is refused."""

import json
import pathlib

import pytest

from instructjax.core.errors import UserError
from instructjax.data import demo
from instructjax.data.controls import Rendered
from instructjax.evaluation import preference_command


def longest(pairs):
  return [len(answer) for _, answer in pairs]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def run(answers, judges, out, **changes):
  settings = {"baseline": "", "bootstrap": 20, "seed": 0} | changes
  preference_command.run(answers, judges, settings.pop("baseline"), out=str(out), **settings)
  return json.loads((out / "preference.json").read_text())


def test_answers_of_a_run_are_judged_by_gold_by_labelers_and_by_people(tmp_path, capsys):
  prompts = [record.prompt for record in demo.load("prompts", "test", 0)][:3]
  answers = [{"sft": "a word.", "ppo": f"{prompt.strip()} the lord is good."} for prompt in prompts]
  folder = tmp_path / "run" / "evaluate"
  folder.mkdir(parents=True)
  write(folder / "answers.jsonl", [{"prompt": p, "answers": a} for p, a in zip(prompts, answers)])
  ranked = [{"prompt": prompts[0], "responses": list(answers[0].values()), "ranks": [2, 1]}]
  people = write(
    tmp_path / "people.jsonl", [*ranked, {"prompt": "x", "responses": ["a", "b"], "ranks": [1, 2]}]
  )
  judges = ["gold=demo:", "labelers=demo:", f"people={people}"]
  found = run(str(tmp_path / "run"), judges, tmp_path / "out")
  gold = demo.gold_score(prompts, [row["ppo"] for row in answers])
  base = demo.gold_score(prompts, [row["sft"] for row in answers])
  assert found["wins"]["gold=demo:"]["ppo"]["sft"]["wins"] == float((gold > base).mean())
  assert found["wins"]["labelers=demo:"]["ppo"]["sft"]["judged"] == 3
  assert found["wins"][f"people={people}"]["ppo"]["sft"]["win_rate"][0] == 1.0
  assert found["wins"][f"people={people}"]["ppo"]["sft"]["judged"] == 1
  printed = capsys.readouterr().out
  assert (
    "1 of 2 rankings are of no two of the answers" in printed and "judged by gold=demo:" in printed
  )


def test_what_a_chat_template_made_stays_so(tmp_path):
  """Its control tokens are text in any other prompt, and a reward model would read them letter by letter."""
  rows = [{"prompt": "<s>p", "is_rendered": True, "answers": {"a": "1", "b": "2"}}]
  rows += [{"prompt": "q", "answers": {"a": "1", "b": "2"}}]
  found, _ = preference_command.read_answers(pathlib.Path(write(tmp_path / "a.jsonl", rows)))
  assert [isinstance(prompt, Rendered) for prompt in found.prompt_N] == [True, False]
  assert found.prompt_N == ["<s>p", "q"]


def test_a_file_of_single_answers_with_what_labelers_noted(tmp_path):
  rows = [
    {
      "prompt": "p",
      "model": "a",
      "answer": "xx",
      "metadata": {"likert": 6, "hallucination": False},
    },
    {"prompt": "p", "model": "b", "answer": "x", "metadata": {"likert": 3, "hallucination": True}},
    {"prompt": "q", "model": "b", "answer": "xxx"},
    {"prompt": "q", "model": "a", "answer": "x"},
  ]
  path = write(tmp_path / "answers.jsonl", rows)
  judge = f"judge=python:{__name__}:longest"
  found = run(path, [judge], tmp_path / "out")
  assert found["baseline"] == "a"
  row = found["wins"][judge]["b"]["a"]
  assert row["win_rate"][0] == 0.5 and row["longer"][0] == 0.5
  assert (
    found["metadata"]["a"]["likert"][0] == 6 and found["metadata"]["b"]["hallucination"][0] == 1
  )


@pytest.mark.parametrize(
  ("rows", "judges", "message"),
  [
    ([], ["x=y"], "--judges=x=y must be rm=PATH"),
    ([], [], "--judges must name who judges"),
    ([{"prompt": "p"}], ["gold=demo:"], "answers.jsonl:1: must have prompt and answers"),
    (
      [{"prompt": "p", "model": "a", "answer": "x"}],
      ["gold=demo:"],
      "of 1 policies, and it takes two",
    ),
    (
      [
        {"prompt": "p", "answers": {"a": "x", "b": "y"}},
        {"prompt": "p", "model": "a", "answer": "x"},
      ],
      ["gold=demo:"],
      "p has answers of a 2, b 1",
    ),
    (
      [{"prompt": "p", "model": "a", "answer": "x", "metadata": {"likert": "good"}}],
      ["gold=demo:"],
      "metadata must be an object of finite numbers",
    ),
    (
      [{"prompt": "p", "model": "a", "answer": "x", "metadata": {"likert": float("nan")}}],
      ["gold=demo:"],
      "metadata must be an object of finite numbers",
    ),
    (
      [{"prompt": "p", "answers": {"a": "x", "b": "y"}}],
      ["people=demo:"],
      "--judges=people='demo:' must name rankings that lie somewhere",
    ),
    ([{"prompt": "p", "answers": {"a": "x", "b": "y"}}], ["gold=conversation:"], "must be demo:"),
    ([{"prompt": "p", "answers": {"a": "x", "b": "y"}}], ["gold=jsonl:x"], "must be demo:"),
  ],
)
def test_what_cannot_be_judged_is_refused_in_a_line(tmp_path, rows, judges, message):
  path = write(tmp_path / "answers.jsonl", rows)
  with pytest.raises(UserError) as error:
    run(path, judges, tmp_path / "out")
  assert message in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_in_a_quick_judge_is_told_before_a_slow_one_works(tmp_path):
  path = write(tmp_path / "answers.jsonl", [{"prompt": "p", "answers": {"a": "x", "b": "y"}}])
  with pytest.raises(UserError, match="absent.jsonl cannot be read"):
    run(path, ["rm=/no/model", "people=absent.jsonl"], tmp_path / "out")


def test_people_who_ranked_other_answers_and_an_unknown_baseline_are_refused(tmp_path):
  path = write(tmp_path / "answers.jsonl", [{"prompt": "p", "answers": {"a": "x", "b": "y"}}])
  people = write(
    tmp_path / "people.jsonl", [{"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2]}]
  )
  with pytest.raises(UserError, match="no ranking is of two of the answers"):
    run(path, [f"people={people}"], tmp_path / "out")
  with pytest.raises(UserError, match="--baseline=c must be one of a, b"):
    run(path, [f"people={people}"], tmp_path / "out", baseline="c")


def test_an_answer_may_hold_what_ends_lines_elsewhere(tmp_path):
  rows = [{"prompt": "p", "answers": {"a": "x\u2028y", "b": "x\x85"}}]
  path = tmp_path / "answers.jsonl"
  path.write_text(json.dumps(rows[0], ensure_ascii=False) + "\r\n", encoding="utf-8")
  found, _ = preference_command.read_answers(path)
  assert found.answers == {"a": ["x\u2028y"], "b": ["x\x85"]}


def test_a_policy_that_says_nothing_is_compared_too(tmp_path):
  path = write(tmp_path / "answers.jsonl", [{"prompt": "p", "answers": {"a": "x y", "b": ""}}])
  found = run(path, [f"judge=python:{__name__}:longest"], tmp_path / "out")
  assert found["habits"]["b"]["frequent"] is None and found["habits"]["a"]["frequent"] == 1.0
