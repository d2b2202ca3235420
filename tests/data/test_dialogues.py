"""Anthropic's dialogues: only what the assistant says is an answer."""

import pytest

from instructjax.data import dialogues
from instructjax.data.messages import BadRecord

HERE = "a.jsonl:7"
ASKED = "\n\nHuman: Hi.\n\nAssistant:"


def convert(kind="comparisons", **row):
  return dialogues.convert(row, kind, HERE)


@pytest.mark.parametrize(
  "row",
  [
    {"chosen": ASKED + " Ho.", "rejected": ASKED + " No."},
    {"prompt": ASKED, "chosen": " Ho.", "rejected": " No."},
    {"prompt": ASKED, "chosen": ASKED + " Ho.", "rejected": ASKED + " No."},  # not doubled
    {"prompt": None, "chosen": ASKED + " Ho.", "rejected": ASKED + " No."},
  ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_row_is_the_same_however_it_is_cut(row, line_end):
  row = {key: value and value.replace("\n", line_end) for key, value in row.items()}
  expected = {"prompt": ASKED, "chosen": " Ho.", "rejected": " No.", "labeler": None}
  assert convert(**row) == expected
  assert convert("demonstrations", **row) == {"prompt": ASKED, "response": " Ho."}
  assert convert("prompts", **row) == {"prompt": ASKED}


@pytest.mark.parametrize(
  "start",
  [
    "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
    "Human: a\n\nAssistant:",  # the first turn without its newlines
    "\n\nAssistant: Welcome.\n\nHuman: a\n\nAssistant:",
    "\n\nHuman: a\n\nHuman: b\n\nAssistant:",
    "Talk as friends.\n\nHuman: a\n\nAssistant:",
    "\n\n\nHuman: a\n\n\nAssistant:",
  ],
)
def test_odd_but_clear_dialogues_are_taken_as_they_are(start):
  assert convert(chosen=start + " Ho.", rejected=start + " No.")["prompt"] == start


@pytest.mark.parametrize(
  ("chosen", "reason"),
  [
    (ASKED + " Ho.\n\nHuman: And now?", "'chosen' must end in the assistant's answer, not in a tu"),
    (ASKED + " Ho.\n\nHuman:", "not in a turn of Human"),
    (ASKED + " Ho.\r\n\r\nHuman: Why?", "not in a turn of Human"),
    (ASKED + " Ho.\n \nHuman: Why?", "not in a turn of Human"),
    (ASKED + " Ho.\n\n  Human: Why?", "not in a turn of Human"),
    (ASKED + " Ho.\nHuman: Why?", "not in a turn of Human"),
    ("\n\nHuman: \n\nAssistant: Ho.", "'chosen' has an empty turn of Human before the answer"),
    ("\n\nAssistant: Ho.", "'chosen' must have a turn of Human right before the answer"),
    ("\n\nHuman: Hi.\n\nAssistant: a\n\nAssistant: b", "must have a turn of Human right before"),
    ("\n\nHuman: Hi.\nAssistant: a", "'chosen' must be a dialogue with an 'Assistant:' turn"),
    ("Human: Hi.", "'chosen' must be a dialogue with an 'Assistant:' turn"),
    (7, "'chosen' must be a dialogue"),
    ([{"role": "user", "content": "Hi."}], "'chosen' must be a dialogue"),
  ],
)
def test_the_human_is_never_imitated(chosen, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    convert("demonstrations", chosen=chosen, rejected=chosen)
  if (
    isinstance(chosen, str) and "Human:" in chosen.removeprefix(ASKED) and chosen.startswith(ASKED)
  ):
    with pytest.raises(BadRecord, match=reason):
      convert("demonstrations", prompt=ASKED, chosen=chosen[len(ASKED) :], rejected=" No.")


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"chosen": "x"}, "needs chosen and rejected"),
    ({"chosen": ASKED + " Ho.", "rejected": None}, "needs chosen and rejected"),
    (
      {"chosen": ASKED + " Ho.", "rejected": ASKED + " No.\n\nHuman: b\n\nAssistant: c"},
      "chosen and rejected differ before their last answer",
    ),
    (
      {"prompt": ASKED, "chosen": ASKED + " Ho.", "rejected": " No."},
      "only one of chosen and rejected repeats the prompt",
    ),
    (
      {"prompt": "\n\nHuman: Hi.", "chosen": " a", "rejected": " b"},
      "must end in two newlines and",
    ),
    ({"prompt": ASKED, "chosen": " a", "rejected": " b\n\nHuman: c"}, "'rejected' must end in the"),
  ],
)
def test_a_row_that_does_not_hold_together_is_refused(row, reason):
  with pytest.raises(BadRecord, match=f"^{HERE}: .*{reason}"):
    convert(**row)


def test_a_dialogue_that_the_human_ends_is_no_prompt_either():
  ended = ASKED + " Ho.\n\nHuman: Why?"
  with pytest.raises(BadRecord, match="'chosen' must end in the assistant's answer"):
    convert("prompts", chosen=ended, rejected=ended)


def test_what_a_dialogue_is():
  assert dialogues.is_dialogue(ASKED) and dialogues.is_dialogue(ASKED.replace("\n", "\r\n"))
  assert not dialogues.is_dialogue("Assistant: a") and not dialogues.is_dialogue(None)
