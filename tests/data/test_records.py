import pytest

from instructjax.data.records import (
  BadRecord,
  Chat,
  Demonstration,
  Document,
  Prompt,
  Ranking,
  parse_record,
)

HERE = "data/a.jsonl:7"


@pytest.mark.parametrize(
  ("kind", "obj", "expected"),
  [
    ("documents", {"text": " kept as it is\n", "title": "ignored"}, Document(" kept as it is\n")),
    ("prompts", {"prompt": "p", "response": "ignored"}, Prompt("p")),
    ("demonstrations", {"prompt": "p", "response": " r"}, Demonstration("p", " r")),
    (
      "comparisons",
      {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "labeler": "ann"},
      Ranking("p", ("a", "b", "c"), (2, 1, 2), "ann"),
    ),
    (
      "comparisons",
      {"prompt": "p", "responses": ["a", "", " \n"], "ranks": [1, 2, 2]},
      Ranking("p", ("a", "", " \n"), (1, 2, 2)),
    ),
    (
      "comparisons",
      {"prompt": "p", "chosen": "", "rejected": "b", "labeler": None},
      Ranking("p", ("", "b"), (1, 2)),
    ),
    (
      "comparisons",
      {"prompt": "p", "responses": ["a", "b"], "comparisons": [{"a": 0, "b": 1, "winner": 1}]},
      Ranking("p", ("a", "b"), (2, 1)),
    ),
  ],
)
def test_a_good_record_is_taken_as_it_is(kind, obj, expected):
  assert parse_record(kind, obj, HERE) == expected


TWO = {"prompt": "p", "responses": ["a", "b"]}


