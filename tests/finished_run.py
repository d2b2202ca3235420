"""A run that is finished without training: stages' folders as the stages leave them, with random weights.

Called by the tests of what starts from finished stages: exports and their cards.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import models
from instructjax.core import provenance, results
from instructjax.core.blocks import determining
from instructjax.core.config import Config
from instructjax.core.stages import STAGES
from instructjax.data import tokenizer as tokenizers
from instructjax.train import checkpoint, finished
from tests import micro, tiny

STEP = 2
MADE = provenance.Provenance(
  version="1.2.3",
  commit="abc123+changes",
  command="instructjax run --config=ppo_ptx --workdir=/home/ann/secret/demo"
  " --config.data.documents=jsonl:/home/ann/secret/books.jsonl",
  date="2026-03-01T12:00:00Z",
  seconds=61.2,
  sources={"documents": provenance.Source("jsonl:/home/ann/secret/books.jsonl", "sha256:9")},
  hardware=provenance.Hardware("TPU v5 lite", 4, 1, "EPYC", 8),
  libraries={"jax": "0.10"},
)
MEAN = 0.75  # mean score of demonstrations, which the reward model's bias takes away

CALIBRATION = results.Calibration((0.6,), (0.7,), (2560,), 0.1)
JUDGED = results.Judgement(
  accuracy=0.7311,
  accuracy_stderr=0.0123,
  pairs=2560,
  prompts=300,
  score_std=1.0,
  calibration=CALIBRATION,
)


def reward_model(mean: float = MEAN) -> results.RewardModel:
  """What the stage of a reward model measured."""
  return results.RewardModel(mean, JUDGED, heldout_labelers=None, cross_validation=())


def write_run(folder: pathlib.Path) -> tuple[Config, tokenizers.Tokenizer]:
  """Its config and tokenizer; the folder holds data and tokenizer, stages are added by `write_stage`."""
  config = micro.config("ppo_ptx", micro.write_data(folder / "data"))
  lines = (folder / "data" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
  texts = [json.loads(line)["text"] for line in lines]
  path = folder / "tokenizer" / "tokenizer.model"
  return config, tokenizers.train_tokenizer(texts, micro.VOCAB_SIZE, path, 0)


def write_stage(
  folder: pathlib.Path,
  tokenizer,
  items: dict,
  *,
  stage: str = "",
  parents=(),
  blocks=(),
  base="",
  result=None,
):
  """Writes checkpoint and done.json of a stage.

  Args:
    stage: `folder.name` if empty.
    tokenizer: of the run.
    items: name of weights in the checkpoint -> (NetworkConfig, head).
    parents: names of finished stages of the run.
    blocks: (name, config block) besides the model's.
    base: what the run's `model.weights` names.
    result: the stage's own record; one that says nothing if None.
  Returns:
    item -> params.
  """
  stage = stage or folder.name
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
  cfg, own = next(iter(items.values()))[0], STAGES[stage].block
  made_with = {
    f"config.{name}": _canonical(block)
    for name, block in {"model": cfg, own: {}, **dict(blocks)}.items()
  }
  made_with |= {"config.seed": "0", "tokenizer": tokenizer.fingerprint}
  made_with |= {f"parent:{parent}": identity(folder.parent / parent) for parent in parents}
  empty = results.Tuned(()) if STAGES[stage].result is results.Tuned else results.Nothing()
  finished.write_done(folder, finished.Done(stage, made_with, STEP, result or empty, MADE))
  return params


def change_done(folder: pathlib.Path, old: str, new: str):
  """Replaces a text in a stage's done.json, as if the stage had been made so: the file's checksum fits."""
  path = folder / finished.DONE
  values = json.loads(path.read_text().replace(old, new))
  values.pop("crc32")
  path.write_text(json.dumps(values | {"crc32": finished._checksum(values)}))


def changeable(base: str) -> dict:
  """What a checkpoint says besides, of which only the base's weights are read."""
  return {"rounding": {}, "same numbers": {"model.weights": base, "reward_model.weights": base}}


def identity(folder: pathlib.Path) -> str:
  """What a stage that starts from this one remembers of it."""
  return finished.read_done(folder).identity


def _canonical(block) -> str:
  plain = determining(block) if dataclasses.is_dataclass(block) else block
  return json.dumps(plain, sort_keys=True)
