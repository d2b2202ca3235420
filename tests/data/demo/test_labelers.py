"""Simulated labelers: ranks, ties, determinism, and agreement as in the paper."""

import itertools

import numpy as np
import pytest

from instructjax.data.demo import labelers, task, text

PROMPT = "speak well of the king.\n"
QUIET = labelers.Labeler("quiet", tuple(task.GOLD_WEIGHTS.tolist()), noise=0.0, tie_width=0.3)


def _samples(seed, num_prompts):
  """Prompts with 4 to 9 answers like an SFT model's: half off topic, many with a slip in them."""
  rng = np.random.default_rng(seed)
  lines, by_topic = task._lines("validation")
  vocabulary = text.corpus().vocabulary[:600]
  result = []
  for prompt in task.prompts("train")[:num_prompts]:
    answers = []
    for _ in range(rng.integers(4, 10)):
      pool = lines if rng.random() < 0.55 else by_topic[task.topic_of(prompt)]
      words = pool[rng.integers(len(pool))].rstrip(".").split()
      slip = rng.random()
      if slip < 0.45:  # One or two words swapped for others.
        for _ in range(rng.integers(1, 3)):
          words[rng.integers(len(words))] = vocabulary[rng.integers(len(vocabulary))]
      elif slip < 0.60:  # Two neighbours in the wrong order.
        i = rng.integers(len(words) - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
      elif slip < 0.68:  # Unfinished.
        answers.append(" ".join(words[: rng.integers(1, len(words))]))
        continue
      answers.append(" ".join(words) + ".")
    result.append((prompt, answers))
  return result


def test_rank_components_by_hand():
  # Topic alone is worth 2, a kind word .5, form .1 here: readings 2.5, 2.0, 2.1, 0.
  components = np.zeros((4, len(task.COMPONENTS)))
  components[:3, 0] = 1.0
  components[0, 1] = 0.5
  components[2, 2] = 0.1
  # 2.1 lies .3 or more below 2.5, so a new rank; 2.0 lies .1 below 2.1, so a tie.
  ranks = labelers.rank_components(QUIET, components, np.random.default_rng(0))
  assert ranks == (1, 2, 2, 3)


def test_rank_follows_the_gold_score(bible):
  responses = ["", "the king did that which was good.", "he went up to the house."]
  assert labelers.rank(QUIET, PROMPT, responses, np.random.default_rng(0)) == (3, 1, 2)


@pytest.mark.parametrize("group", ["train", "heldout"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agreement_is_like_the_papers(bible, group, seed):
  result = labelers.agreement(_samples(seed, 192), group, seed)
  assert 0.69 < result["agreement"] < 0.79
  assert 0.10 < result["tie_rate"] < 0.20
  assert 0.0 < result["agreement_stderr"] < 0.02


def test_agreement_is_no_surer_for_a_prompt_ranked_often(bible):
  """Nine times the same answers: three times as sure only if they were other prompts."""
  samples = _samples(0, 64)
  once, often = (labelers.agreement(samples * n)["agreement_stderr"] for n in (1, 9))
  assert 0.45 * once < often < once


def test_held_out_labelers_are_others_with_wider_spreads():
  train, heldout = labelers.labelers("train", 0), labelers.labelers("heldout", 0)
  assert (len(train), len(heldout)) == (10, 5)
  assert not {labeler.id for labeler in train} & {labeler.id for labeler in heldout}
  spread = [np.std(np.log([x.weights for x in group]), axis=0).mean() for group in (train, heldout)]
  assert spread[1] > 1.3 * spread[0]
  assert labelers.labelers("train", 0) != labelers.labelers("train", 1)
  with pytest.raises(ValueError, match="group='other'"):
    labelers.labelers("other", 0)


def test_collect_rankings_is_seeded_and_mostly_follows_gold(bible):
  samples = _samples(0, 192)
  rankings = labelers.collect_rankings(samples, "train", seed=5)
  assert rankings == labelers.collect_rankings(samples, "train", seed=5)
  assert rankings != labelers.collect_rankings(samples, "train", seed=6)
  assert len({ranking.labeler for ranking in rankings}) == 10
  # By number, as in a later round: the same labelers, who rank other prompts.
  later = labelers.collect_rankings(samples, "train", seed=5, first=1000)
  assert [one.labeler for one in later] != [one.labeler for one in rankings]
  assert {one.labeler for one in later} == {one.labeler for one in rankings}
  assert labelers.collect_rankings(samples[3:], "train", seed=5, first=3) == rankings[3:]
  right = total = 0
  for ranking, (prompt, responses) in zip(rankings, samples, strict=True):
    assert (ranking.prompt, ranking.responses) == (prompt, tuple(responses))
    assert set(ranking.ranks) == set(range(1, max(ranking.ranks) + 1))
    gold = task.gold_score(prompt, responses)
    for a, b in itertools.combinations(range(len(responses)), 2):
      if ranking.ranks[a] != ranking.ranks[b]:
        right += (gold[a] > gold[b]) == (ranking.ranks[a] < ranking.ranks[b])
        total += 1
  assert 0.75 < right / total < 0.85


def test_too_few_or_too_many_responses_are_refused(bible):
  for answers in (["one answer."], ["an answer."] * 10):
    with pytest.raises(ValueError, match=f"has {len(answers)} responses to rank"):
      labelers.collect_rankings([(PROMPT, answers)])
  with pytest.raises(ValueError, match="no pair of answers"):
    labelers.agreement([])
