"""Measuring a run's policies against each other: win rates, KL, pretraining loss, the report.

Paper: sec 4, figs. 1 and 4, E.6, E.7. The judge is the simulated task's gold score or, on your own
  data, the reward model.
Does: `evaluate.compare`'s RL stages with all that they need, where they are not finished, then the
  report.
Cost: sampling and scoring `num_prompts * samples_per_prompt` answers of each policy.

  python -m instructjax.main --config=configs/evaluate.py --workdir=runs/demo
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("evaluate", preset)
