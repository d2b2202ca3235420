"""The paper's models: GPT-3's sizes with InstructGPT's settings. Called by models.py.

Shapes, batches and pretraining rates: GPT-3 (arXiv:2005.14165) table 2.1. What App. C of InstructGPT
prints is for 1.3B, 6B and 175B; base.py holds its values for 1.3B, and a size between two printed
ones takes the smaller one's. The 6B is taken to be GPT-3's 6.7B: the paper prints no shape.
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
  # Printed with 24 heads, which of width 128 are not 2048. Stiennon et al. 2020, table 3, has 16.
  "gpt3_1p3b": Size(24, 2048, 16, 128, 512, 2e-4),  # 1M
  "gpt3_2p7b": Size(32, 2560, 32, 80, 512, 1.6e-4),
  "gpt3_6p7b": Size(32, 4096, 32, 128, 1024, 1.2e-4),  # 2M
  # Printed with d_model 5140, which 40 heads of width 128 are not. Stiennon et al., table 3, has 5120.
  "gpt3_13b": Size(40, 5120, 40, 128, 1024, 1e-4),
  # 3.2M tokens are 1562.5 rows; 1536 divide over meshes.
  "gpt3_175b": Size(96, 12288, 96, 128, 1536, 0.6e-4),
}


def _change(name: str, config):
  policy = SIZES[name]
  # C.2: one 6B reward model and value network for every policy, of which the smallest is 1.3B.
  # Departs from paper: smaller policies, which it has not, get one of their own size.
  reward = SIZES["gpt3_6p7b"] if policy.d_model >= SIZES["gpt3_1p3b"].d_model else policy
  config.model.update(_decoder(policy))
  config.reward_model.update(_decoder(reward))
  config.pretrain.update(_pretraining(policy))
  config.reward_pretrain.update(_pretraining(reward))
  config.mesh.update(data=1, fsdp=-1)  # open: the state is too large to lie whole on every device
  if name in ("gpt3_6p7b", "gpt3_13b"):
    config.ppo_init.optim.learning_rate = 1.04e-5  # C.3, 6B
  if name == "gpt3_175b":
    config.sft.batch_size = 8  # C.1
    config.sft.optim.learning_rate = 5.03e-6  # C.1
    config.ppo_init.batch_size = 8  # C.3; a mix of 10% is then one row of eight
    config.ppo_init.optim.learning_rate = 2.45e-6  # C.3
    config.ppo.value_optim.learning_rate = 5e-6  # C.4
    # E.9 tried 2.55e-6 and 3.74e-6 and does not say which was kept. Open: the one less apt to diverge.
    config.ppo.policy_optim.learning_rate = 2.55e-6


def _decoder(size: Size) -> dict:
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
  """GPT-3 App. B. Departs from it: no ramp of the batch size, and the cosine ends with the run, not at 260B tokens."""
  tokens = size.batch_size * CONTEXT
  return dict(
    num_steps=round(TOKENS / tokens),
    batch_size=size.batch_size,
    length=CONTEXT,
    evaluate_every=1000,
    optim=base.adam(size.learning_rate, warmup_steps=round(375e6 / tokens), weight_decay=0.1),
  )


PRESETS = {name: functools.partial(_change, name) for name in SIZES}
