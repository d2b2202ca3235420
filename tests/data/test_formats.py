"""Which format a row has, and what becomes of it; docs/data.md has examples, which test_docs_data.py reads."""

import json
import math

import pytest

from instructjax.core.errors import UserError
from instructjax.data import formats, sources
from instructjax.data.messages import BadRecord
from instructjax.data.records import Chat, Demonstration, Prompt, Ranking

NONE = formats.Options(None, {}, {})
HERE = "a.jsonl:7"
CHAT = [{"role": "user", "content": "Hi."}]
SAYS = lambda text: [{"role": "assistant", "content": text}]
ASKED = Chat((("user", "Hi."),))


def load(folder, rows, kind, options="", on_bad_record="raise", split="all", scheme="jsonl"):
  path = folder / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return sources.load(
    f"{scheme}:{path}{options}",
    kind,
    split,
    seed=0,
    validation_fraction=0.5,
    on_bad_record=on_bad_record,
  )


@pytest.mark.parametrize(
  ("row", "name", "expected"),
  [
    ({"prompt": "p ", "completion": "c"}, "completion", Demonstration("p ", "c")),
    (
      {"instruction": "Add.", "input": "1 2\n", "output": "3", "text": "template"},
      "alpaca",
      Demonstration("Add.\n\n1 2\n\n", "3"),
    ),
    (
      {"instruction": "Sing.", "input": "", "output": "La"},
      "alpaca",
      Demonstration("Sing.\n\n", "La"),
    ),
    ({"instruction": "Sing.", "output": "La"}, "alpaca", Demonstration("Sing.\n\n", "La")),
    (
      {"instruction": "q", "context": "c", "response": "r", "category": "x"},
      "dolly",
      Demonstration("q\n\nc\n\n", "r"),
    ),
    (
      {
        "id": 3,
        "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}],
      },
      "sharegpt",
      Demonstration(ASKED, "Ho."),
    ),
    (
      {"system": "Be kind.", "conversations": [*CHAT, *SAYS("Ho.")]},
      "sharegpt",
      Demonstration(Chat((("system", "Be kind."), ("user", "Hi."))), "Ho."),
    ),
    (
      {"conversation": json.dumps([*CHAT, *SAYS("Ho.")])},
      "conversation",
      Demonstration(ASKED, "Ho."),
    ),
    ({"prompt": "p", "response": "r", "completion": "c"}, "own", Demonstration("p", "r")),
    ({"messages": [*CHAT, *SAYS("Ho.")], "conversations": []}, "own", Demonstration(ASKED, "Ho.")),
  ],
)
def test_formats_of_demonstrations(tmp_path, caplog, row, name, expected):
  assert formats.recognise(row, "demonstrations", HERE) == name
  assert load(tmp_path, [row, row], "demonstrations") == [expected] * 2
  said = [f"read as format {name} (keys: " in line for line in caplog.messages]
  assert said == ([] if name == "own" else [True])  # once, although there are two rows
  prompts = load(tmp_path, [row], "prompts", "?format=" + name) if name != "completion" else None
  assert prompts in (None, [Prompt(expected.prompt)])


CHOSEN = "\n\nHuman: Hi.\n\nAssistant:"


@pytest.mark.parametrize(
  ("row", "name", "expected"),
  [
    (
      {
        "context": CHAT,
        "completions": [
          {"rank": 1, "completion": SAYS("No.")},
          {"rank": 0, "completion": SAYS("Ho.")},
        ],
      },
      "nemo_rl",
      Ranking(ASKED, ("No.", "Ho."), (2, 1)),
    ),
    (
      {
        "instruction": "q",
        "completions": [{"response": "x", "overall_score": s} for s in (3.5, 8, 3.5)],
      },
      "ultrafeedback",
      Ranking("q", ("x", "x", "x"), (2, 1, 2)),
    ),
    (
      {
        "instruction": "q",
        "completions": [
          {"response": str(s), "overall_score": None, "fine-grained_score": s} for s in (1, 2)
        ],
      },
      "ultrafeedback",
      Ranking("q", ("1", "2"), (2, 1)),
    ),
    (
      {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2},
      "helpsteer2",
      Ranking("q", ("a", "b"), (1, 2)),
    ),
    (
      {"context": CHAT, "response1": "a", "response2": "b", "overall_preference": 0},
      "helpsteer3",
      Ranking(ASKED, ("a", "b"), (1, 1)),
    ),
    (
      {
        "input": {"messages": CHAT, "tools": []},
        "preferred_output": SAYS("a"),
        "non_preferred_output": SAYS("b"),
      },
      "openai",
      Ranking(ASKED, ("a", "b"), (1, 2)),
    ),
    (
      {"chosen": CHOSEN + " a", "rejected": CHOSEN + " b"},
      "hh",
      Ranking(CHOSEN, (" a", " b"), (1, 2)),
    ),
    (
      {"prompt": "q", "responses": ["a", "b"], "scores": [0.1, -math.pi]},
      "own",
      Ranking("q", ("a", "b"), (1, 2)),
    ),
  ],
)
def test_formats_of_comparisons(tmp_path, row, name, expected):
  assert formats.recognise(row, "comparisons", HERE) == name
  assert load(tmp_path, [row], "comparisons") == [expected]
  assert load(tmp_path, [row], "prompts") == [Prompt(expected.prompt)]


