"""Weights by path: which of a finished stage's are taken, at which step, and what lies nowhere."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from instructjax.core import results
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.parallel import sharding
from instructjax.train import finished, weights
from tests import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run's folder with `sft`, `rm` and `ppo`, whose value network is wider; stage -> item -> params."""
  folder = tmp_path_factory.mktemp("run")
  config, tokenizer = finished_run.write_run(folder)
  network = config.model.network
  wide = dataclasses.replace(network, d_mlp=48)
  write = lambda name, items, **more: finished_run.write_stage(
    folder / name, tokenizer, items, base="given", **more
  )
  items = {
    "params": (network, "lm"),
    "ema_params": (network, "lm"),
    "value_params": (wide, "scalar"),
  }
  made = {
    "sft": write("sft", {"params": (network, "lm")}),
    "rm": write("rm", {"params": (network, "scalar")}, result=finished_run.reward_model()),
    "ppo": write("ppo", items, blocks=[("reward_model", wide), ("ppo", config.ppo)]),
  }
  return folder, made


@pytest.mark.parametrize(
  ("which", "item", "head", "width"),
  [
    ("ema", "ema_params", "lm", 32),
    ("raw", "params", "lm", 32),
    ("value", "value_params", "scalar", 48),
  ],
)
def test_which_weights_of_an_rl_stage(run, which, item, head, width):
  folder, made = run
  found = weights.locate(folder / "ppo", which)
  assert (found.kind, found.item, found.head, found.step) == (
    "stage",
    item,
    head,
    finished_run.STEP,
  )
  assert (found.network.d_mlp, found.stage.name, found.base) == (width, "ppo", "given")
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  loaded = found.load(mesh, found.model(mesh))
  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  assert np.isclose(np.sort(flat(loaded)), np.sort(flat(made["ppo"][item]))).all()


def test_equal_weights_have_equal_fingerprints_and_others_another(run):
  folder, _ = run
  fingerprint = lambda which: weights.locate(folder / "ppo", which).fingerprint
  assert fingerprint("ema") == fingerprint("ema")
  assert len({fingerprint("ema"), fingerprint("raw"), fingerprint("value")}) == 3


def test_the_epoch_that_the_reward_model_chose_is_taken(run, tmp_path):
  shutil.copytree(run[0], tmp_path / "run")
  checkpoints = tmp_path / "run" / "sft" / "checkpoints"
  shutil.copytree(checkpoints / str(finished_run.STEP), checkpoints / "7")
  selected = finished.Done("sft_select", {}, 7, results.Selected(()))
  assert weights.locate(tmp_path / "run" / "sft").step == finished_run.STEP
  finished.write_done(tmp_path / "run" / "sft_select", selected)
  assert weights.locate(tmp_path / "run" / "sft").step == 7


@pytest.mark.parametrize(
  ("path", "which", "message"),
  [
    ("sft", "value", "sft must be an RL stage to have a value network"),
    ("data", "ema", "data must be the folder of a finished stage"),
    ("none.gguf", "value", "none.gguf must be a finished RL stage to have a value network"),
  ],
)
def test_what_is_not_there(run, path, which, message):
  with pytest.raises(UserError, match=message):
    weights.locate(run[0] / path, which)


def test_a_stage_that_measured_a_given_reward_model_holds_no_weights(tmp_path):
  found = results.RewardModel(0.5, None, None, ())
  finished.write_done(tmp_path / "rm", finished.Done("rm", {}, None, found))
  assert finished.read_done(tmp_path / "rm").result == found
  with pytest.raises(UserError, match="rm measured a reward model that was given, and holds none"):
    weights.locate(tmp_path / "rm")


@pytest.mark.parametrize(
  "skips, words",
  [(None, "at the token that ends"), (1, "before the EOS"), (9, "at the token that")],
)
def test_where_a_score_is_read_is_said(run, skips, words):
  found = dataclasses.replace(weights.locate(run[0] / "sft"), score_skips=skips)
  assert found.tokenizer.stop_ids == (1,)
  assert words in found.end_of_score


def test_a_tokenizer_with_more_ids_than_rows_is_refused(run):
  found = weights.locate(run[0] / "sft")
  few = dataclasses.replace(found, vocab_size=found.tokenizer.vocab_size - 1)
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  size = found.tokenizer.vocab_size
  with pytest.raises(
    UserError, match=rf"has ids up to {size - 1}, and the embedding .* {size - 1} rows"
  ):
    few.model(mesh)
  dataclasses.replace(found, vocab_size=size + 64).require_rows()  # rows of padding


def test_a_tokenizer_put_in_its_place_is_refused(run, tmp_path):
  shutil.copytree(run[0], tmp_path / "run")
  done = tmp_path / "run" / "sft" / "done.json"
  fingerprint = weights.locate(run[0] / "sft").tokenizer.fingerprint
  assert fingerprint in done.read_text()
  finished_run.change_done(done.parent, fingerprint, "0" * len(fingerprint))
  with pytest.raises(UserError, match="tokenizer is not the tokenizer that .*sft was trained with"):
    weights.locate(tmp_path / "run" / "sft")


def test_folders_of_other_kinds(tmp_path):
  """What a user may take for weights is answered in words, before anything is opened."""
  refused = lambda path: str(pytest.raises(UserError, weights.locate, path).value)
  (tmp_path / "adapter_config.json").write_text("{}")
  assert "has neither done.json nor config.json; it is an adapter (LoRA) without" in refused(
    tmp_path
  )
  (tmp_path / "config.json").write_text("{}")
  assert "is an adapter (LoRA), not a whole model" in refused(tmp_path)
  (tmp_path / "adapter_config.json").unlink()
  (tmp_path / "config.json").unlink()
  (tmp_path / "model.Q8_0.gguf").touch()
  assert "it has model.Q8_0.gguf; give the path of that file" in refused(tmp_path)
  (tmp_path / "model.Q8_0.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
  assert "model.Q8_0.gguf is a Git LFS pointer" in refused(tmp_path / "model.Q8_0.gguf")
  for name in ("x" * 5000, "a\0b"):
    assert "and it cannot be read" in refused(tmp_path / name)


@pytest.mark.parametrize("how", ["flipped", "missing", "half"])
def test_damaged_or_half_copied_weights_are_refused_by_name(run, tmp_path, how):
  """What `generate`, `export` and later stages load."""
  shutil.copytree(run[0] / "tokenizer", tmp_path / "tokenizer")
  shutil.copytree(run[0] / "sft", tmp_path / "sft")
  folder = tmp_path / "sft" / "checkpoints" / str(finished_run.STEP)
  # The largest file, which holds weights.
  path = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data if how == "flipped" else data[: len(data) // 2])
  if how == "missing":
    path.unlink()
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  with pytest.raises(UserError, match=f"^{path} (has|is) .*`rm -r {tmp_path}/sft/done.json "):
    found = weights.locate(tmp_path / "sft")
    found.load(mesh, found.model(mesh))
