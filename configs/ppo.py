r"""PPO without the pretraining mix (gamma = 0), which is the policy that pays the alignment tax.

Paper: sec 3.5 eq. 2, C.4: 256k episodes in batches of 512, minibatches of 64, beta .02, clip .2, EMA .992. The
  pretraining mix would double the time of RL training (E.11).
Does: runs everything up to the reward model, then ppo_init, ppo and the RL stages in `evaluate.compare`. Ends with the
  report.
Cost at `tiny`: the README has the times.

  python -m instructjax.main --config=configs/ppo.py --workdir=runs/demo

PPO alone, without the runs it is compared with:

  python -m instructjax.main --config=configs/ppo.py --workdir=runs/ppo \
    '--config.evaluate.compare=()' --config.evaluate.overoptimization=False
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("ppo", preset)
