"""The supervised baseline: fine-tuning the base on demonstrations.

Paper: sec 3.5, C.1: 16 epochs, residual dropout .2, cosine to 10%; the epoch is chosen by
  reward-model score. 4.9 petaflop/s-days at 175B (sec 5.1).
Does: pretrain -> sft; writes `sft/`, a checkpoint an epoch. The epoch with the best validation
  loss counts until a reward model is there to choose (`sft_select/`, in the RL runs).
Cost at `tiny`: the README has the times.

  python -m instructjax.main --config=configs/sft.py --workdir=runs/demo
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("sft", preset)
