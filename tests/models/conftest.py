"""Tiny models of every switch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import NetworkConfig
from tests import tiny

VOCAB = 19
SWITCHES = {
  "gpt2": tiny.GPT2,
  "gpt3": dataclasses.replace(tiny.GPT2, attention_window=3),
  "llama": tiny.LLAMA,
  "qwen2": dataclasses.replace(tiny.LLAMA, qkv_bias=True, tie_embeddings=True),
  **{
    name: tiny.FAMILIES[name] for name in ("gpt_neox", "smollm3", "gemma3")
  },  # of it qwen3 is a part
}


@pytest.fixture(params=SWITCHES)
def cfg(request) -> NetworkConfig:
  """One of the families."""
  return SWITCHES[request.param]


@pytest.fixture(params=["gpt3", "qwen2", "gemma3"])
def few(request) -> NetworkConfig:
  """One of three that have most switches between them, for tests that take their time."""
  return SWITCHES[request.param]


@pytest.fixture
def gpt2() -> NetworkConfig:
  return tiny.GPT2


@pytest.fixture
def llama() -> NetworkConfig:
  return tiny.LLAMA


@pytest.fixture
def make():
  """make(cfg, head='lm', **changes) -> (model, params), all weights random: none is idle."""

  def one(cfg: NetworkConfig, head: str = "lm", **changes):
    model = tiny.make_model(cfg, VOCAB, head, **changes)
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32)
    return model, jax.tree.map(noise, models.param_shapes(model))

  return one
