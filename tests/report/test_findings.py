"""Tests of instructjax.findings: numbers worked out by hand, and each `holds` both ways."""

import dataclasses

import numpy as np
import pytest

from instructjax.core import results as core_results
from instructjax.report import findings
from instructjax.report.results import BestAtKL, Measured, Results

NUM_PROMPTS = 20


def _rows(loss: float) -> np.ndarray:
  """Four rows of held-out text with this loss per token."""
  tokens = np.array([3.0, 5.0, 8.0, 4.0])
  return np.stack([loss * tokens, tokens], axis=1)


def _policy(gold: float, reward: float, kl: float | None, topics: int) -> Measured:
  full = np.ones(NUM_PROMPTS)
  return Measured(
    answer=[f"answer {i}" for i in range(NUM_PROMPTS)],
    reward=reward * full,
    gold=gold * full,
    ended=np.arange(NUM_PROMPTS) < 15,
    length=7 * full,
    repeats=np.zeros(NUM_PROMPTS, bool),
    copied=np.zeros(NUM_PROMPTS),
    names_topic=np.arange(NUM_PROMPTS) < topics,
    topic_again=np.arange(NUM_PROMPTS) < topics // 2,
    kl=None if kl is None else kl * full,
  )


def _judgement(accuracy: float) -> core_results.Judgement:
  return core_results.Judgement(
    accuracy=accuracy,
    accuracy_stderr=0.01,
    pairs=100,
    prompts=50,
    score_std=2.0,
    calibration=core_results.Calibration((), (), (), 0.0),
  )


@pytest.fixture
def results() -> Results:
  """A run in which every finding holds, with the same numbers for every prompt."""
  return Results(
    samples_per_prompt=1,
    measured={
      "base": _policy(0.0, -1.0, None, 2),
      "reward_base": _policy(0.2, -0.9, None, 3),
      "few_shot": _policy(0.5, -0.5, None, 5),
      "sft": _policy(1.0, 0.0, 1.0, 10),
      "ppo_init": _policy(1.0, 0.0, 0.0, 10),
      "ppo": _policy(2.0, 1.0, 5.0, 15),
      "ppo_ptx": _policy(2.1, 0.9, 6.0, 18),
      "ppo_beta0": _policy(0.3, 3.0, 60.0, 1),
    },
    pretraining={
      "base": _rows(3.5),
      "sft": _rows(4.0),
      "ppo_init": _rows(3.6),
      "ppo": _rows(4.5),
      "ppo_ptx": _rows(3.7),
    },
    reward_model=core_results.RewardModel(
      demonstration_mean=0.0,
      validation=_judgement(0.70),
      heldout_labelers=_judgement(0.69),
      cross_validation=(
        core_results.Fold(heldout=0.6, train=0.7),
        core_results.Fold(heldout=0.7, train=0.74),
      ),
    ),
    agreement=core_results.LabelerGroups(
      train=core_results.Agreement(0.73, 0.01, 0.1), heldout=core_results.Agreement(0.71, 0.01, 0.1)
    ),
    best_of_n=(),
    best_at_kl={"ppo_ptx": BestAtKL(8, 1.2, True, 1.5, 0.5, 0.75 * np.ones(NUM_PROMPTS))},
    untrained={
      "echo": _policy(-1.0, -1.0, None, 20),
      "demonstrations": _policy(3.0, 1.0, None, 20),
    },
    new_topics={"sft": _policy(1.0, 0.0, 1.0, 1), "ppo_ptx": _policy(1.5, 1.0, 6.0, 2)},
    gold_words="Good answers are good.",
    shots={},
    curves={},
    rounds=(),
    checkpoints={},
  )


def _find(results: Results) -> dict:
  return {f["id"]: f for f in findings.find(results, bootstrap=200, seed=0)}


def test_every_finding_holds_and_measures_what_it_says(results):
  found = _find(results)
  assert all(finding["holds"] is True for finding in found.values())
  assert found["preferred_over_base"]["measured"] == {"zero_shot": 1.0, "few_shot": 1.0}
  assert found["preferred_over_base"]["interval"] == [[1.0, 1.0], [1.0, 1.0]]
  assert found["rl_over_sft"]["measured"] == {"ppo": 1.0, "ppo_ptx": 1.0}
  # Losses per token 4.5, 3.7 and 4.0, 3.5; rewards 1.0 and 0.9 over a spread of 2.
  assert found["alignment_tax"]["measured"] == pytest.approx(
    {
      "ppo_minus_sft": 0.5,
      "ppo_ptx_minus_sft": -0.3,
      "ppo_ptx_minus_base": 0.2,
      "reward_gap_in_rm_std": 0.05,
    }
  )
  assert found["reward_model"]["measured"] == pytest.approx(
    {
      "accuracy": 0.70,
      "labeler_agreement": 0.73,
      "heldout_labelers": 0.69,
      "cross_validation_train": 0.72,
      "cross_validation_heldout": 0.65,
    }
  )
  np.testing.assert_allclose(found["reward_model"]["interval"][0], [0.6804, 0.7196])
  assert found["kl_bounded"]["measured"] == {"ppo": 5.0, "ppo_ptx": 6.0}
  change = found["overoptimization"]["measured"]
  assert change == pytest.approx({"reward_change": 3.0, "gold_change": -0.7, "kl": 60.0})
  gain = found["topic_following"]["measured"]["ppo_ptx_minus_sft"]
  ((low, high),) = found["topic_following"]["interval"]
  assert gain == pytest.approx(0.4) and low <= gain <= high
  shares = {k: found["topic_following"]["measured"][k] for k in ("sft", "ppo", "ppo_ptx")}
  assert shares == pytest.approx({"sft": 0.5, "ppo": 0.75, "ppo_ptx": 0.9})


