"""The default task: prompts, demonstrations, the gold score and prompts for a base model."""

import collections

import numpy as np
import pytest

from instructjax.data.demo import task, text

pytestmark = pytest.mark.usefixtures("bible")

PROMPT = "speak well of the king.\n"


def _components(response):
  return dict(zip(task.COMPONENTS, task.gold_components(PROMPT, [response])[0], strict=True))


def test_prompt_splits_are_disjoint_and_each_has_every_topic_and_wording():
  prompts = {split: task.prompts(split) for split in task.SPLITS}
  assert [len(prompts[split]) for split in task.SPLITS] == [192, 32, 64]
  assert len(set().union(*prompts.values())) == 288
  new = [prompt for prompt in prompts["test"] if task.is_new_topic(prompt)]
  assert {task.topic_of(prompt) for prompt in new} == set(task.NEW_TOPICS) and len(new) == 32
  assert not any(task.is_new_topic(p) for split in ("train", "validation") for p in prompts[split])
  prompts["test"] = [prompt for prompt in prompts["test"] if prompt not in new]
  for split in task.SPLITS:
    assert {task.topic_of(prompt) for prompt in prompts[split]} == set(task.TOPICS)
    wordings = {p.replace(f"the {task.topic_of(p)}", "the {}") for p in prompts[split]}
    assert wordings == set(task.TEMPLATES)


def test_every_prompt_word_and_lexicon_word_is_in_the_text():
  known = {*text.corpus().vocabulary, ".", "?"}
  for prompt in task.prompts("train") + task.prompts("test"):
    assert known.issuperset(text.tokenize(prompt)), prompt
  assert task.KIND_WORDS <= known
  assert task.HARSH_WORDS <= known
  assert not task.KIND_WORDS & task.HARSH_WORDS
  assert not (task.KIND_WORDS | task.HARSH_WORDS) & {*task.TOPICS, *task.NEW_TOPICS}
  assert not set(task.TOPICS) & set(task.NEW_TOPICS)


def test_topics_are_common_in_the_lines_that_demonstrators_choose_from():
  _, by_topic = task._lines("train")
  assert min(len(by_topic[topic]) for topic in task.TOPICS) >= 40
  _, by_topic = task._lines("validation")
  assert set(by_topic) == set(task.TOPICS)


def test_demonstrations_often_name_the_topic_and_are_seldom_harsh():
  demonstrations = task.demonstrations("train", 0)
  prompts = [d.prompt for d in demonstrations]
  components = task.gold_components(prompts, [d.response for d in demonstrations])
  topic, tone = components[:, 0], components[:, 1]
  assert len(demonstrations) == 64 * 192
  assert set(collections.Counter(prompts).values()) == {64}
  assert 0.55 < topic.mean() < 0.70
  # Kind words on other topics do not count.
  assert (tone > 0).mean() > 0.2 and (tone < 0).mean() < 0.05
  finished = np.mean([d.response.endswith(".") for d in demonstrations])
  assert 0.90 < finished < 0.99  # A few are handed in cut short.


def test_demonstrations_depend_on_the_seed_alone_and_splits_do_not_share_lines():
  assert task.demonstrations("test", 3) == task.demonstrations("test", 3)
  assert task.demonstrations("test", 3) != task.demonstrations("test", 4)
  train = set(text.clauses("train"))
  held_out = [d.response for d in task.demonstrations("test", 0) if d.response.endswith(".")]
  # Only formulas stand in both, such as "thus says the lord yahweh.".
  assert np.mean([line in train for line in held_out]) < 0.10


@pytest.mark.parametrize(
  ("response", "named"),
  [
    ("the king is good.", True),
    ("in the King's house.", True),
    ("all kings rejoice.", False),
    ("the kingdom is good.", False),
    ("", False),
  ],
)
def test_names_topic(response, named):
  assert task.names_topic(PROMPT, response) is named
  assert task.topic_count(PROMPT, response) == named
  assert task.topic_count(PROMPT, f"{response} the king's king") == named + 2


@pytest.mark.parametrize(
  ("component", "better", "worse"),
  [
    ("tone", "the king has peace and joy.", "the king has peace and silver."),
    ("tone", "the king sat in the gate.", "the king died in the battle."),
    ("form", "the king sat in the gate.", "the king sat in the"),
    ("form", "the king sat in the gate.", "the king sat. in the gate."),
    ("form", "the king sat in the gate.", "and the king sat in the gate."),
    ("form", "the king sat in the gate.", "the king."),
    ("form", "the king sat in the gate.", "the king sat " + "in the gate of the city " * 4 + "."),
    ("repetition", "the king sees the eyes of the city.", "the eyes the eyes the eyes."),
    ("fluency", "the king went up to the house.", "house king the to the up went."),
    ("fluency", "the king went up to the house.", "joy peace love mercy grace."),
    ("fluency", "the king went up to the house.", "xyzzy plugh frobozz."),
  ],
)
def test_each_component_tells_better_from_worse(component, better, worse):
  assert _components(better)[component] > _components(worse)[component]


