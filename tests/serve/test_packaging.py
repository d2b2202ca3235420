"""Exports: what is written comes back equal, whole or not at all, and a mistake is one line.

Weights are random: nothing is trained here. What transformers and llama.cpp make of the files is in
benchmarks/parity.py.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers

from instructjax.core.config import MeshConfig
from instructjax.core.structs import PromptBatch
from instructjax.data import tokenizer as tokenizers
from instructjax.models import interop
from instructjax.parallel import sharding
from instructjax.rl import sampling, scoring
from instructjax.serve import card, packaging
from instructjax.stages import answers
from instructjax.train import weights
from tests import finished_run, tiny
from tests.commands import test_export

PROMPT = "say: sea or hill?\n"
TEXT = " the sea\n\n  is near the well.\n"
GPT2 = dict(position="learned", norm="layernorm", mlp="gelu", use_bias=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(folder, stage -> item -> params): `sft` and `rm` of Llama's kind, `ppo` of GPT-2's, `ppo_ptx`,
  `no_average`, a policy whose average was not kept."""
  folder = tmp_path_factory.mktemp("run")
  config, tokenizer = finished_run.write_run(folder)
  llama = dataclasses.replace(config.model.network, max_length=100, num_kv_heads=1, d_mlp=64)
  gpt2 = dataclasses.replace(llama, num_kv_heads=2, **GPT2)
  made = {}

  def write(name, items, **more):
    made[name] = finished_run.write_stage(folder / name, tokenizer, items, **more)

  write("sft", {"params": (llama, "lm")})
  write("rm", {"params": (llama, "scalar")}, result=finished_run.reward_model())
  for stage, cfg in (("ppo", gpt2), ("ppo_ptx", llama)):
    items = {"params": (cfg, "lm"), "ema_params": (cfg, "lm"), "value_params": (cfg, "scalar")}
    write(stage, items, blocks=[("reward_model", cfg), ("data", config.data), ("ppo", config.ppo)])
  blocks = [("reward_model", llama), ("ppo", dataclasses.replace(config.ppo, ema_decay=0.0))]
  write("no_average", {"params": (llama, "lm")}, stage="ppo", blocks=blocks)
  return folder, made


def opened(path, which="ema"):
  """(model, params, tokenizer)."""
  found = weights.locate(path, which)
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  size = min(found.vocab_size, found.tokenizer.vocab_size)
  model = tiny.make_model(found.network, size, found.head)
  return model, found.load(mesh, model), found.tokenizer


def require_equal(ours, theirs, **tolerance):
  for (path, a), (_, b) in zip(
    jax.tree_util.tree_leaves_with_path(ours),
    jax.tree_util.tree_leaves_with_path(theirs),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, **({"rtol": 0} | tolerance), err_msg=str(path))


def files(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
  "stage, which, item",
  [
    *[("sft", "ema", "params"), ("ppo_ptx", "ema", "ema_params"), ("ppo", "raw", "params")],
    ("no_average", "ema", "params"),
  ],
)
def test_a_policy_comes_back_bit_for_bit(run, tmp_path, stage, which, item):
  folder, made = run
  packaging.write_huggingface(str(folder / stage), tmp_path / "out", which=which)
  model, params, tokenizer = opened(tmp_path / "out")
  assert model.head == "lm"
  require_equal(made[stage][item], params, atol=0)
  source = weights.locate(folder / stage).tokenizer
  assert tokenizer.encode(TEXT) == source.encode(TEXT) and tokenizer.eos_id == source.eos_id
  assert files(tmp_path) == ["out"]  # no scratch
  assert files(tmp_path / "out") == [
    *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
  ]
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 1, None)
  settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
  assert settings == {"eos_token_id": 1}


def test_a_renamed_stage_keeps_its_kind(run, tmp_path):
  folder, _ = run
  for name, stage, item in (("best", "ppo_ptx", "ema_params"), ("judge", "rm", "params")):
    shutil.copytree(folder / stage, tmp_path / name)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    renamed = weights.locate(tmp_path / name)
    assert (renamed.item, renamed.head) == (item, weights.locate(folder / stage).head)


def test_the_same_greedy_continuation(run, tmp_path, quick_jit):
  folder, _ = run
  packaging.write_huggingface(str(folder / "ppo_ptx"), tmp_path / "out")
  (model, params, tokenizer), (again, params_again, _) = (
    opened(path) for path in (folder / "ppo_ptx", tmp_path / "out")
  )
  assert again == model  # the same program
  prompt = [tokenizer.encode(PROMPT)]
  batch = PromptBatch(
    *answers.pad_left(prompt, len(prompt[0]), tokenizer.pad_id), np.zeros(1, np.int32)
  )
  generate = quick_jit(
    lambda params: (
      sampling.generate(
        model, params, batch, jax.random.key(0), max_new_tokens=8, stop_ids=(-1,), temperature=0.0
      ).token_BL
    )
  )
  assert np.array_equal(generate(params), generate(params_again))


@pytest.mark.parametrize(
  "stage, which, item",
  [("rm", "ema", "params"), ("ppo_ptx", "value", "value_params"), ("ppo", "value", "value_params")],
)
def test_a_score_comes_back(run, tmp_path, quick_jit, stage, which, item):
  """The reward model's with its bias; Llama's bias is a key of the config, GPT-2's in a LayerNorm."""
  folder, made = run
  packaging.write_huggingface(str(folder / stage), tmp_path / "out", which=which)
  model, params, tokenizer = opened(tmp_path / "out")
  ids = tokenizer.encode(TEXT) + [tokenizer.eos_id]
  token_BL = np.array([ids, [*ids[:5], *[tokenizer.pad_id] * (len(ids) - 5)]], np.int32)
  is_token_BL = token_BL != tokenizer.pad_id
  score = quick_jit(lambda p: scoring.sequence_score(model, p, token_BL, is_token_BL))
  shift = finished_run.MEAN if stage == "rm" else 0.0
  np.testing.assert_allclose(score(params), score(made[stage][item]) - shift, atol=1e-5)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["architectures"][0].endswith("ForSequenceClassification")
  assert config["pad_token_id"] == model.vocab_size == config["vocab_size"] - 1
  assert list(config["id2label"]) == ["0"]
  added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
  assert [t["id"] for t in added if t["content"] == "<|pad|>"] == [model.vocab_size]
  packaging.write_huggingface(str(tmp_path / "out"), tmp_path / "again")  # with the pad it has
  require_equal(opened(tmp_path / "again")[1], params, atol=1e-7)


