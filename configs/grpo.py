r"""GRPO: PPO's loop without a value network, on the same reward model.

Not in the paper. DeepSeekMath, Shao et al. 2024, arXiv:2402.03300. Answers to a prompt are compared
  in standard deviations of their scores; the KL is in the loss.
Does: runs everything up to the reward model, then ppo_init, grpo and the RL stages in `evaluate.compare`. Ends with the
  report, which shows what each gains at equal KL.

  python -m instructjax.main --config=configs/grpo.py --workdir=runs/demo

Beside PPO and the other baseline, all in one run:

  python -m instructjax.main --config=configs/ppo_ptx.py --workdir=runs/demo \
    '--config.evaluate.compare=("ppo", "rloo", "grpo")'
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("grpo", preset)
