"""Made-up finished runs for the tests of comparisons: small numbers that can be worked out by hand."""

import dataclasses
import json

from instructjax.core import provenance
from instructjax.report.comparison_groups import Run

MADE = provenance.Provenance(
  version="1.2.3",
  commit="abc123",
  command="instructjax run",
  date="2026-03-01T12:00:00Z",
  seconds=60.0,
  sources={},
  hardware=provenance.Hardware("cpu", 1, 1, "EPYC", 2),
  libraries={},
)


def run(seed: int, beta: float = 0.02, **changes) -> Run:
  """A run whose numbers grow with the seed: gold of PPO-ptx is 3 + seed, and 1 less for each unit of beta."""
  gold = 3.0 + seed - beta
  stages = ("sft", "ppo_init", "ppo_ptx", "evaluate")
  log = [
    {"step": i + 1, "kl": float(i), "gold": 2.0 + i * 0.1, "reward": 0.2 * i, "seconds": 1.0}
    for i in range(20)
  ]
  own = dict(
    name=f"beta{beta}/seed{seed}",
    seed=seed,
    settings={
      ("ppo_ptx", "ppo.beta"): json.dumps(beta),
      ("ppo_ptx", "ppo.gamma"): "0.3",
      ("sft", "sft.num_epochs"): "2",
    },
    findings=[
      {
        "id": "rl_over_sft",
        "claim": "Answers after PPO are preferred to the best of n = 40. (The loss is 0.10 nats lower.)",
        "rule": "the interval of each win rate lies above 50%",
        "measured": {"ppo_ptx": 0.6 + 0.1 * seed},
        "interval": [[0.5, 0.7]],
        "holds": (True, False, None)[seed % 3],
      }
    ],
    policies={
      "sft": {"gold": 2.0, "reward": 0.0, "kl": 1.0, "pretrain_loss": 3.0},
      "ppo_init": {"gold": 2.0, "reward": 0.0, "kl": 0.0, "pretrain_loss": 3.0},
      "ppo_ptx": {"gold": gold, "reward": 1.0, "kl": 4.0, "pretrain_loss": 3.1, "repeats": 0.2},
    },
    best_of_n=[],
    reward_std=0.5,
    curves={"ppo_ptx": log},
    logs={"ppo_ptx": log},
    made={stage: dataclasses.replace(MADE) for stage in stages},
  )
  return Run(**(own | changes))
