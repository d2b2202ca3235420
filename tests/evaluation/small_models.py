"""Small models with random weights and a tokenizer of their own. Called by the tests of evaluation."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import models
from instructjax.core.config import MeshConfig, NetworkConfig
from instructjax.data import tokenizer as tokenizers
from instructjax.evaluation.language_model import LanguageModel
from instructjax.parallel import sharding
from tests import tiny

TEXTS = (
  "the cat sat on the mat and looked at the sea",
  "a hill by the sea is a hill of sand",
  "who sat on the hill? the cat sat.\nwhat did it see? the sea.",
  "hello world, this is a test of letters: xyz jkq bvw ,.?!:",
)


@functools.cache
def tokenizer(folder: pathlib.Path):
  return tokenizers.train_tokenizer(TEXTS, 48, folder / "tokenizer.model", 0)


def one_device():
  return sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), jax.devices()[:1])


def language_model(
  folder: pathlib.Path,
  network: NetworkConfig = tiny.LLAMA,
  head="lm",
  mesh=None,
  seed: int = 0,
  **changes,
) -> LanguageModel:
  """A model whose weights are all random, so that none is idle."""
  words = tokenizer(folder)
  changes = dict(max_length=48) | changes
  network = dataclasses.replace(network, **changes)
  execution = dataclasses.replace(tiny.EXECUTION, layers="scan")
  model = models.make_model(network, execution, words.vocab_size, head)
  rng = np.random.default_rng(seed)
  noise = lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32)
  params = jax.tree.map(noise, models.param_shapes(model))
  mesh = mesh or one_device()
  if mesh.size > 1:
    params = jax.device_put(params, models.param_shardings(mesh, model)[0])
  return LanguageModel(
    name="small",
    tokenizer=words,
    model=model,
    params=params,
    mesh=mesh,
    max_length=network.max_length,
    first_id=words.eos_id,
  )
