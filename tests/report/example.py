"""The results of an imagined run in which everything was measured. Called by the tests of the report."""

import dataclasses

import numpy as np

from instructjax.core import results as core_results
from instructjax.ops import preference
from instructjax.report.results import BestAtKL, BestOfN, Measured, Results

PROMPTS = [f"say <b>{i // 2}</b> & more\n" for i in range(24)]  # two samples a prompt
NASTY = '<script>alert("x")</script>'


def measured_policy(rng, gold: float, has_kl: bool) -> Measured:
  return Measured(
    answer=[f"answer {i} {NASTY}" for i in range(24)],
    reward=rng.normal(gold, 1, 24).astype(np.float32),
    gold=rng.normal(gold, 1, 24),
    ended=rng.random(24) < 0.8,
    length=rng.integers(3, 9, 24),
    repeats=rng.random(24) < 0.2,
    copied=0.1 * rng.random(24),
    names_topic=rng.random(24) < 0.5,
    topic_again=rng.random(24) < 0.2,
    kl=rng.normal(4, 1, 24) if has_kl else None,
  )


def judged(accuracy: float) -> core_results.Judgement:
  found = preference.calibration(np.linspace(-1, 3, 50))
  return core_results.Judgement(
    accuracy=accuracy,
    accuracy_stderr=0.01,
    pairs=50,
    prompts=25,
    score_std=1.0,
    calibration=core_results.Calibration(*map(tuple, found[:3]), found.expected_error),
  )


def reward_model() -> core_results.RewardModel:
  folds = (core_results.Fold(heldout=0.6, train=0.7), core_results.Fold(heldout=0.64, train=0.7))
  return core_results.RewardModel(0.0, judged(0.70), judged(0.68), folds)


def results() -> Results:
  rng = np.random.default_rng(0)
  golds = {
    "base": 0, "reward_base": 0, "few_shot": 0.5, "sft": 1, "ppo_init": 1, "ppo": 2, "ppo_ptx": 2,
    "ppo_beta0": 0,
  }  # fmt: skip
  measured = {n: measured_policy(rng, g, i > 2) for i, (n, g) in enumerate(golds.items())}
  texts = [name for name in golds if name not in ("reward_base", "few_shot")]
  curves = {
    name: [
      {"step": s, "reward": 0.1 * s, "kl": 0.4 * s - 0.5, "gold": 1.0, "entropy": 9.0 - s,
       "response_length": 6.0, "eos": 1.0} | ({"validation/pretrain_loss": 3.0} if s in (1, 4) else {})
      for s in range(1, 6)
    ]
    for name in ("ppo", "ppo_ptx", "ppo_beta0")
  }  # fmt: skip
  agreement = core_results.Agreement(0.72, 0.01, 0.1)
  return Results(
    samples_per_prompt=2,
    measured=measured,
    pretraining={n: np.array([[30.0 + i, 10.0], [31.0, 10.0]]) for i, n in enumerate(texts)},
    reward_model=reward_model(),
    agreement=core_results.LabelerGroups(train=agreement, heldout=agreement),
    best_of_n=[
      BestOfN(
        n=n,
        kl=float(np.log(n) - (n - 1) / n),
        gold=1 + np.log(n),
        reward=np.log(n),
        by_prompt=1 + np.log(n) * np.array([0.5, 1.5]),
      )
      for n in (1, 2, 4, 8)
    ],
    best_at_kl={
      name: BestAtKL(6, 0.96, True, 1.9, 1.0, rng.random(12)) for name in ("ppo", "ppo_ptx")
    },
    untrained={
      name: measured_policy(rng, 0, has_kl=False)
      for name in ("echo", "best_line", "random_line", "demonstrations")
    },
    new_topics={name: found.take(np.arange(8)) for name, found in measured.items()},
    gold_words="A good answer is good.",
    shots={0: 0.1, 1: 0.5, 2: 0.4, 3: 0.3},
    curves=curves,
    rounds=(),
    checkpoints={},
  )


def with_checkpoints() -> Results:
  """The same run with two checkpoints of each RL policy."""
  rng, found = np.random.default_rng(1), results()
  kept = {name: {s: measured_policy(rng, 1 + s, True) for s in (2, 4)} for name in found.curves}
  return dataclasses.replace(found, checkpoints=kept)