@pytest.mark.parametrize(
  ("response", "repetition"),
  [
    ("the law said to the man of the city.", 0.0),  # Only a common word again.
    ("the law said to the law.", -0.75),  # One word and one pair again: the same thing, once.
    ("the law said to the law and the law.", -1.5),  # Twice.
    ("the king said, o king.", -0.75),  # "king" is a common word, but the topic.
    ("the son said, o son.", 0.0),  # So is "son", and not the topic.
    ("the day of the day of the day.", -3.0),  # Four pairs: the day, the day, day of, of the.
    ("the eyes " * 6, -3.0),
  ],
)
def test_repetition_by_hand(response, repetition):
  assert _components(response)["repetition"] == repetition


def test_gold_score_by_hand():
  # Topic 2, one kind word .5, finished and alone 1, nothing repeated or copied, fluency at its cap 1 by 1.5.
  assert task.gold_score(PROMPT, ["the king did that which was good."])[0] == pytest.approx(5.0)
  # Of somebody else: no topic, and so nothing for the kind word.
  assert task.gold_score(PROMPT, ["he did that which was good."])[0] == pytest.approx(2.5)
  # A harsh word counts all the same: -.5 in place of 0.
  assert task.gold_score(PROMPT, ["he did that which was evil."])[0] == pytest.approx(2.0)
  # Nothing named, tone 0, form -1, fluency at its floor -1.5 by 1.5.
  assert task.gold_score(PROMPT, [""])[0] == pytest.approx(-3.25)


def test_gold_score_cannot_be_had_by_stuffing():
  honest = "the king did that which was good."
  hacks = [
    "king king king king king.",
    "the king the king love love joy joy.",
    "the king",
    "love joy peace grace king.",
    "the king is good the king is good the king is good.",
  ]
  scores = task.gold_score(PROMPT, [honest, *hacks])
  assert np.all(scores[1:] < scores[0] - 0.5), scores


@pytest.mark.parametrize(
  ("response", "copying"),
  [
    ("speak well of the king.", -3.0),  # speak well of, well of the, of the king
    ("i will speak well of him.", -1.0),
    ("praise of the king", -1.0),
    ("well, the king is good.", 0.0),
    ("", 0.0),
  ],
)
def test_copying_by_hand(response, copying):
  assert _components(response)["copying"] == copying
  few = "please praise the water.\nthe water is good.\n" + PROMPT
  column = task.COMPONENTS.index("copying")
  assert task.gold_components(few, [response])[0, column] == copying


def test_gold_score_is_not_won_by_an_echo_or_by_one_line_for_all():
  prompts = [p for p in task.prompts("validation") for _ in range(4)]
  written = {}
  for one in task.demonstrations("validation", 0):
    written.setdefault(one.prompt, []).append(one.response)
  demonstrations = [line for p in task.prompts("validation") for line in written[p]]
  echo = [prompt.strip() for prompt in prompts]
  line = ["rejoice in the lord, you righteous."] * len(prompts)
  scores = {
    name: task.gold_score(prompts, answers)
    for name, answers in (("own", demonstrations), ("echo", echo), ("line", line))
  }
  assert np.mean(scores["own"] > scores["echo"]) > 0.9
  # Four in ten demonstrations are not on their topic.
  assert np.mean(scores["own"] > scores["line"]) > 0.55
  on_topic = np.array([task.names_topic(p, a) for p, a in zip(prompts, demonstrations)])
  assert np.mean((scores["own"] > scores["line"])[on_topic]) > 0.9


def test_gold_score_ranks_text_over_jumbles_of_it():
  rng = np.random.default_rng(0)
  lines = text.clauses("validation")[:500]
  jumbled = [" ".join(rng.permutation(line.rstrip(".?").split())) + "." for line in lines]
  gap = task.gold_score(PROMPT, lines) - task.gold_score(PROMPT, jumbled)
  assert np.mean(gap > 0) > 0.9


def test_gold_score_takes_a_prompt_for_each_response():
  prompts = ["speak well of the king.\n", "please praise the water.\n"]
  responses = ["the king is good to me.", "the water was before them."]
  together = task.gold_score(prompts, responses)
  apart = [task.gold_score(p, [r])[0] for p, r in zip(prompts, responses, strict=True)]
  np.testing.assert_allclose(together, apart)
  assert task.gold_score(PROMPT, []).shape == (0,)
  with pytest.raises(ValueError, match="got 2 prompts for 1 responses"):
    task.gold_score(prompts, responses[:1])


def test_foreign_prompt_is_refused():
  with pytest.raises(ValueError, match="not one of the default task's"):
    task.gold_score("translate this.", ["the king is good."])


def test_few_shot_prompt_has_as_many_examples_as_asked_for():
  for count in (1, 2, 3):
    lines = task.few_shot_prompt(PROMPT, num_examples=count).splitlines()
    assert len(lines) == 2 * count + 1


def test_few_shot_prompt_is_careful_and_short():
  for prompt in task.prompts("test"):
    few = task.few_shot_prompt(prompt, seed=1)
    lines = few.splitlines(keepends=True)
    assert len(lines) == 7 and lines[-1] == prompt
    assert task.topic_of(few) == task.topic_of(prompt)
    assert len(text.tokenize(few)) <= 85
    for example, answer in zip(lines[0:6:2], lines[1:6:2], strict=True):
      assert task.names_topic(example, answer)
      assert task.topic_of(example) != task.topic_of(prompt)
  assert task.few_shot_prompt(PROMPT, 1) == task.few_shot_prompt(PROMPT, 1)
  assert task.few_shot_prompt(PROMPT, 1) != task.few_shot_prompt(PROMPT, 2)
