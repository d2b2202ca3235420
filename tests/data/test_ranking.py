import pytest

from instructjax.data import ranking
from instructjax.data.messages import BadRecord

HERE = "data/a.jsonl:7"


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
  assert ranking.from_pairs(num_responses, judged(*outcomes), HERE) == expected


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
    ranking.from_pairs(3, pairs, HERE)
