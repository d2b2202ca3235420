"""A finished run that answers and judges, with random weights, and one answer of it. Called by the tests of serve."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import models
from instructjax.serve import speaker
from instructjax.serve.dialogue import Draw, Settings
from instructjax.train import checkpoint, finished
from tests import finished_run, tiny

PROMPT = "say: sea or hill?\n"
MEAN = 0.75  # score of demonstrations, which the reward model's bias takes away
DRAW = Draw(temperature=1.0, top_p=1.0, max_new_tokens=24)
GREEDY = dataclasses.replace(DRAW, temperature=0.0)
SETTINGS = Settings(draw=DRAW, num_samples=1, seed=0, chat=None, system="")
KEY = jax.random.key(3)


def write_stage(folder, cfg, tokenizer, head, item, seed, result, blocks=()):
  """A stage's folder as the stage leaves it, with random weights."""
  model = tiny.make_model(cfg, tokenizer.vocab_size, head)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32), models.param_shapes(model)
  )
  with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(2, {item: params}, None, {}, {}, finished_run.changeable(""))
  made_with = {
    "config.model": json.dumps(dataclasses.asdict(cfg)),
    "tokenizer": tokenizer.fingerprint,
  } | dict(blocks)
  finished.write_done(folder, finished.Done(folder.name, made_with, 2, result))
  return model, params


def answer(who, prompt=PROMPT, key=KEY, draw=DRAW):
  pieces = []
  given = speaker.answer(who, prompt, key, draw, pieces.append)
  assert "".join(pieces) == given.text
  return given, pieces
