"""Tiny models of every switch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import ModelConfig, RopeScalingConfig

VOCAB = 19
GPT2 = ModelConfig(
  num_layers=3,
  d_model=16,
  num_heads=4,
  num_kv_heads=4,
  head_dim=4,
  d_mlp=24,
  max_length=16,
  position="learned",
  rope_base=100.0,
  rope_scaling=RopeScalingConfig("none", 8.0, 1.0, 4.0, 8192),
  norm="layernorm",
  norm_eps=1e-5,
  mlp="gelu",
  use_bias=True,
  qkv_bias=False,
  attention_window=0,
  tie_embeddings=True,
  init_std=0.2,
  dtype="float32",
  layers="unroll",
  attention="auto",
  remat="none",
  decode_layout="auto",
  weights="",
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
SWITCHES = {
  "gpt2": GPT2,
  "gpt3": dataclasses.replace(GPT2, attention_window=3),
  "llama": LLAMA,
  "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True),
}


@pytest.fixture(params=SWITCHES)
def cfg(request) -> ModelConfig:
  """One of the four families."""
  return SWITCHES[request.param]


@pytest.fixture
def gpt2() -> ModelConfig:
  return GPT2


@pytest.fixture
def llama() -> ModelConfig:
  return LLAMA


@pytest.fixture
def make():
  """make(cfg, head='lm', **changes) -> (model, params), all weights random: none is idle."""

  def one(cfg: ModelConfig, head: str = "lm", **changes):
    model = models.make_model(dataclasses.replace(cfg, **changes), VOCAB, head)
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32)
    return model, jax.tree.map(noise, models.param_shapes(model))

  return one
