r"""The supervised baseline, which is the base model fine-tuned on demonstrations.

Paper: sec 3.5, C.1: 16 epochs, residual dropout .2, cosine to 10%; the epoch is chosen by reward-model score. 4.9
  petaflop/s-days at 175B (sec 5.1).
Does: pretrain -> sft; writes `sft/` with a checkpoint per epoch. The epoch with the best validation loss is used until
  a reward model can choose one (`sft_select/`, in the RL runs).
Cost at `tiny`: the README has the times.

  python -m instructjax.main --config=configs/sft.py --workdir=runs/demo

To start from weights that you have (models.py lists the presets):

  python -m instructjax.main --config=configs/sft.py:smollm2_135m --workdir=runs/smollm2 \
    --config.model.weights=PATH --config.data.documents=jsonl:documents.jsonl.gz \
    --config.data.demonstrations=jsonl:demonstrations.jsonl
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("sft", preset)