@pytest.mark.parametrize("score", ["helpfulness", "score"])
def test_one_answer_a_row_with_scores_becomes_a_ranking_a_prompt(tmp_path, caplog, score):
  rows = [
    {"prompt": prompt, "response": f"{prompt}{value}", score: value}
    for prompt, value in (("p", 3), ("q", 1), ("p", 4), ("alone", 2), ("q", 1.0), ("p", 0))
  ]
  assert load(tmp_path, rows, "comparisons") == [
    Ranking("p", ("p3", "p4", "p0"), (2, 1, 3)),
    Ranking("q", ("q1", "q1.0"), (1, 1)),
  ]
  assert (
    f"skipped 1 of 6 records: {tmp_path}/a.jsonl:4: the only answer to its prompt" in caplog.text
  )
  with pytest.raises(BadRecord, match="'score' must be a finite number"):
    load(tmp_path, [{"prompt": "p", "response": "r", score: "3"}], "comparisons")


@pytest.mark.parametrize(
  ("row", "kind", "options", "expected"),
  [
    ({"q": "p", "a": "r"}, "demonstrations", "?prompt=q&response=a", Demonstration("p", "r")),
    (
      {"turns": [{"text": "p"}, {"text": "r"}]},
      "demonstrations",
      "?prompt=turns.0.text&response=turns.1.text",
      Demonstration("p", "r"),
    ),
    ({"a.b": "p", "a": {"b": "x"}}, "prompts", "?prompt=a.b", Prompt("p")),
    (
      {"q": "p", "good": "a", "bad": "b", "by": 7},
      "comparisons",
      "?prompt=q&chosen=good&rejected=bad&labeler=by",
      Ranking("p", ("a", "b"), (1, 2), "7"),
    ),
    (
      {"q": "p", "x": "a", "y": "b", "sx": 1, "sy": 2},
      "comparisons",
      "?prompt=q&responses=x,y&scores=sx,sy",
      Ranking("p", ("a", "b"), (2, 1)),
    ),
    ({"prompt": "p", "response": "r"}, "demonstrations", "?format=own", Demonstration("p", "r")),
  ],
)
def test_a_source_can_say_where_its_values_are(tmp_path, row, kind, options, expected):
  assert load(tmp_path, [row], kind, options) == [expected]


