"""Compares a run's policies with each other: win rates, KL, pretraining loss, and the report.

Paper: sec 4, figs. 1 and 4, E.6, E.7. The judge is the gold score of the simulated task or, on your own data, the
  reward model.
Does: runs the RL stages in `evaluate.compare` and the stages that they need, unless they are finished, and then writes
  the report.
Cost: sampling and scoring `num_prompts * samples_per_prompt` answers per policy.

  python -m instructjax.main --config=configs/evaluate.py --workdir=runs/demo
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("evaluate", preset)