@pytest.mark.parametrize(
  ("kind", "obj", "reason"),
  [
    ("prompts", ["p"], "must be a JSON object, got list"),
    ("prompts", {"question": "p"}, r"'prompt' is missing \(keys found: 'question'\)"),
    ("comparisons", {**TWO, "ranks": [1, 2], "labeler": True}, "'labeler' must be a string, got"),
    ("prompts", {"prompt": 3}, "'prompt' must be a string, got int"),
    ("documents", {"text": " \n"}, "'text' is empty"),
    ("documents", {"text": "\ud83d"}, "'text' is not valid Unicode"),
    ("demonstrations", {"prompt": "p", "response": ""}, "'response' is empty"),
    ("demonstrations", {"prompt": "p"}, "'response' is missing"),
    ("comparisons", TWO, "exactly one of ranks, comparisons or chosen/rejected, got none"),
    ("comparisons", {**TWO, "ranks": [1, 2], "comparisons": []}, "got ranks and comparisons"),
    ("comparisons", {**TWO, "chosen": "a", "rejected": "b"}, "both responses and chosen"),
    ("comparisons", {"prompt": "p", "chosen": "a"}, "'rejected' is missing"),
    ("comparisons", {**TWO, "ranks": [1]}, "2 responses but 1 ranks"),
    ("comparisons", {**TWO, "ranks": [1, 2, 3]}, "2 responses but 3 ranks"),
    ("comparisons", {**TWO, "ranks": [0, 1]}, "'ranks' must be a list of integers >= 1"),
    ("comparisons", {**TWO, "ranks": [1, 1.5]}, "'ranks' must be a list of integers >= 1"),
    ("comparisons", {**TWO, "ranks": [1, float("inf")]}, "'ranks' must be a list of integers >= 1"),
    ("comparisons", {**TWO, "ranks": ["1", "2"]}, "'ranks' must be a list of integers >= 1"),
    ("comparisons", {**TWO, "scores": [1, float("nan")]}, "'scores' must be a list of finite numb"),
    ("comparisons", {**TWO, "scores": [True, 2]}, "'scores' must be a list of finite numbers"),
    ("comparisons", {**TWO, "scores": [1]}, "2 responses but 1 scores"),
    ("comparisons", {"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same answer"),
    ("documents", {"text": "a\0b"}, "'text' holds a NUL character"),
    ("documents", {"text": float("nan")}, "'text' must be a string, got NaN"),
    ("comparisons", {**TWO, "ranks": [True, 2]}, "'ranks' must be a list of integers >= 1"),
    ("comparisons", {**TWO, "ranks": "12"}, "'ranks' must be a list of integers >= 1"),
    ("comparisons", {"prompt": "p", "responses": ["a"], "ranks": [1]}, "at least 2 strings"),
    ("comparisons", {"prompt": "p", "responses": "ab", "ranks": [1, 2]}, "at least 2 strings"),
    (
      "comparisons",
      {"prompt": "p", "responses": ["a", 3], "ranks": [1, 2]},
      "responses.1.' must be a string, got int",
    ),
    ("comparisons", {"prompt": "p", "ranks": [1, 2]}, "'responses' must be a list"),
    (
      "comparisons",
      {**TWO, "ranks": [1, 2], "labeler": 5.5},
      "'labeler' must be a string, got flo",
    ),
  ],
)
def test_a_bad_record_is_refused_with_place_and_reason(kind, obj, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    parse_record(kind, obj, HERE)


def test_an_unknown_kind_lists_the_known_ones():
  with pytest.raises(
    ValueError, match="kind='rankings' must be one of documents, prompts, demons"
  ) as raised:
    parse_record("rankings", {}, HERE)
  assert type(raised.value) is ValueError  # a programmer's mistake


def says(role, content, **more):
  return {"role": role, "content": content, **more}


SYSTEM, ASK, ANSWER = says("system", ""), says("user", " Hi?"), says("assistant", " Ho.", name="a")
ASKED = Chat((("system", ""), ("user", " Hi?")))
LONGER = [ASK, ANSWER, says("user", "Why?")]
PARTS = [{"type": "text", "text": "So "}, {"type": "text", "text": "so.", "image_url": None}]


@pytest.mark.parametrize(
  ("kind", "obj", "expected"),
  [
    ("prompts", {"messages": [SYSTEM, ASK], "prompt": "ignored"}, Prompt(ASKED)),
    ("prompts", {"messages": [SYSTEM, ASK, ANSWER, SYSTEM]}, Prompt(ASKED)),
    (
      "prompts",
      {"messages": [*LONGER, ANSWER]},
      Prompt(Chat((("user", " Hi?"), ("assistant", " Ho."), ("user", "Why?")))),
    ),
    ("prompts", {"prompt": [SYSTEM, ASK]}, Prompt(ASKED)),
    (
      "prompts",
      {"prompt": [says("developer", "x"), says("user", PARTS, tool_calls=[])]},
      Prompt(Chat((("developer", "x"), ("user", "So so.")))),
    ),
    ("demonstrations", {"messages": [SYSTEM, ASK, ANSWER]}, Demonstration(ASKED, " Ho.")),
    ("demonstrations", {"prompt": [SYSTEM, ASK], "response": "r"}, Demonstration(ASKED, "r")),
    ("demonstrations", {"prompt": "p", "response": [ANSWER]}, Demonstration("p", " Ho.")),
    (
      "comparisons",
      {"chosen": [SYSTEM, ASK, ANSWER], "rejected": [SYSTEM, ASK, says("assistant", "")]},
      Ranking(ASKED, (" Ho.", ""), (1, 2)),
    ),
    (
      "comparisons",
      {"prompt": " Hi?", "chosen": [ASK, ANSWER], "rejected": [ASK, says("assistant", "no")]},
      Ranking(Chat((("user", " Hi?"),)), (" Ho.", "no"), (1, 2)),
    ),
    (
      "comparisons",
      {"prompt": [SYSTEM, ASK], "chosen": [ANSWER], "rejected": "no", "labeler": "ann"},
      Ranking(ASKED, (" Ho.", "no"), (1, 2), "ann"),
    ),
    (
      "comparisons",
      {"prompt": [SYSTEM, ASK], "responses": [[ANSWER], "", "b"], "ranks": [1, 2, 2]},
      Ranking(ASKED, (" Ho.", "", "b"), (1, 2, 2)),
    ),
  ],
)
def test_messages_become_a_chat_prompt_and_its_answers(kind, obj, expected):
  assert parse_record(kind, obj, HERE) == expected


@pytest.mark.parametrize(
  ("messages", "reason"),
  [
    ([], "'messages' must be a list of messages, got an empty one"),
    ("SLUR", "'messages' must be a list of messages, got str"),
    (["SLUR"], "'messages.0.' must be an object with role and content, got str"),
    ([{"from": "SLUR"}], "must be an object with role and content, got only 'from'"),
    ([ASK, says("tool", "SLUR")], "role of 'messages.1.' must be one of system, developer, user"),
    ([says(["SLUR"], "a")], "role of 'messages.0.' must be one of"),
    ([ASK, says("assistant", None)], "'messages.1..content' must be a string, got null"),
    ([ASK, says("assistant", "SLUR", tool_calls=[{}])], "'messages.1.' calls a tool"),
    ([ASK, says("assistant", None, function_call={"name": "SLUR"})], "'messages.1.' calls a tool"),
    (
      [says("user", [*PARTS, {"type": "image_url"}]), ANSWER],
      "content of 'messages.0.' has a part",
    ),
    ([says("user", [{"type": "x", "text": "SLUR"}]), ANSWER], "has a part that is not text"),
    ([says("user", ["SLUR"]), ANSWER], "content of 'messages.0.' has a part that is not text"),
    ([says("user", [{"type": "text", "text": 3}]), ANSWER], "has a part that is not text"),
    ([says("user", "\ud83d"), ANSWER], "'messages.0..content' is not valid Unicode"),
    ([ASK], "'messages' must end in the assistant's answer, not in role user"),
    ([ANSWER], "must have a message of the user right before the answer"),
    ([ASK, ANSWER, ANSWER], "must have a message of the user right before the answer"),
    ([says("user", " "), ANSWER], "'messages.0..content' is empty"),
    ([SYSTEM, ASK, says("assistant", "\n")], "'messages.2..content' is empty"),
  ],
)
def test_bad_messages_are_refused_without_their_text(messages, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}") as error:
    parse_record("demonstrations", {"messages": messages}, HERE)
  assert "SLUR" not in str(error.value)


@pytest.mark.parametrize(
  ("kind", "obj", "reason"),
  [
    ("prompts", {"messages": [SYSTEM, ANSWER]}, "must have a message of the user"),
    ("prompts", {"prompt": [ASK, ANSWER]}, "'prompt' must have a message of the user right before"),
    ("demonstrations", {"messages": [ASK, ANSWER], "response": "r"}, "both messages and response"),
    ("demonstrations", {"prompt": "p", "response": [ASK]}, "or one message of the assistant"),
    ("comparisons", {"chosen": [ASK, ANSWER]}, "'rejected' is missing"),
    (
      "comparisons",
      {"chosen": [ASK, ANSWER], "rejected": [SYSTEM, ASK, ANSWER]},
      "'chosen' and 'rejected' differ before their last message",
    ),
    (
      "comparisons",
      {"prompt": "other", "chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]},
      "'prompt' is not what 'chosen' and 'rejected' answer",
    ),
    (
      "comparisons",
      {"prompt": [SYSTEM, ASK], "chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]},
      "'prompt' is not what 'chosen' and 'rejected' answer",
    ),
    (
      "comparisons",
      {"prompt": [ASK], "responses": ["a", [ANSWER, ANSWER]], "ranks": [1, 2]},
      "'responses.1.' must be a string or one message of the assistant",
    ),
  ],
)
def test_chats_that_do_not_fit_their_kind_are_refused(kind, obj, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    parse_record(kind, obj, HERE)


def test_errors_never_hold_the_text():
  for obj in (
    {"prompt": "SLUR", "responses": ["SLUR", 3], "ranks": [1, 2]},
    {
      "prompt": "SLUR",
      "responses": ["SLUR"] * 2,
      "comparisons": [{"a": "SLUR", "b": 1, "winner": 1}],
    },
    {
      "prompt": "SLUR",
      "responses": ["SLUR"] * 2,
      "comparisons": [{"a": 0, "b": 1, "winner": "SLUR"}],
    },
  ):
    with pytest.raises(BadRecord) as error:
      parse_record("comparisons", obj, HERE)
    assert "SLUR" not in str(error.value)


@pytest.mark.parametrize(
  ("kind", "obj", "expected"),
  [
    (
      "comparisons",
      {"prompt": "p", "chosen": "a", "rejected": "b", "responses": None, "ranks": None},
      Ranking("p", ("a", "b"), (1, 2)),
    ),
    ("demonstrations", {"prompt": "p", "response": "r", "messages": None}, Demonstration("p", "r")),
    ("prompts", {"prompt": "p", "messages": None}, Prompt("p")),
  ],
)
def test_a_null_is_an_absent_key(kind, obj, expected):
  assert parse_record(kind, obj, HERE) == expected


@pytest.mark.parametrize(
  ("ranks", "expected"),
  [
    ([1, 10**11], (1, 2)),  # beyond int32: the places
    ([2**31, 5, 2**31], (2, 1, 2)),
    ([10**400, 10**399, 1], (3, 2, 1)),
    ([1, 2**31 - 1], (1, 2**31 - 1)),
    ([2.0, 1.0], (2, 1)),
  ],
)
def test_ranks_fit_a_batch_and_keep_their_order(ranks, expected):
  obj = {"prompt": "p", "responses": ["a"] * len(ranks), "ranks": ranks}
  found = parse_record("comparisons", obj, HERE).ranks
  assert found == expected and all(type(rank) is int for rank in found)


def test_the_number_of_an_annotator_is_a_labeler():
  obj = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "labeler": 2**70}
  assert parse_record("comparisons", obj, HERE).labeler == "1180591620717411303424"
  with pytest.raises(BadRecord, match="'labeler' is a number of too many digits"):
    parse_record("comparisons", obj | {"labeler": 10**5000}, HERE)


@pytest.mark.parametrize(
  ("prompt", "chosen", "rejected", "expected"),
  [
    # Both are whole texts.
    ("Q: Hi\n", "Q: Hi\nA: Ho", "Q: Hi\nA: No", ("A: Ho", "A: No")),
    ("Q: Hi\nA:", "Q: Hi\nA: Ho", "Q: Hi\nA: No", (" Ho", " No")),
    ("Assistant:", "Assistant: Ho", "Assistant: No", (" Ho", " No")),
    ("Name a colour.", "Name a colour. Blue.", "Name a colour. No.", (" Blue.", " No.")),
    # Answers that happen to begin with a short prompt, or one of which repeats it.
    ("Hi", "Hi, you!", "Hi.", ("Hi, you!", "Hi.")),
    ("xAssistant:", "xAssistant: Ho", "xAssistant: No", ("xAssistant: Ho", "xAssistant: No")),
    ("How are you", "How are yours?", "How are you?", ("How are yours?", "How are you?")),
    ("Name a colour.\n", "Name a colour.\nBlue.", "No.", ("Name a colour.\nBlue.", "No.")),
  ],
)
def test_a_prompt_that_is_repeated_in_both_answers_is_not_doubled(
  prompt, chosen, rejected, expected
):
  obj = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
  assert parse_record("comparisons", obj, HERE) == Ranking(prompt, expected, (1, 2))


def test_a_prompt_that_is_repeated_in_a_demonstration_is_not_doubled():
  for prompt, response, expected in (
    ("Q: Hi\n", "Q: Hi\nHo", "Ho"),
    ("Hi", "Hi there", "Hi there"),
  ):
    obj = {"prompt": prompt, "response": response}
    assert parse_record("demonstrations", obj, HERE) == Demonstration(prompt, expected)
  with pytest.raises(BadRecord, match="'response' is empty"):
    parse_record("demonstrations", {"prompt": "Q: Hi\n", "response": "Q: Hi\n"}, HERE)


def test_a_chat_prompt_that_is_repeated_in_its_answers_is_not_doubled():
  whole = [ASK, ANSWER]
  (asked,) = [Chat((("user", ASK["content"]),))]
  text = ANSWER["content"]
  assert parse_record(
    "demonstrations", {"prompt": [ASK], "response": whole}, HERE
  ) == Demonstration(asked, text)
  obj = {"prompt": [ASK], "chosen": whole, "rejected": "No."}
  assert parse_record("comparisons", obj, HERE) == Ranking(asked, (text, "No."), (1, 2))
  other = [{**ASK, "content": "other"}, ANSWER]
  with pytest.raises(BadRecord, match="'prompt' is not what 'chosen' answers"):
    parse_record("comparisons", obj | {"chosen": other}, HERE)
