"""Tiny networks and settings, written once: the tiny preset with a few fields changed.

A field that the presets gain is here too, so that no test has to name it. Called by conftest.py and the tests.
"""

import dataclasses

from configs import models as presets
from instructjax import models
from instructjax.core.config import AdapterConfig, NetworkConfig, from_config_dict

CONFIG = from_config_dict(presets.get("ppo_ptx", "tiny"))
EXECUTION = dataclasses.replace(
  CONFIG.execution,
  dtype="float32",
  layers="unroll",
  attention="plain",
  remat="none",
  decode_layout="tensor",
)
GPT2 = dataclasses.replace(
  CONFIG.model.network,
  num_layers=3,
  d_model=16,
  num_heads=4,
  num_kv_heads=4,
  head_dim=4,
  d_mlp=24,
  max_length=16,
  position="learned",
  rope_base=100.0,
  norm="layernorm",
  mlp="gelu",
  use_bias=True,
  init_std=0.2,
)
LLAMA = dataclasses.replace(
  GPT2,
  num_kv_heads=2,
  position="rope",
  norm="rmsnorm",
  mlp="swiglu",
  use_bias=False,
  tie_embeddings=False,
)
# The families with switches of their own. Two kinds of layers take turns, so that two layers show both.
FAMILIES = {
  "qwen3": dataclasses.replace(LLAMA, head_dim=6, qk_norm=True, tie_embeddings=True),
  "gpt_neox": dataclasses.replace(
    GPT2,
    position="rope",
    rotary_dim=2,
    mlp="gelu_exact",
    parallel_residual=True,
    tie_embeddings=False,
  ),
  "smollm3": dataclasses.replace(LLAMA, layer_pattern="GN", tie_embeddings=True),
  "gemma3": dataclasses.replace(
    LLAMA,
    rope_local_base=10.0,
    norm="rmsnorm_1p",
    sandwich_norm=True,
    qk_norm=True,
    mlp="geglu",
    attention_window=3,
    layer_pattern="LG",
    query_pre_attn_scalar=7,
    scale_embeddings=True,
    tie_embeddings=True,
  ),
}
# One layer, grouped heads and no biases: what the tests of stages and steps train.
NETWORK = dataclasses.replace(GPT2, num_layers=1, num_kv_heads=2, max_length=20, use_bias=False)
# GPT-3 175B, for what only counts shapes.
GPT3 = from_config_dict(presets.get("ppo", "gpt3_175b")).model.network


def adapter(**changes) -> AdapterConfig:
  """Settings of an adapter that learns at the rate of all weights."""
  return dataclasses.replace(CONFIG.adapter, **dict(rank=2, rate_factor=1.0) | changes)


def make_model(
  network: NetworkConfig, vocab_size: int, head: str = "lm", **changes
) -> models.Model:
  """A model of this network; `changes` are of its fields and of EXECUTION's."""
  of_execution = {name: changes.pop(name) for name in vars(EXECUTION) if name in changes}
  network = dataclasses.replace(network, **changes)
  execution = dataclasses.replace(EXECUTION, **of_execution)
  return models.make_model(network, execution, vocab_size, head)
