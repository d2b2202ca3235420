"""What metadata says of architectures that llama.cpp knows more of than their files do; others in test_gguf_file.py."""

import pathlib

import gguf
import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.data import gguf_header
from instructjax.models.interop import gguf_config
from instructjax.models.interop.hf_config import model_config

PATH = pathlib.Path("model.gguf")
NEOX = {
  "gptneox.block_count": 3,
  "gptneox.context_length": 64,
  "gptneox.embedding_length": 24,
  "gptneox.feed_forward_length": 12,
  "gptneox.attention.head_count": 3,
  "gptneox.attention.layer_norm_epsilon": 1e-5,
  "gptneox.rope.dimension_count": 2,
  "gptneox.use_parallel_residual": True,
}
GEMMA3 = {
  "gemma3.block_count": 7,
  "gemma3.context_length": 64,
  "gemma3.embedding_length": 24,
  "gemma3.feed_forward_length": 12,
  "gemma3.attention.head_count": 4,
  "gemma3.attention.head_count_kv": 1,
  "gemma3.attention.key_length": 8,
  "gemma3.attention.value_length": 8,
  "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
  "gemma3.attention.sliding_window": 5,
  "gemma3.rope.freq_base": 1e6,
}
SMOLLM3 = {
  key.replace("gemma3", "smollm3"): value for key, value in GEMMA3.items() if "sliding" not in key
}


def network(name: str, metadata: dict):
  keys = gguf_config.Keys(PATH, metadata)
  assert not gguf_config.unread_keys(keys, name)
  table = gguf_header.Tensor(gguf.GGMLQuantizationType.F32, (5, 24), offset=0, row_bytes=96)
  tensors = {"token_embd.weight": table}
  raw = gguf_config.config(keys, name, tensors, lambda _: np.empty(0, np.float32))
  return model_config(raw, str(PATH)).cfg


def test_gptneox():
  cfg = network("gptneox", NEOX)
  assert (cfg.norm, cfg.mlp, cfg.parallel_residual) == ("layernorm", "gelu_exact", True)
  assert (cfg.rotary_dim, cfg.head_dim, cfg.rope_base) == (2, 8, 1e4)
  assert cfg.tie_embeddings, "there is no output.weight"
  assert not network("gptneox", NEOX | {"gptneox.use_parallel_residual": False}).parallel_residual
  assert network("gptneox", NEOX | {"gptneox.rope.dimension_count": 8}).rotary_dim == 0


def test_smollm3_has_the_pattern_of_llama_cpp():
  cfg = network("smollm3", SMOLLM3)
  assert (cfg.layer_pattern, cfg.rope_base, cfg.num_layers) == ("GGGN", 1e6, 7)


def test_gemma3_has_what_llama_cpp_has_built_in():
  cfg = network("gemma3", GEMMA3)
  assert (cfg.layer_pattern, cfg.attention_window) == ("LLLLLG", 5)
  assert (cfg.rope_base, cfg.rope_local_base) == (1e6, 1e4)
  assert (cfg.query_pre_attn_scalar, cfg.head_dim, cfg.norm) == (0, 8, "rmsnorm_1p")
  newer = {"gemma3.rope.freq_base_swa": 3e4, "gemma3.attention.sliding_window_pattern": 3}
  cfg = network("gemma3", GEMMA3 | newer)
  assert (cfg.layer_pattern, cfg.rope_local_base) == ("LLG", 3e4)
  scaled = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
  assert network("gemma3", GEMMA3 | scaled).rope_scaling.factor == 8
  assert network("gemma3", GEMMA3 | {"gemma3.block_count": 62}).query_pre_attn_scalar == 6


@pytest.mark.parametrize(
  "name, metadata, message",
  [
    ("gptneox", {"gptneox.attention.head_count": 5}, "head_count=5 must be positive and divide"),
    (
      "gptneox",
      {"gptneox.rope.dimension_count": 9},
      "dimension_count=9 must be positive and at most",
    ),
    (
      "gptneox",
      {"gptneox.use_parallel_residual": None},
      "'gptneox.use_parallel_residual' is missing",
    ),
    ("gptneox", {"gptneox.attention.causal": False}, "attention.causal=False is not supported"),
    (
      "gemma3",
      {"gemma3.attention.sliding_window": None},
      "'gemma3.attention.sliding_window' is miss",
    ),
    (
      "gemma3",
      {"gemma3.final_logit_softcapping": 30.0},
      "final_logit_softcapping=30.0 is not supp",
    ),
    (
      "gemma3",
      {"gemma3.rope.dimension_count": 4},
      "rope.dimension_count=4 must equal the width of a",
    ),
    ("smollm3", {"smollm3.rope.freq_base_swa": 1e4}, "freq_base_swa=10000.0 is a rotary key not"),
  ],
)
def test_refused(name, metadata, message):
  values = {"gptneox": NEOX, "gemma3": GEMMA3, "smollm3": SMOLLM3}[name] | metadata
  with pytest.raises(UserError, match=message):
    network(name, {key: value for key, value in values.items() if value is not None})
