r"""Pretraining on documents: the base model that stands in for GPT-3 when no weights are given.

Paper: none; it starts from GPT-3 (arXiv:2005.14165), 3,640 petaflop/s-days at 175B (sec 5.1).
Does: packed next-token training on `data.documents`; writes `pretrain/`. The reward model's base,
  `reward_pretrain/`, is made the same way by the stages that need it.
Cost at `tiny`: the first stage of the default run; the README has the times.

  python -m instructjax.main --config=configs/pretrain.py --workdir=runs/demo

At another size (models.py lists the presets), on text of your own. The shapes of released models
are trained from scratch too where `model.weights` names no weights: nothing is ever fetched.

  python -m instructjax.main --config=configs/pretrain.py:gpt3_125m --workdir=runs/125m \
    --config.data.documents=jsonl:documents.jsonl.gz
"""

from configs import models


def get_config(preset: str | None = None):
  return models.get("pretrain", preset)
