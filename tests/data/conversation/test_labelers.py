"""Labelers who read with the ratings of people: who reads which, ranks by hand, and how far they agree."""

import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data.conversation import labelers, task

FLUENT = lambda prompts, responses: np.full(len(responses), -2.5)
QUIET = labelers.Labeler("quiet", 0, tuple(task.GOLD_WEIGHTS.tolist()))


def answered(num_prompts):
  """Prompts with five answers: one of people's, others cut, unfinished, harsh and kind."""
  pairs = task.demonstrations("train", 0)[:num_prompts]
  return [
    (
      one.prompt,
      [
        one.response,
        " ".join(one.response.split()[:2]),
        one.response.rstrip(".?!"),
        f"I hate {task.said_in(one.prompt).lower()}",
        f"Thank you, {one.response}",
      ],
    )
    for one in pairs
  ]


def test_held_out_labelers_read_with_ratings_that_train_nobody():
  train, held_out = labelers.labelers("train", 0), labelers.labelers("heldout", 0)
  assert [one.column for one in train] == [0, 1, 2, 3, 4, 5, 6]
  assert [one.column for one in held_out] == [7, 8, 9]
  norms = [np.linalg.norm(one.weights) for one in train + held_out]
  np.testing.assert_allclose(norms, np.linalg.norm(task.GOLD_WEIGHTS))
  assert train != labelers.labelers("train", 1)
  with pytest.raises(UserError, match="group='dev' of labelers must be one of"):
    labelers.labelers("dev", 0)


def test_a_quiet_labeler_ranks_by_the_parts(packages, monkeypatch):
  monkeypatch.setattr(labelers, "_NOISE", 0.0)
  prompt = task.prompt_of("What is your favorite book?")
  responses = [
    "I love a good book.",
    "I hate this horrible awful book.",
    "I love a good dog.",
    "I love a good book.",
  ]
  ranks = labelers.rank(QUIET, prompt, responses, FLUENT(None, responses), np.random.default_rng(0))
  # On topic and kind, twice; kind alone loses the topic's 2; harsh loses more than 2 of tone.
  assert ranks == (1, 3, 2, 1)


def test_rankings_name_their_labeler_and_repeat(packages):
  pairs = answered(12)
  first = labelers.collect_rankings(pairs, FLUENT, "train", 0)
  assert first == labelers.collect_rankings(pairs, FLUENT, "train", 0)
  assert first != labelers.collect_rankings(pairs, FLUENT, "train", 1)
  assert {one.labeler.split("_")[0] for one in first} == {"train"}
  alone = labelers.collect_rankings(pairs[:1], FLUENT, "train", 0)
  assert alone == first[:1]  # a ranking does not depend on those after it
  with pytest.raises(UserError, match="has 1 responses to rank"):
    labelers.collect_rankings([(pairs[0][0], ["one"])], FLUENT)


def test_two_people_agree_as_often_as_the_papers(packages):
  for group in ("train", "heldout"):
    found = labelers.agreement(answered(120), FLUENT, group, 0)
    assert 0.65 < found["agreement"] < 0.9 and 0.02 < found["tie_rate"] < 0.25
