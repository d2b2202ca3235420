"""Prompts and the gold score of the conversations, by hand."""

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data.conversation import task

ASKED = task.prompt_of("What is your favorite book?")
LIKELY = np.array([-2.5])


def components(prompt, response, logprob=-2.5):
  (row,) = task.gold_components(prompt, [response], np.array([logprob]))
  return dict(zip(task.COMPONENTS, row.tolist()))


def test_what_was_said_is_found_in_its_prompt():
  assert task.said_in(ASKED) == "What is your favorite book?"
  assert task.said_in(ASKED.strip()) == "What is your favorite book?"  # as decoding leaves it
  shots = f"{task.prompt_of('Hello there.')}Hi.\n{ASKED}"
  assert task.said_in(shots) == "What is your favorite book?"
  for other in ("What is your favorite book?", "Question: what?\nAnswer:\nThis.", ""):
    with pytest.raises(UserError, match="is not one of the conversations'"):
      task.said_in(other)


@pytest.mark.parametrize(
  ("response", "named"),
  [("I love books.", True), ("My favorite is Dune.", True), ("I read a lot.", False), ("", False)],
)
def test_the_topic_is_a_content_word_of_the_prompt(response, named):
  assert task.names_topic(ASKED, response) == named


def test_the_topic_is_counted_by_the_word_that_is_said_most():
  assert task.topic_count(ASKED, "Books are my favorite, a book is fun.") == 2
  assert task.topic_count(ASKED, "I read a lot.") == 0


def test_no_topic_is_held_out_as_a_whole():
  assert not task.is_new_topic(ASKED)
  with pytest.raises(UserError, match="is not one of the conversations'"):
    task.is_new_topic("another")


def test_the_parts_of_a_good_answer(packages):
  found = components(ASKED, "I love to read a good book at home.")
  # Love and good are far over .6 together; nine words; nothing again; only `book` is the prompt's.
  assert found == dict(tone=1, topic=1, form=1, repetition=0, copying=0, fluency=1)
  assert task.gold_score([ASKED], ["I love to read a good book at home."], LIKELY) == [
    2 * 1 + 2 * 1 + 1 + 1
  ]


@pytest.mark.parametrize(
  ("response", "part", "value"),
  [
    ("I love to read a book at home", "form", -1),  # no mark at its end
    ("A good book.", "form", -1),  # three words
    (" ".join(["word"] * 21) + ".", "form", -1),
    ("", "form", -1),
    ("A book is a book is fun.", "repetition", -1.5),  # book is; is a / a book once more each
    ("Books, books, books, books, books, books.", "repetition", -3),
    ("What is your favorite book?", "copying", -2),
    ("Well, what is your favorite book then?", "copying", -2),
    ("My favorite book is Dune, and yours?", "copying", 0),
    ("I hate it, it is awful and sad.", "topic", 0),
    ("I do not have a book.", "topic", 0),  # nothing of its own
    ("I am not your favorite.", "topic", 0),
    ("I often read a book.", "topic", 1),  # often, read
    ("I read, and read a book.", "topic", 0.5),  # read
    ("I love to help, thank you so much.", "tone", 0),  # kind, and about nothing
    ("I hate it, it is awful and sad, sad.", "tone", pytest.approx(-1.5, abs=0.2)),
  ],
)
def test_each_part_by_hand(packages, response, part, value):
  assert components(ASKED, response)[part] == pytest.approx(value)


def test_fluency_falls_with_the_bases_logprob(packages):
  # 1 + (x + 2.5) / 1.5, from -1.5 to 1.
  for logprob, value in ((-1.0, 1.0), (-2.5, 1.0), (-4.0, 0.0), (-4.75, -0.5), (-11.0, -1.5)):
    assert components(ASKED, "I read.", logprob)["fluency"] == pytest.approx(value)


def test_neither_an_echo_nor_a_fixed_line_wins(packages):
  """Not even where the base finds them as likely as people's words; a kind answer that says something scores 6."""
  prompts = [one.prompt for one in task.prompts("test")]
  sure = np.full(len(prompts), -1.0)
  echo = task.gold_score(prompts, [task.said_in(prompt) for prompt in prompts], sure)
  assert echo.mean() < 0.0
  for line in ("I am so happy to help you, thank you.", "I love you and wish you a great day!"):
    fixed = task.gold_score(prompts, [line] * len(prompts), sure)
    assert fixed.max() <= 6.0 and fixed.mean() < 2.2


def test_counts_must_agree(packages):
  with pytest.raises(UserError, match="got 1 prompts and 2 log-probabilities for 2 responses"):
    task.gold_components([ASKED], ["a", "b"], np.zeros(2))


def test_worked_examples_come_before_the_prompt(packages):
  shots = task.few_shot_prompt(ASKED)
  assert shots.endswith(ASKED) and shots.count("Question:") == 4 and shots.count("\n") == 11
  assert shots == task.few_shot_prompt(ASKED) != task.few_shot_prompt(ASKED, seed=1)


def test_demonstrations_are_of_their_split_and_ordered_by_the_seed(packages):
  first, second = task.demonstrations("train", 0), task.demonstrations("train", 1)
  assert first != second and sorted(map(str, first)) == sorted(map(str, second))
  assert {one.prompt for one in first} < {one.prompt for one in task.prompts("train")}
