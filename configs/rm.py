r"""The reward model, which gives each answer a score. It is trained on all pairs of each prompt's ranked answers.

Paper: sec 3.5 eq. 1, C.2: one epoch, 64 prompts per batch, K = 4 to 9 answers, ties dropped, and a bias that makes the
  mean score of demonstrations 0. Accuracy (sec 4.1): 72.4+-0.4% on training labelers, 69.6+-0.9% on held-out labelers.
  The 33,207 prompts of table 6 make 519 steps.
Does: pretrain -> reward_pretrain -> sft -> collect -> rm. `collect` samples answers from sft and lets simulated
  labelers rank them; it is skipped if `data.comparisons` names your own comparisons.
Cost at `tiny`: the README has the times.

  python -m instructjax.main --config=configs/rm.py --workdir=runs/demo

To skip the cross-validation over groups of labelers (sec 4.1), whose five folds double the cost:

  python -m instructjax.main --config=configs/rm.py --workdir=runs/rm \
    --config.rm.cross_validation_folds=0
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("rm", preset)
