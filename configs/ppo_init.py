"""The model that PPO starts from and uses as its KL reference, trained on demonstrations mixed with pretraining text.

Paper: C.3, E.8: from GPT-3, 2 epochs, 10% pretraining data, cosine to 10%. It is not the supervised baseline of C.1.
Does: pretrain -> ppo_init; writes `ppo_init/`. PPO uses its last step, not its best one.
Cost at `tiny`: about that of sft; the README has the times.

  python -m instructjax.main --config=configs/ppo_init.py --workdir=runs/demo
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("ppo_init", preset)
