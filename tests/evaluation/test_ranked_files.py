"""Ranked answers from files to scored items; rows that are none are refused with file and line."""

import json
import types

import pytest

from instructjax.core.errors import UserError
from instructjax.data.records import Ranking
from instructjax.evaluation import ranked_files


def tokenizer(has_template=False):
  render_all = lambda chats: (f"<{chat[0]['content']}>" for chat in chats)
  return types.SimpleNamespace(
    chats=types.SimpleNamespace(render_all=render_all, has_template=has_template)
  )


def score(pairs):
  return [float(len(prompt + answer)) for prompt, answer in pairs]


def test_rankings_get_the_scores_of_their_own_answers(tmp_path):
  path = tmp_path / "pairs.jsonl"
  rows = [
    {"prompt": "ab", "chosen": "xyz", "rejected": "x", "labeler": "ann"},
    {"prompt": "a", "responses": ["x", "xx", "xxx"], "ranks": [2, 1, 2]},
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  items = ranked_files.scored(ranked_files.rankings(str(path), "--data"), tokenizer(), score)
  assert [list(item.scores) for item in items] == [[5, 3], [2, 3, 4]]
  assert [list(item.ranks) for item in items] == [[1, 2], [2, 1, 2]]
  assert [item.labeler for item in items] == ["ann", None]
  ranked_files.write_scores(tmp_path / "out.jsonl", items)
  (first, _) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
  assert first == {
    "prompt": "ab",
    "responses": ["xyz", "x"],
    "ranks": [1, 2],
    "labeler": "ann",
    "scores": [5, 3],
  }


def test_a_score_that_is_no_number_is_refused():
  with pytest.raises(UserError, match="the score of answer x to p is nan, and must be a finite"):
    ranked_files.scored([Ranking("p", ("x",), (1,))], tokenizer(), lambda pairs: [float("nan")])


def test_rows_of_rewardbench_go_through_the_chat_template_if_there_is_one(tmp_path):
  path = tmp_path / "rb2.jsonl"
  row = {
    "id": "7",
    "subset": "Math",
    "prompt": "q",
    "chosen": ["yes"],
    "rejected": ["no", "n", "?"],
  }
  path.write_text(json.dumps(row) + "\n")
  rows = ranked_files.rewardbench_rows(path)
  (plain,) = ranked_files.scored_entries(rows, tokenizer(), score)
  assert (plain.id, plain.subset, plain.num_correct, list(plain.scores)) == (
    "7",
    "Math",
    1,
    [4, 3, 2, 2],
  )
  (chat,) = ranked_files.scored_entries(rows, tokenizer(True), score)
  assert list(chat.scores) == [6, 5, 4, 4]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"id": 1}', ":1: must have id, prompt and subset as texts"),
    ('{"id": "a", "prompt": "p", "subset": "s", "chosen": [], "rejected": ["x"]}', ":1: must have"),
    (
      '{"id": "a", "prompt": "p", "subset": "Ties", "chosen": ["x"], "rejected": ["x"]}',
      "must be ref:NUMBER",
    ),
    ("[", ":1"),
    ("", "has no rows"),
  ],
)
def test_other_rows_are_refused(tmp_path, line, message):
  path = tmp_path / "rb2.jsonl"
  path.write_text(line + "\n")
  with pytest.raises(UserError, match=message) as error:
    ranked_files.rewardbench_rows(path)
  assert "\n" not in str(error.value)
