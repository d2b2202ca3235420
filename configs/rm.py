r"""The reward model: one score an answer, trained on all pairs of each prompt's ranked answers.

Paper: sec 3.5 eq. 1, C.2: one epoch, 64 prompts a batch, K = 4 to 9 answers, ties dropped, then a
  bias that makes demonstrations score 0 on average. Accuracy (sec 4.1): 72.4+-0.4% on training
  labelers, 69.6+-0.9% on held-out ones. Table 6's 33,207 prompts are 519 steps.
Does: pretrain -> reward_pretrain -> sft -> collect -> rm. `collect` samples sft's answers and has
  simulated labelers rank them; it is left out when `data.comparisons` names your own.
Cost at `tiny`: the README has the times.

  python -m instructjax.main --config=configs/rm.py --workdir=runs/demo

Without sec 4.1's cross-validation over groups of labelers, whose five folds cost as much again:

  python -m instructjax.main --config=configs/rm.py --workdir=runs/rm \
    --config.rm.cross_validation_folds=0
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("rm", preset)
