"""Chat messages of every spelling, and which of them are trained on."""

import json

import pytest

from instructjax.data import messages
from instructjax.data.messages import BadRecord
from instructjax.data.records import Chat, Demonstration, Prompt, Ranking, parse_record

HERE = "a.jsonl:7"
ASK = {"role": "user", "content": "Hi."}
ANSWER = {"role": "assistant", "content": "Ho."}
ASKED = Chat((("user", "Hi."),))


@pytest.mark.parametrize(
  "pair",
  [
    [{"role": "human", "content": "Hi."}, {"role": "gpt", "content": "Ho."}],
    [ASK, {"role": "model", "content": "Ho."}],
    [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Ho."}],
    [{"from": "user", "value": "Hi."}, {"from": "assistant", "value": "Ho.", "weight": None}],
    [ASK, {**ANSWER, "tool_calls": None, "name": None}],
  ],
)
def test_every_spelling_of_the_roles_is_the_same_chat(pair):
  expected = Demonstration(ASKED, "Ho.")
  assert parse_record("demonstrations", {"messages": pair}, HERE) == expected
  assert parse_record("demonstrations", {"messages": json.dumps(pair)}, HERE) == expected


def marked(*flags, key="weight"):
  """Turns of a user and the assistant, of which the assistant's have these flags; None is no flag."""
  return [
    message
    for i, flag in enumerate(flags)
    for message in (
      {"role": "user", "content": f"q{i}"},
      {"role": "assistant", "content": f"a{i}", **({} if flag is None else {key: flag})},
    )
  ]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize(
  ("flags", "answer"),
  [
    ((1,), "a0"),
    ((0, 1), "a1"),
    ((None, True), "a1"),
    ((1, 0), "a0"),  # the last answer is not trained on, so the dialogue ends before it
    ((None, False), "a0"),
    ((1.0, 0.0, 0), "a0"),
  ],
)
def test_an_answer_of_weight_0_is_not_trained_on(key, flags, answer):
  found = parse_record("demonstrations", {"messages": marked(*flags, key=key)}, HERE)
  assert found.response == answer
  assert len(found.prompt.messages) == 2 * int(answer[1]) + 1


@pytest.mark.parametrize(
  ("chat", "reason"),
  [
    (marked(0), "'messages' marks no answer of the assistant for training"),
    (marked(0, 0), "marks no answer"),
    (marked(0.5), r"weight, train, loss of 'messages\[1\]' must be 0 or 1"),
    (marked(2), "must be 0 or 1"),
    (marked("1"), "must be 0 or 1"),
    (marked([]), "must be 0 or 1"),
    (marked(float("nan")), "must be 0 or 1"),
    (marked(1, key="mask"), "has a 'mask', whose sense is not clear"),
    ([ASK, {**ANSWER, "weight": 1, "train": False}], "contradict each other"),
    ([{**ASK, "weight": 1}, ANSWER], r"'messages\[0\]' is marked for training"),
    ([ASK, {"role": "tool", "content": "SLUR"}], "not a tool's, which cannot be trained on"),
    ([ASK, {"role": "function", "content": "SLUR"}], "not a tool's"),
    ([ASK, {"role": "assistant", "content": None}], r"'messages\[1\].content' must be a string"),
    (str([ASK, ANSWER]), "'messages' holds messages as Python prints them"),
    ("[]", "'messages' must be a list of messages, got str"),
  ],
)
def test_what_cannot_be_trained_on_is_refused(chat, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}") as error:
    parse_record("demonstrations", {"messages": chat}, HERE)
  assert "SLUR" not in str(error.value)


def test_an_answer_that_is_not_to_be_trained_on_is_not_ranked():
  row = {"chosen": marked(0), "rejected": [*marked(None)[:1], ANSWER]}
  with pytest.raises(BadRecord, match="an answer is marked as not to be trained on"):
    parse_record("comparisons", row, HERE)
  assert parse_record("prompts", {"messages": marked(0)}, HERE) == Prompt(Chat((("user", "q0"),)))


def test_chats_as_json_text_and_texts_that_begin_with_a_bracket():
  whole = {
    "chosen": json.dumps([ASK, ANSWER]),
    "rejected": json.dumps([ASK, {**ANSWER, "content": "No."}]),
  }
  assert parse_record("comparisons", whole, HERE) == Ranking(ASKED, ("Ho.", "No."), (1, 2))
  assert parse_record("prompts", {"prompt": json.dumps([ASK])}, HERE) == Prompt(ASKED)
  for text in ("[1, 2, 3] is what?\n", "[1, 2]", '[{"role": "user"}]', "[" * 10_000):
    assert parse_record("prompts", {"prompt": text}, HERE) == Prompt(text)


def test_long_lists_of_names_are_cut():
  assert messages.listed(["a", "b"]) == "'a', 'b'"
  line = messages.listed(["k" * 50, "\n\x1b[0m", *map(str, range(20))])
  assert "\n" not in line and "\x1b" not in line and len(line) < 150 and line.endswith("10 more")
