"""Presets of the paper's models: GPT-3's sizes with InstructGPT's settings. Called by models.py.

Shapes, batch sizes and pretraining rates are from table 2.1 of GPT-3 (arXiv:2005.14165). App. C of InstructGPT prints
settings for 1.3B, 6B and 175B. base.py holds those for 1.3B, and a size between two printed ones uses the settings of
the smaller one. The 6B model is assumed to be GPT-3's 6.7B, because the paper prints no shape.
"""

import functools
from typing import NamedTuple

from configs import base

CONTEXT = 2048  # GPT-3 sec 2.1
TOKENS = 300e9  # GPT-3 table 2.1's caption


class Size(NamedTuple):
  """A row of table 2.1."""

  num_layers: int
  d_model: int
  num_heads: int
  head_dim: int
  batch_size: int  # rows of 2048 tokens
  learning_rate: float


SIZES = {
  "gpt3_125m": Size(12, 768, 12, 64, 256, 6e-4),  # 0.5M tokens a batch
  "gpt3_350m": Size(24, 1024, 16, 64, 256, 3e-4),
  "gpt3_760m": Size(24, 1536, 16, 96, 256, 2.5e-4),
  # The table prints 24 heads, but 24 heads of width 128 do not make 2048. Stiennon et al. 2020, table 3, has 16.
  "gpt3_1p3b": Size(24, 2048, 16, 128, 512, 2e-4),  # 1M
  "gpt3_2p7b": Size(32, 2560, 32, 80, 512, 1.6e-4),
  "gpt3_6p7b": Size(32, 4096, 32, 128, 1024, 1.2e-4),  # 2M
  # The table prints d_model 5140, but 40 heads of width 128 make 5120, as in Stiennon et al. 2020, table 3.
  "gpt3_13b": Size(40, 5120, 40, 128, 1024, 1e-4),
  # 3.2M tokens are 1562.5 rows. Departs from paper: pretrain.batch_size=1536, which can be divided over a mesh.
  "gpt3_175b": Size(96, 12288, 96, 128, 1536, 0.6e-4),
}


def _change(name: str, config):
  """Changes the base config to a size of GPT-3."""
  policy = SIZES[name]
  # C.2: all policies share a 6B reward model and value network. The paper's smallest policy is 1.3B.
  # Departs from paper: policies smaller than that get a reward model of their own size.
  reward = SIZES["gpt3_6p7b"] if policy.d_model >= SIZES["gpt3_1p3b"].d_model else policy
  config.model.update(_decoder(policy))
  config.reward_model.update(_decoder(reward))
  config.pretrain.update(_pretraining(policy))
  config.reward_pretrain.update(_pretraining(reward))
  # open: the training state is too large for a copy on every device
  config.mesh.update(data=1, fsdp=-1)
  if name in ("gpt3_6p7b", "gpt3_13b"):
    config.ppo_init.optim.learning_rate = 1.04e-5  # C.3, 6B
  if name == "gpt3_175b":
    config.sft.batch_size = 8  # C.1
    config.sft.optim.learning_rate = 5.03e-6  # C.1
    # C.3. Departs from paper: ppo_init.pretrain_mix=0.1 becomes one row in eight.
    config.ppo_init.batch_size = 8
    config.ppo_init.optim.learning_rate = 2.45e-6  # C.3
    config.ppo.value_optim.learning_rate = 5e-6  # C.4
    # E.9 tries 2.55e-6 and 3.74e-6 and does not say which was chosen. Open: the smaller one is less likely to diverge.
    config.ppo.policy_optim.learning_rate = 2.55e-6


def _decoder(size: Size) -> dict:
  """The settings of a network of this size."""
  return dict(
    num_layers=size.num_layers,
    d_model=size.d_model,
    num_heads=size.num_heads,
    num_kv_heads=size.num_heads,
    head_dim=size.head_dim,
    d_mlp=4 * size.d_model,
    max_length=CONTEXT,
  )


def _pretraining(size: Size) -> dict:
  """The pretraining settings of GPT-3's App. B.

  Departs from paper: the batch size does not ramp up, and the cosine ends with the run instead of at 260B tokens.
  """
  tokens = size.batch_size * CONTEXT
  return dict(
    num_steps=round(TOKENS / tokens),
    batch_size=size.batch_size,
    length=CONTEXT,
    evaluate_every=1000,
    # App. B: the learning rate warms up over 375M tokens.
    optim=base.adam(size.learning_rate, warmup_steps=round(375e6 / tokens), weight_decay=0.1),
  )


PRESETS = {name: functools.partial(_change, name) for name in SIZES}
