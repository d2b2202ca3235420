r"""Pretraining on documents, which makes the base model that stands in for GPT-3 if no weights are given.

Paper: not part of it; the paper starts from GPT-3 (arXiv:2005.14165), 3,640 petaflop/s-days at 175B (sec 5.1).
Does: next-token training on packed rows of `data.documents`; writes `pretrain/`. Stages that need a base for the reward
  model train `reward_pretrain/` in the same way.
Cost at `tiny`: the first stage of the default run; the README has the times.

  python -m instructjax.main --config=configs/pretrain.py --workdir=runs/demo

To train at another size (models.py lists the presets), on your own text. Released shapes are trained from scratch too
if `model.weights` names no weights, because nothing is ever downloaded.

  python -m instructjax.main --config=configs/pretrain.py:gpt3_125m --workdir=runs/125m \
    --config.data.documents=jsonl:documents.jsonl.gz
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("pretrain", preset)
