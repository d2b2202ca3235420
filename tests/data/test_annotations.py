"""Rankings of annotation tools, in each of the shapes that they export."""

import pytest

from instructjax.data import annotations
from instructjax.data.messages import BadRecord

HERE = "a.jsonl:7"
FIELDS = {"prompt": "p", "a": "good", "b": "bad"}
RANKED = [{"value": "b", "rank": 2}, {"value": "a", "rank": 1}]


def row(**changes):
  return {"prompt": "p", "responses": ["good", "bad"], "ranks": [1, 2], "labeler": "ann"} | changes


ARGILLA = [
  # Version 2, `records.to_list()` and `to_json`.
  {"id": "1", "fields": FIELDS, "responses": {"order": [{"value": ["a", "b"], "user_id": "ann"}]}},
  # `to_list(flatten=True)` and `to_datasets`.
  {
    "id": "1",
    "status": "completed",
    **FIELDS,
    "order.responses": [["a", "b"]],
    "order.responses.users": ["ann"],
    "order.responses.status": ["submitted"],
    "order.suggestion": ["b", "a"],
  },
  # What the server sends.
  {
    "fields": FIELDS,
    "responses": [
      {"values": {"order": {"value": RANKED[::-1]}}, "status": "submitted", "user_id": "ann"}
    ],
  },
  # Version 1, `format_as("datasets")`: the ranks in columns.
  {
    **FIELDS,
    "order": [
      {"user_id": "ann", "value": {"rank": [1, 2], "value": ["a", "b"]}, "status": "submitted"}
    ],
    "order-suggestion": [],
  },
]


@pytest.mark.parametrize("record", ARGILLA)
def test_argilla_in_every_shape(record):
  assert annotations.is_argilla(record)
  assert annotations.argilla(record, {}, HERE) == [row()]


def test_each_annotator_of_argilla_gives_a_ranking_and_drafts_none():
  given = [
    {"value": [{"value": "a", "rank": 1}, {"value": "b", "rank": 1}], "user_id": "ann"},
    {"value": ["b", "a"], "user_id": None},
    {"value": ["b", "a"], "user_id": "cy", "status": "draft"},
    {"value": ["b", "a"], "user_id": "di", "status": "discarded"},
  ]
  record = {"fields": FIELDS, "responses": {"order": given, "comment": [{"value": "nice"}]}}
  assert annotations.argilla(record, {}, HERE) == [
    row(ranks=[1, 1]),
    row(responses=["bad", "good"], labeler=None),
  ]


@pytest.mark.parametrize(
  ("record", "names", "reason"),
  [
    ({"fields": FIELDS, "responses": {}}, {}, "has no submitted ranking"),
    ({"fields": FIELDS, "responses": {"x": [{"value": "text"}]}}, {}, "has no submitted ranking"),
    (
      {"fields": FIELDS, "responses": {q: [{"value": ["a", "b"]}] for q in "xy"}},
      {},
      r"rankings of several questions \('x', 'y'\); choose one: \?format=argilla&ranks=QUESTION",
    ),
    (
      {"fields": FIELDS, "responses": {"x": [{"value": ["a", "c"]}]}},
      {},
      "ranks 'c', which is no field of the record",
    ),
    (
      {
        "fields": {"q1": "p", "q2": "p", "a": "x", "b": "y"},
        "responses": {"x": [{"value": ["a", "b"]}]},
      },
      {},
      r"which field is the prompt is not clear \('q1', 'q2'\); name it: \?format=argilla&prompt=FIELD",
    ),
    (
      {"fields": FIELDS, "responses": {"x": [{"value": ["a", "b"]}]}},
      {"prompt": "q"},
      "has no field 'q'",
    ),
    (
      {"fields": FIELDS, "responses": {"x": [{"value": [{"value": "a"}, {"value": "b"}]}]}},
      {},
      "a rank must be a number",
    ),
  ],
)
def test_what_is_not_clear_in_argilla_is_refused(record, names, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    annotations.argilla(record, names, HERE)


def test_the_question_and_the_prompt_can_be_named():
  record = {
    "fields": {"q1": "p", "q2": "other", "a": "good", "b": "bad"},
    "responses": {"x": [{"value": ["b", "a"]}], "y": [{"value": ["a", "b"], "user_id": "ann"}]},
  }
  assert annotations.argilla(record, {"ranks": "y", "prompt": "q1"}, HERE) == [row()]


ITEMS = [{"id": "1", "title": "B", "body": "bad"}, {"id": "2", "title": "A", "body": "good"}]


def task(value, **changes):
  annotation = {"completed_by": "ann", "result": [{"type": "ranker", "value": value}]} | changes
  return {"id": 3, "data": {"prompt": "p", "items": ITEMS}, "annotations": [annotation]}


LABEL_STUDIO = [
  task({"ranker": ["2", "1"]}),
  task({"ranker": {"rank": ["2", "1"]}}),
  task({"ranker": {"_": [], "good": ["2", "1"]}}),
  task({"ranker": ["2", "1"]}, completed_by={"id": 9, "email": "ann"}),
  {"prompt": "p", "items": ITEMS, "rank": {"rank": ["2", "1"]}, "annotator": "ann", "id": 3},
]


@pytest.mark.parametrize("record", LABEL_STUDIO)
def test_label_studio_in_every_shape(record):
  assert annotations.is_label_studio(record)
  assert annotations.label_studio(record, {}, HERE) == [row()]


def test_each_annotation_of_label_studio_gives_a_ranking_and_cancelled_ones_none():
  record = task({"ranker": ["2", "1"]})
  record["annotations"] += [
    {"completed_by": 4, "result": [{"type": "ranker", "value": {"ranker": ["1", "2"]}}]},
    {"completed_by": 5, "was_cancelled": True, "result": record["annotations"][0]["result"]},
  ]
  found = annotations.label_studio(record, {}, HERE)
  assert found == [row(), row(responses=["bad", "good"], labeler=4)]


@pytest.mark.parametrize(("side", "best"), [("left", "one"), ("right", "two")])
def test_pairs_of_label_studio(side, best):
  result = [{"type": "pairwise", "value": {"selected": side}}]
  record = {
    "data": {"prompt": "p", "answer1": "one", "answer2": "two"},
    "annotations": [{"result": result}],
  }
  (found,) = annotations.label_studio(record, {}, HERE)
  other = {"one": "two", "two": "one"}[best]
  assert found == {"prompt": "p", "chosen": best, "rejected": other, "labeler": None}


@pytest.mark.parametrize(
  ("record", "reason"),
  [
    (task({"choices": ["x"]}), "has no finished annotation that ranks answers"),
    (task({"ranker": ["2", "3"]}), "ranks item '3', which the task does not hold"),
    (task({"ranker": {"good": ["2"], "bad": ["1"]}}), "sorted into several buckets, which have no"),
    (
      {"data": {}, "annotations": [{"result": [{"value": {"selected": "left"}}]}]},
      "answer1 and ans",
    ),
    (
      {"data": {}, "annotations": [5, {"result": 7}, {"result": [5]}]},
      "has no finished annotation",
    ),
  ],
)
def test_what_ranks_nothing_in_label_studio_is_refused(record, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    annotations.label_studio(record, {}, HERE)
