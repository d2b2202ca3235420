import pytest

from instructjax.data.records import (
  BadRecord,
  Demonstration,
  Document,
  Prompt,
  Ranking,
  parse_record,
  ranks_from_pairs,
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
    ("comparisons", {**TWO, "ranks": [0, 1]}, "'ranks' must be a list of integers >= 1"),
    ("comparisons", {**TWO, "ranks": [1, 2.0]}, "'ranks' must be a list of integers >= 1"),
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
    ("comparisons", {**TWO, "ranks": [1, 2], "labeler": 5}, "'labeler' must be a string, got int"),
  ],
)
def test_a_bad_record_is_refused_with_place_and_reason(kind, obj, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    parse_record(kind, obj, HERE)


def test_an_unknown_kind_lists_the_known_ones():
  with pytest.raises(ValueError, match="kind='rankings' must be one of documents, prompts, demons"):
    parse_record("rankings", {}, HERE)


def judged(*outcomes):
  return [{"a": a, "b": b, "winner": winner} for a, b, winner in outcomes]


@pytest.mark.parametrize(
  ("num_responses", "outcomes", "expected"),
  [
    (2, [(0, 1, None)], (1, 1)),
    (3, [(0, 1, 1), (0, 2, 2), (2, 1, 1)], (3, 1, 2)),
    # Wins 1.5, 1, .5: responses 0 and 1 were called a tie, but 0 did better against 2.
    (3, [(0, 1, None), (0, 2, 0), (1, 2, None)], (1, 2, 3)),
    # A cycle has one win each.
    (3, [(0, 1, 0), (1, 2, 1), (0, 2, 2)], (1, 1, 1)),
    # Wins 2, 2, 1, 1: ranks after a tie skip.
    (4, [(0, 1, 0), (0, 2, 2), (0, 3, 0), (1, 2, 1), (1, 3, 1), (2, 3, 3)], (1, 1, 3, 3)),
  ],
)
def test_ranks_count_wins_with_ties_as_halves(num_responses, outcomes, expected):
  assert ranks_from_pairs(num_responses, judged(*outcomes), HERE) == expected


@pytest.mark.parametrize(
  ("pairs", "reason"),
  [
    ({}, "'comparisons' must be a list, got dict"),
    ([{"a": 0, "b": 1}], "must be an object with a, b and winner"),
    (judged((0, 3, 0)), "two different indices below 3"),
    (judged((1, 1, 1)), "two different indices below 3"),
    (judged((0, 1, 2)), "winner of a comparison must be its a=0, its b=1 or null"),
    (judged((0, 1, True)), "winner of a comparison must be its a=0, its b=1 or null"),
    (judged((0, 1, 0), (1, 0, 0)), "responses 0 and 1 are compared twice"),
    (judged((0, 1, 0), (0, 2, 0)), "responses 1 and 2 are not compared"),
  ],
)
def test_incomplete_or_malformed_pairs_are_refused(pairs, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    ranks_from_pairs(3, pairs, HERE)


def test_messages_never_hold_the_text():
  for obj in (
    {"prompt": "SLUR", "responses": ["SLUR", 3], "ranks": [1, 2]},
    {"prompt": "SLUR", "responses": ["SLUR"] * 2, "comparisons": judged(("SLUR", 1, 1))},
    {"prompt": "SLUR", "responses": ["SLUR"] * 2, "comparisons": judged((0, 1, "SLUR"))},
  ):
    with pytest.raises(BadRecord) as error:
      parse_record("comparisons", obj, HERE)
    assert "SLUR" not in str(error.value)