def test_the_pad_of_a_byte_level_tokenizer_is_added_once(run, tmp_path):
  """The tokenizer of the export has a token more than the model: it is no second pad's reason."""
  raw = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
  raw.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  raw.decoder = hf_tokenizers.decoders.ByteLevel()
  trainer = hf_tokenizers.trainers.BpeTrainer(
    special_tokens=["<end>"],
    initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  raw.train_from_iterator([TEXT], trainer)
  (tmp_path / "tokenizer").mkdir()
  raw.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
  (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
  cfg = weights.locate(run[0] / "sft").network
  items = {"params": (cfg, "scalar")}
  tokenizer = tokenizers.load(tmp_path / "tokenizer")
  made = finished_run.write_stage(
    tmp_path / "rm", tokenizer, items, result=finished_run.reward_model(0.0)
  )
  packaging.write_huggingface(str(tmp_path / "rm"), tmp_path / "out")
  packaging.write_huggingface(str(tmp_path / "out"), tmp_path / "again")
  for name in ("out", "again"):
    config = json.loads((tmp_path / name / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.vocab_size == config["vocab_size"] - 1
    require_equal(made["params"], opened(tmp_path / name)[1], atol=0)


@pytest.mark.parametrize("kind, tolerance", [("f16", 1e-3), ("q8_0", 1e-2)])
@pytest.mark.parametrize("stage", ["ppo_ptx", "ppo"])
def test_gguf_comes_back(run, tmp_path, stage, kind, tolerance):
  folder, made = run
  packaging.write_gguf(str(folder / stage), tmp_path / "out.gguf", kind)
  assert files(tmp_path) == ["out.gguf", "out.md"]
  model, params, tokenizer = opened(tmp_path / "out.gguf")
  require_equal(made[stage]["ema_params"], params, atol=tolerance)
  source = weights.locate(folder / stage).tokenizer
  assert (tokenizer.encode(TEXT), tokenizer.eos_id) == (source.encode(TEXT), source.eos_id)
  packaging.write_huggingface(str(tmp_path / "out.gguf"), tmp_path / "hf")  # and on from there
  require_equal(opened(tmp_path / "hf")[1], params, atol=0)


# --- whole or not at all --------------------------------------------------------------------------


def test_nothing_is_overwritten(run, tmp_path):
  folder, _ = run
  (tmp_path / "out").mkdir()
  (tmp_path / "out.md").write_text("mine")
  for write, name in (
    (lambda: packaging.write_huggingface(str(folder / "sft"), tmp_path / "out"), "out"),
    (lambda: packaging.write_gguf(str(folder / "sft"), tmp_path / "out.gguf", "f16"), "out.md"),
  ):
    with pytest.raises(ValueError, match=f"/{name} is there already"):
      write()
  assert files(tmp_path) == ["out", "out.md"] and not files(tmp_path / "out")
  assert (tmp_path / "out.md").read_text() == "mine"


@pytest.mark.parametrize("at", ["weights", "card"])
def test_nothing_half_written_stays(run, tmp_path, monkeypatch, at):
  folder, _ = run

  def fail(*args, **kwargs):
    raise OSError("No space left on device")

  if at == "card":
    monkeypatch.setattr(card, "text", fail)
  else:
    monkeypatch.setattr(interop, "write_folder", fail)
    monkeypatch.setattr(interop, "write_file", fail)
  with pytest.raises(OSError):
    packaging.write_huggingface(str(folder / "sft"), tmp_path / "out")
  with pytest.raises(OSError):
    packaging.write_gguf(str(folder / "sft"), tmp_path / "out.gguf", "f16")
  assert files(tmp_path) == []


def test_what_a_killed_export_left_is_replaced(run, tmp_path):
  folder, _ = run
  (tmp_path / ".out.writing").mkdir()
  (tmp_path / ".out.writing" / "model.safetensors").write_text("half")
  packaging.write_huggingface(str(folder / "sft"), tmp_path / "out")
  assert files(tmp_path) == ["out"]


# --- mistakes -------------------------------------------------------------------------------------


def test_what_cannot_be_exported(run, tmp_path):
  folder, _ = run
  out = tmp_path / "out.gguf"
  for stage, which in (("rm", "ema"), ("ppo_ptx", "value")):
    with pytest.raises(ValueError, match="reward or value model, and GGUF has no place"):
      packaging.write_gguf(str(folder / stage), out, "f16", which=which)
  with pytest.raises(ValueError, match="must be an RL stage to have a value network"):
    packaging.write_huggingface(str(folder / "sft"), tmp_path / "out", which="value")
  assert files(tmp_path) == []


def test_an_export_prints_where_it_is(run, tmp_path):
  done = test_export.command(
    f"--checkpoint={run[0] / 'ppo_ptx'}", "--format=hf", f"--out={tmp_path / 'new' / 'out'}"
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == f"written: {tmp_path / 'new' / 'out'}\n"
  assert tokenizers.load(tmp_path / "new" / "out").vocab_size
