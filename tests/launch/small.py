"""Settings whose dimensions fill a TPU's tiles, so that nothing is padded, and whose steps fit anywhere.

Called by the tests of the planner.
"""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import models
from instructjax.core.config import Config
from instructjax.parallel import sharding


def settings(stage: str = "ppo_ptx", **blocks: Mapping[str, Any]) -> ConfigDict:
  """A small config of a stage; `blocks` are settings by the name of their block."""
  config = models.get(stage, "gpt3_125m")
  shape = dict(num_layers=2, d_model=512, num_heads=4, num_kv_heads=4, head_dim=128, d_mlp=1024)
  for model in (config.model, config.reward_model):
    model.update(shape, max_length=256)
  config.tokenizer.vocab_size = 1024
  config.data.update(max_prompt_length=128, max_response_length=128)
  for block in ("pretrain", "reward_pretrain", "sft", "ppo_init"):
    config[block].update(batch_size=8, length=256)
  config.rm.update(batch_size=8)
  config.ppo.update(batch_size=16, num_minibatches=4, ptx_length=256)
  for name, values in blocks.items():
    config[name].update(values)
  return config


def mesh_of(config: Config):
  """The config's mesh, of the first four devices."""
  return sharding.make_mesh(config.mesh, jax.devices()[:4])
