"""The smallest whole run: a config of one layer and few steps, and jsonl files for it to read.

Called by the tests of main, pipeline and the stages. Built from the tiny preset, so that a field
which the presets gain is here too.
"""

import contextlib
import json
import pathlib
import random
import types
from collections.abc import Iterable
from unittest import mock

import jax
import numpy as np

from configs import base, models
from instructjax.core.config import Config, from_config_dict
from instructjax.data import token_store
from instructjax.parallel import sharding

THINGS = ("sea", "hill", "tree", "bird", "road", "wind", "rain", "star", "lamp", "boat", "well")
FORMS = (
  "the {a} is near the {b}.",
  "say: {a} or {b}? a {a}, a {b}.",
  "we saw the {a} by the {b}.",
  "no {a} is like a {b}.",
  "every {a} makes joyful, quick zigzag moves for one more {b}",
)
LABELERS = ("ann", "bob", "cy", "dee")
VOCAB_SIZE = 56


def write_data(folder: pathlib.Path) -> dict[str, str]:
  """Writes documents, demonstrations, comparisons and prompts; returns kind -> spec."""
  rng = random.Random(0)

  def line() -> str:
    a, b = rng.sample(THINGS, 2)
    return rng.choice(FORMS).format(a=a, b=b)

  prompts = [f"say: {a} or {b}?\n" for a in THINGS for b in THINGS if a < b]
  rows = {
    "documents": [{"text": " ".join(line() for _ in range(4))} for _ in range(60)],
    "prompts": [{"prompt": prompt} for prompt in prompts],
    "demonstrations": [{"prompt": prompt, "response": line()} for prompt in prompts],
    "comparisons": [
      {
        "prompt": prompt,
        "responses": [line(), line(), "no no no"],
        "ranks": [1, 2, 3] if number % 2 else [1, 1, 2],
        "labeler": LABELERS[number % len(LABELERS)],
      }
      for number, prompt in enumerate(prompts)
    ],
  }
  folder.mkdir(parents=True, exist_ok=True)
  for kind, items in rows.items():
    write_lines(folder / f"{kind}.jsonl", items)
  return {kind: f"jsonl:{folder / kind}.jsonl" for kind in rows}


def write_lines(path: pathlib.Path, items: list):
  path.write_text("".join(json.dumps(item) + "\n" for item in items))


def config_dict(stage: str, specs: dict[str, str]):
  """ConfigDict of a stage, with the data of `specs`; change it and pass it to `config`."""
  config = models.get(stage, "tiny")
  decoder = dict(
    num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, d_mlp=32, max_length=512
  )
  config.model.update(decoder)
  config.reward_model.update(decoder)
  config.tokenizer.vocab_size = VOCAB_SIZE
  config.data.update(specs, max_prompt_length=36, max_response_length=24, validation_fraction=0.25)
  config.checkpoint.update(every_steps=2, keep=2)
  config.log.update(every_steps=1, samples=1, trackers=())
  for name in ("pretrain", "reward_pretrain"):
    config[name].update(
      num_steps=4, batch_size=8, length=60, evaluate_every=2, optim=base.adam(1e-2)
    )
  for name in ("sft", "ppo_init"):
    config[name].update(
      num_epochs=2, batch_size=8, length=60, pretrain_mix=0.25, dropout=0.1, optim=base.adam(1e-2)
    )
  config.collect.update(num_prompts=16, num_heldout_prompts=8, min_responses=2, max_responses=3)
  config.rm.update(batch_size=8, max_responses=3, cross_validation_folds=0, optim=base.adam(1e-3))
  config.ppo.update(
    num_iterations=4,
    batch_size=8,
    num_minibatches=2,
    num_epochs=1,
    ptx_rows=1,
    ptx_microbatches=1,
    ptx_length=60,
    gamma=0.3,
    max_kl=0.0,
    policy_optim=base.adam(5e-2),
    value_optim=base.adam(1e-2),
  )
  config.evaluate.update(
    num_prompts=8,
    samples_per_prompt=1,
    compare=(),
    overoptimization=False,
    overoptimization_iterations=2,
    best_of_n=0,
    bootstrap=10,
    pretrain_batches=1,
    checkpoints=0,
  )
  return config


def config(stage: str, specs: dict[str, str], **changes) -> Config:
  """Frozen config; `changes` are dotted names with `__` for the dot: ppo__beta=0.1."""
  values = config_dict(stage, specs)
  for name, value in changes.items():
    *blocks, field = name.split("__")
    block = values
    for part in blocks:
      block = block[part]
    block[field] = value
  return from_config_dict(values)


@contextlib.contextmanager
def one_device():
  """Runs on one of the fake devices: several of them only take longer to compile for."""
  make_mesh = sharding.make_mesh
  one = lambda cfg, devices=None: make_mesh(cfg, jax.devices()[:1])
  with mock.patch.object(sharding, "make_mesh", one):
    yield


def in_memory(sequences: Iterable[token_store.Encoded], vocab_size: int) -> token_store.TokenStore:
  """A store of few sequences that is not on disk."""
  sequences = list(sequences)
  token_T = np.array(
    [i for sequence in sequences for i in sequence.ids], token_store.dtype_of(vocab_size)
  )
  num_unweighted_S = np.array([sequence.num_unweighted for sequence in sequences], np.int64)
  return token_store.TokenStore(
    end_S=np.cumsum([len(sequence.ids) for sequence in sequences], dtype=np.int64),
    num_unweighted_S=num_unweighted_S if num_unweighted_S.any() else None,
    read=lambda start, stop: token_T[start:stop].tobytes(),
    dtype=token_T.dtype,
    left_out={},
  )


def characters(eos_id: int = 1):
  """A tokenizer whose tokens are characters."""
  encode = lambda text: [ord(c) for c in text]
  return types.SimpleNamespace(
    encode=encode, bos_id=None, control_pattern=None, eos_id=eos_id, pad_id=99, vocab_size=98
  )
