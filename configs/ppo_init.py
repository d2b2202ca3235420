"""PPO's start and its frozen KL reference: demonstrations with pretraining text mixed in.

Paper: C.3, E.8: from GPT-3, 2 epochs, 10% pretraining data, cosine to 10%. Not the baseline of C.1.
Does: pretrain -> ppo_init; writes `ppo_init/`. The last step is used, not the best one.
Cost at `tiny`: about that of sft; the README has the times.

  python -m instructjax.main --config=configs/ppo_init.py --workdir=runs/demo
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("ppo_init", preset)