def _measured(name, **values):
  """The results with other measurements of one policy."""
  change = lambda r: r.measured | {name: dataclasses.replace(r.measured[name], **values)}
  return lambda r: dataclasses.replace(r, measured=change(r))


def _gold(name, value):
  return _measured(name, gold=value * np.ones(NUM_PROMPTS))


def _reward(name, value):
  return _measured(name, reward=value * np.ones(NUM_PROMPTS))


def _loss(name, value):
  return lambda r: dataclasses.replace(r, pretraining=r.pretraining | {name: _rows(value)})


def _kl(values):
  return _measured("ppo", kl=np.resize(np.array(values, float), NUM_PROMPTS))


def _judged(group, **values):
  """The results with other measurements of the reward model."""

  def change(r):
    judged = dataclasses.replace(getattr(r.reward_model, group), **values)
    return dataclasses.replace(
      r, reward_model=dataclasses.replace(r.reward_model, **{group: judged})
    )

  return change


def _validation(**values):
  return _judged("validation", **values)


def _heldout(accuracy):
  return _judged("heldout_labelers", accuracy=accuracy)


def _topics(count):
  return _measured("ppo_ptx", names_topic=np.arange(NUM_PROMPTS) < count)


def _repeats(count):
  return _measured("ppo_ptx", repeats=np.arange(NUM_PROMPTS) < count)


def _other(part, name, gold):
  """The results with another gold score of answers that are not in `measured`."""

  def change(r):
    found = dict(getattr(r, part))
    found[name] = dataclasses.replace(found[name], gold=gold * np.ones(NUM_PROMPTS))
    return dataclasses.replace(r, **{part: found})

  return change


def _untrained(name, gold):
  return _other("untrained", name, gold)


def _new(name, gold):
  return _other("new_topics", name, gold)


def _best_of_n(rate):
  best = BestAtKL(8, 1.2, True, 1.5, 0.5, rate * np.ones(NUM_PROMPTS))
  return lambda r: dataclasses.replace(r, best_at_kl={"ppo_ptx": best})


def _alone(**values):
  """No labelers to compare with: the reward model need only beat chance."""
  return lambda r: dataclasses.replace(_validation(**values)(r), agreement=None)


