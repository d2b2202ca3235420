"""What describe.py says of a folder of weights, and the preset `weights` through the flags, which asks it."""

import dataclasses
import json
import re

import jax
import pytest
from absl import flags

from instructjax.commands import config_flag, describe
from instructjax.core.errors import UserError
from instructjax.data.tokenizer import train_tokenizer
from instructjax.models import init_params, interop
from tests import tiny

NETWORK = dataclasses.replace(tiny.LLAMA, num_layers=1, max_length=64)
VOCAB = 34


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A Llama of one layer with its tokenizer."""
  path = tmp_path_factory.mktemp("weights") / "llama"
  model = tiny.make_model(NETWORK, VOCAB)
  interop.write_folder(path, model, init_params(model, jax.random.key(0)), {})
  texts = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"]
  train_tokenizer(texts, VOCAB, path / "tokenizer.model", 0)
  return path


def test_what_a_folder_holds(folder):
  found = describe.describe({"model.weights": str(folder)}, "")
  assert found["vocab_size"] == VOCAB
  shape = found["weights"]["model.weights"]
  assert shape["network"] == dataclasses.asdict(NETWORK) and shape["head"] == "lm"
  # Two tables and the final norm; two norms; q and o of 16 x 16, k and v of 16 x 8; three matrices of the MLP.
  assert shape["num_params"] == 2 * 34 * 16 + 16 + 2 * 16 + 2 * 256 + 2 * 128 + 3 * 16 * 24
  json.dumps(found)


def test_what_cannot_be_read_is_named_by_its_field(folder, tmp_path):
  with pytest.raises(UserError, match="^config.reward_model.weights: .* it is not there$"):
    paths = {"model.weights": str(folder), "reward_model.weights": "/nowhere"}
    describe.describe(paths, "")
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  with pytest.raises(UserError, match="^config.model.weights: .* has no tokenizer"):
    describe.describe({"model.weights": str(tmp_path)}, "")
  with pytest.raises(UserError, match="^config.tokenizer.path: "):
    describe.describe({"model.weights": str(folder)}, "/nowhere.json")


def test_the_preset_through_the_flags(folder, monkeypatch):
  """In a process of its own, as the commands ask. The flags win over what the preset chooses."""
  # A bool without a value, a value after a blank, and a field that the preset chooses.
  words = [
    *("main", "--config=ppo_ptx:weights", "--config.model.weights", str(folder)),
    *("--noconfig.evaluate.overoptimization", "--config.sft.batch_size=5"),
  ]
  monkeypatch.setattr("sys.argv", words)
  config_flag.define()
  parser = flags.FLAGS["config"].parser
  config = parser.parse("ppo_ptx:weights")
  assert (config.model.d_model, config.tokenizer.vocab_size) == (NETWORK.d_model, VOCAB)
  assert (
    config.sft.batch_size == 32 and config.is_locked
  )  # ml_collections applies the changes later
  config.sft.batch_size = 5
  assert re.search(r"  sft.batch_size=5: yours$", "\n".join(config_flag.explain(config)))
  parser.parse("ppo_ptx:tiny")
  assert config_flag.explain(config) == []  # of another preset there is nothing to tell
