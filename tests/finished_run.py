"""A run that is finished without training: stages' folders as the stages leave them, with random weights.

Called by the tests of what starts from finished stages: exports and their cards.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import models
from instructjax.core.blocks import determining
from instructjax.core.config import Config
from instructjax.data import tokenizer as tokenizers
from instructjax.train import checkpoint, finished
from tests import micro, tiny

STEP = 2
MEAN = 0.75  # mean score of demonstrations, which the reward model's bias takes away


def write_run(folder: pathlib.Path) -> tuple[Config, tokenizers.Tokenizer]:
  """Its config and tokenizer; the folder holds data and tokenizer, stages are added by `write_stage`."""
  config = micro.config("ppo_ptx", micro.write_data(folder / "data"))
  lines = (folder / "data" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
  texts = [json.loads(line)["text"] for line in lines]
  path = folder / "tokenizer" / "tokenizer.model"
  return config, tokenizers.train_tokenizer(texts, micro.VOCAB_SIZE, path, 0)


def write_stage(
  folder: pathlib.Path, tokenizer, items: dict, *, parents=(), blocks=(), base="", **result
):
  """Writes checkpoint and done.json of the stage `folder.name`.

  Args:
    tokenizer: of the run.
    items: name of weights in the checkpoint -> (NetworkConfig, head).
    parents: names of finished stages of the run.
    blocks: (name, config block) besides the model's.
    base: what the run's `model.weights` names.
    result: more keys of done.json.
  Returns:
    item -> params.
  """
  networks = {
    item: tiny.make_model(cfg, tokenizer.vocab_size, head) for item, (cfg, head) in items.items()
  }
  rng = np.random.default_rng(len(folder.name))
  noise = lambda x: jnp.asarray(rng.normal(0.1, 0.25, x.shape), jnp.float32)
  params = {
    item: jax.tree.map(noise, models.param_shapes(model)) for item, model in networks.items()
  }
  with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(STEP, params, None, {}, {}, changeable(base))
  cfg = next(iter(items.values()))[0]
  made_with = {
    f"config.{name}": _canonical(block) for name, block in {"model": cfg, **dict(blocks)}.items()
  }
  made_with |= {"config.seed": "0", "tokenizer": tokenizer.fingerprint}
  made_with |= {f"parent:{parent}": identity(folder.parent / parent) for parent in parents}
  finished.write_done(folder, {"fingerprint": made_with, "step": STEP} | result)
  return params


def changeable(base: str) -> dict:
  """What a checkpoint says besides, of which only the base's weights are read."""
  return {"rounding": {}, "same numbers": {"model.weights": base, "reward_model.weights": base}}


def identity(folder: pathlib.Path) -> str:
  """What a stage that starts from this one remembers of it."""
  return hashlib.sha256(_canonical(finished.read_done(folder)["fingerprint"]).encode()).hexdigest()


def _canonical(block) -> str:
  plain = determining(block) if dataclasses.is_dataclass(block) else block
  return json.dumps(plain, sort_keys=True)
