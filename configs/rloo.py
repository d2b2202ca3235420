r"""RLOO: PPO's loop without a value network, on the same reward model.

Not in the paper. Ahmadian et al. 2024, arXiv:2402.14740. An answer is compared with
  the mean of the other answers to its prompt.
Does: runs everything up to the reward model, then ppo_init, rloo and the RL stages in `evaluate.compare`. Ends with the
  report, which shows what each gains at equal KL.

  python -m instructjax.main --config=configs/rloo.py --workdir=runs/demo

Beside PPO and the other baseline, all in one run:

  python -m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/demo \
    '--config.evaluate.compare=("ppo", "rloo", "grpo")'
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("rloo", preset)