@pytest.mark.parametrize(
  ("row", "options", "reason"),
  [
    (
      {"q": 1, "SLUR": 2},
      "",
      r"'prompt' is missing \(keys found: 'q', 'SLUR'\); formats of demonstra",
    ),
    (
      {"q": 1},
      "",
      r"own \(prompt\+response\), own \(messages\), completion \(prompt\+completion\), al",
    ),
    ({"q": 1}, "", r"or name them in the source: \?prompt=KEY&response=KEY$"),
    ({}, "", r"'prompt' is missing \(keys found: none\)$"),
    ({"prompt": "p"}, "", r"'response' is missing \(keys found: 'prompt'\)$"),
    (
      {"q": "p"},
      "?prompt=q&response=a.b",
      r"'response' is read from 'a.b', which is missing \(keys fo",
    ),
    ({"q": ["p"]}, "?prompt=q.1&response=q.0", "'prompt' is read from 'q.1', which is missing"),
    (
      {"instruction": "a", "output": "b", "response": "c"},
      "",
      r"may be alpaca or dolly; name one in the source: \?format=alpaca",
    ),
    ({"instruction": "a"}, "?format=alpaca", "needs instruction and output, as format alpaca"),
    ({"instruction": 5, "output": "b"}, "", "'instruction' must be a string, got int"),
    ({"instruction": " ", "output": "b"}, "", "'instruction' is empty"),
    (
      {"instruction": "a", "output": "b", "input": float("nan")},
      "",
      "'input' must be a string, got NaN",
    ),
    ({"conversations": "x"}, "", "'messages' must be a list of messages, got str"),
    (
      {"conversations": [{"from": "human", "value": "a"}]},
      "",
      "must end in the assistant's answer",
    ),
  ],
)
def test_what_is_of_no_known_format_is_refused_in_words(tmp_path, row, options, reason):
  with pytest.raises(BadRecord, match=f"^{tmp_path}/a.jsonl:1: .*{reason}"):
    load(tmp_path, [row], "demonstrations", options)


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"context": CHAT, "completions": 5}, "'completions' must be a list of objects"),
    ({"context": CHAT, "completions": [{"completion": "a"}] * 2}, "and a number under 'rank'"),
    (
      {"context": CHAT, "completions": [{"rank": "1", "completion": "a"}] * 2},
      "a number under 'rank'",
    ),
    (
      {"instruction": "q", "completions": [{"overall_score": 1}] * 2},
      "must have 'response' and a nu",
    ),
    (
      {"context": CHAT, "response1": "a", "response2": "b", "overall_preference": "x"},
      "be a number",
    ),
    (
      {"input": 5, "preferred_output": "a", "non_preferred_output": "b"},
      "'prompt' must be a string",
    ),
    ({"data": {"prompt": "p"}, "annotations": []}, "has no finished annotation"),
    ({"fields": {}, "responses": []}, "has no submitted ranking"),
  ],
)
def test_formats_of_comparisons_are_checked(tmp_path, row, reason):
  with pytest.raises(BadRecord, match=f"^{tmp_path}/a.jsonl:1: .*{reason}"):
    load(tmp_path, [row], "comparisons")


@pytest.mark.parametrize(
  ("options", "reason"),
  [
    ("?format=csv", "format='csv' of demonstrations must be one of own, completion, alpaca"),
    ("?format=argilla", "format='argilla' of demonstrations must be one of"),
    (
      "?promt=q",
      "'promt' must be one of format, prompt, response, messages, and must have a value",
    ),
    ("?prompt=", "'prompt' must be one of format, prompt"),
    ("?ranks=q", "'ranks' must be one of format, prompt"),
    ("?prompt=a&prompt=b", "names an option twice"),
    ("?data_dir=x", "'data_dir' must be one of"),
  ],
)
def test_options_are_checked(tmp_path, options, reason):
  with pytest.raises(UserError, match=f"^data.demonstrations='jsonl:.*: .*{reason}|{reason}"):
    load(tmp_path, [{}], "demonstrations", options)


def test_a_question_mark_in_a_path_is_no_option():
  for path in ("train-?????.parquet", "what?.jsonl", "?a=b", "a?B=c"):
    assert formats.split_options(path, "", "prompts", ()) == (path, NONE)
  path, options = formats.split_options("t-??.parquet?prompt=q", "", "prompts", ())
  assert (path, options.columns) == ("t-??.parquet", {"prompt": "q"})


def test_an_existing_file_wins_over_options(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a?prompt=q").touch()
  assert formats.split_options("a?prompt=q", "", "prompts", ()) == ("a?prompt=q", NONE)


def test_only_the_columns_that_are_needed_are_read():
  options = lambda rest: formats.split_options("x" + rest, "", "demonstrations", ())[1]
  find = lambda names, rest="": formats.columns(names, "demonstrations", "x", options(rest))
  assert find(["image", "response", "prompt"]) == ["response", "prompt"]
  assert find(["output", "image", "instruction", "input"]) == ["output", "instruction", "input"]
  assert find(["q", "image", "a"], "?prompt=q.0.text&response=a") == ["q", "a"]
  assert find(["q.0", "q"], "?prompt=q.0&response=q") == ["q.0", "q"]
  with pytest.raises(UserError, match=r"no column of demonstrations .*, only image; name them in"):
    find(["image"])
  flat = ["prompt", "a", "b", "order.responses", "order.responses.users"]
  assert formats.columns(flat, "comparisons", "x", NONE) == flat