@pytest.mark.parametrize(
  "id_, change, holds",
  [
    ("preferred_over_base", _gold("reward_base", 3.0), False),
    ("preferred_over_base", _gold("few_shot", 3.0), False),
    ("preferred_over_base", _gold("few_shot", 2.1), False),  # all equal: exactly one half
    ("preferred_over_base", _gold("few_shot", 2.0), True),
    ("rl_over_sft", _gold("ppo", 0.9), False),
    ("rl_over_sft", _gold("ppo_ptx", 0.9), False),
    ("rl_over_sft", _gold("ppo", 1.1), True),
    ("alignment_tax", _loss("ppo", 3.9), False),
    ("alignment_tax", _loss("ppo_ptx", 4.1), False),
    ("alignment_tax", _loss("ppo_ptx", 3.9), True),
    ("alignment_tax", _reward("ppo_ptx", 1 - 2 * 0.36), False),
    ("alignment_tax", _reward("ppo_ptx", 1 + 2 * 0.36), False),
    ("alignment_tax", _reward("ppo_ptx", 1 - 2 * 0.34), True),
    # The difference to .73 is known within 1.96 * sqrt(2) * .01 = .028: .67 is the threshold.
    ("reward_model", _validation(accuracy=0.64), False),
    ("reward_model", _validation(accuracy=0.67), None),
    ("reward_model", _validation(accuracy=0.70), True),
    # And .66 the threshold for those on held-out labelers.
    ("reward_model", _heldout(0.63), False),
    ("reward_model", _heldout(0.66), None),
    ("reward_model", _heldout(0.69), True),
    ("reward_model", _alone(accuracy=0.55, accuracy_stderr=0.03), None),
    ("reward_model", _alone(accuracy=0.40, accuracy_stderr=0.03), False),
    ("reward_model", _alone(accuracy=0.55, accuracy_stderr=0.02), True),
    ("kl_bounded", _kl([12.1]), False),
    ("kl_bounded", _kl([11.9]), True),
    ("kl_bounded", _kl([0.0, 20.0]), None),  # mean 10, but the interval reaches over 12
    ("overoptimization", _gold("ppo_beta0", 1.1), False),
    ("overoptimization", _reward("ppo_beta0", -0.1), False),
    ("overoptimization", _gold("ppo_beta0", 0.9), True),
    ("topic_following", _topics(10), False),
    ("topic_following", _topics(14), None),
    ("topic_following", _topics(18), True),
    ("own_words", _repeats(0), True),
    ("own_words", _repeats(2), None),
    ("own_words", _repeats(8), False),
    ("own_words", _measured("ppo_ptx", copied=0.11 * np.ones(NUM_PROMPTS)), False),
    ("own_words", _measured("ppo_ptx", copied=0.09 * np.ones(NUM_PROMPTS)), True),
    ("own_words", _measured("ppo_ptx", answer=["one"] * NUM_PROMPTS), False),
    ("over_untrained", _untrained("echo", 3.0), False),
    ("over_untrained", _untrained("echo", 2.1), False),  # one half
    ("over_untrained", _untrained("demonstrations", 1.0), True),
    ("over_best_of_n", _best_of_n(0.4), False),
    ("over_best_of_n", _best_of_n(0.6), True),
    ("new_topics", _new("ppo_ptx", 0.9), False),
    ("new_topics", _new("ppo_ptx", 1.1), True),
  ],
)
def test_holds_both_ways(results, id_, change, holds):
  assert _find(change(results))[id_]["holds"] is holds


def test_findings_about_what_was_not_measured_are_left_out(results):
  measured = {
    name: dataclasses.replace(found, gold=None, names_topic=None, topic_again=None)
    for name, found in results.measured.items()
    if name not in ("reward_base", "few_shot", "ppo")
  }
  pretraining = {name: rows for name, rows in results.pretraining.items() if name != "ppo"}
  bare = dataclasses.replace(
    results, measured=measured, pretraining=pretraining, best_at_kl={}, untrained={}, new_topics={}
  )
  assert set(_find(bare)) == {"rl_over_sft", "reward_model", "kl_bounded", "own_words"}
  rest = {name: found for name, found in measured.items() if name not in ("ppo_ptx", "ppo_beta0")}
  assert set(_find(dataclasses.replace(bare, measured=rest))) == {"reward_model"}


def test_a_run_from_a_given_policy_and_reward_model_has_fewer_findings(results):
  """No base, no baseline and no rankings: what compares with them is left out."""
  kept = ("ppo_init", "ppo", "ppo_ptx")
  bare = dataclasses.replace(
    results,
    measured={name: results.measured[name] for name in kept},
    pretraining={name: results.pretraining[name] for name in kept},
    reward_model=core_results.RewardModel(None, None, None, ()),
    agreement=None,
    best_at_kl={},
    untrained={},
    new_topics={},
  )
  assert set(_find(bare)) == {"kl_bounded", "own_words"}


def _scored(gold, reward=()) -> Measured:
  gold = None if gold is None else np.array(gold, float)
  return Measured([], np.array(reward), *[None] * 3, gold, *[None] * 4)


def test_win_matrix_has_every_pair_twice_and_sums_to_one(results):
  rng = np.random.default_rng(2)
  measured = {name: _scored(rng.integers(0, 3, 30)) for name in "abc"}
  results = dataclasses.replace(results, measured=measured)
  wins = findings.win_matrix(results, bootstrap=50, seed=0)
  assert {a: set(row) for a, row in wins.items()} == {a: set("abc") - {a} for a in "abc"}
  for a, b in ("ab", "bc", "ca"):
    assert wins[a][b][0] + wins[b][a][0] == pytest.approx(1)
  assert wins == findings.win_matrix(results, bootstrap=50, seed=0)


def test_summary_has_means_and_pretraining_loss(results):
  rows = findings.summary(results)
  assert rows["sft"] == pytest.approx(
    {
      "gold": 1.0,
      "reward": 0.0,
      "kl": 1.0,
      "names_topic": 0.5,
      "topic_again": 0.25,
      "repeats": 0.0,
      "copied": 0.0,
      "distinct": 1.0,
      "length": 7.0,
      "ended": 0.75,
      "pretrain_loss": 4.0,
    }
  )
  assert "kl" not in rows["base"] and "pretrain_loss" not in rows["few_shot"]
  assert rows["echo"]["gold"] == -1.0
  assert rows["best_of_n/ppo_ptx"] == {"gold": 1.5, "reward": 0.5, "kl": 1.2, "n": 8.0}
