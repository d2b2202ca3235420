"""The config.json of released models of the families with switches of their own, and what they could say besides."""

import dataclasses

import pytest

from instructjax.core.errors import UserError
from instructjax.models.interop import config_keys, hf_fields, rotary
from instructjax.models.interop.hf_config import model_config, to_hf_config

WHERE = "weights/config.json"
# What the released files have of the keys that matter, and some that do not.
QWEN3 = {
  "model_type": "qwen3",
  "architectures": ["Qwen3ForCausalLM"],
  "attention_bias": False,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "intermediate_size": 3072,
  "max_position_embeddings": 40960,
  "max_window_layers": 28,
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}  # Qwen/Qwen3-0.6B
LLAMA32 = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "head_dim": 64,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 8192,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "num_attention_heads": 32,
  "num_hidden_layers": 16,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": True,
  "vocab_size": 128256,
}  # meta-llama/Llama-3.2-1B
PYTHIA = {
  "model_type": "gpt_neox",
  "architectures": ["GPTNeoXForCausalLM"],
  "bos_token_id": 0,
  "eos_token_id": 0,
  "hidden_act": "gelu",
  "hidden_size": 768,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 2048,
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "rotary_emb_base": 10000,
  "rotary_pct": 0.25,
  "tie_word_embeddings": False,
  "use_cache": True,
  "use_parallel_residual": True,
  "vocab_size": 50304,
}  # EleutherAI/pythia-160m
SMOLLM3 = {
  "model_type": "smollm3",
  "architectures": ["SmolLM3ForCausalLM"],
  "attention_bias": False,
  "hidden_act": "silu",
  "hidden_size": 2048,
  "intermediate_size": 11008,
  "layer_types": ["full_attention"] * 36,
  "max_position_embeddings": 65536,
  "max_window_layers": 28,
  "mlp_bias": False,
  "no_rope_layer_interval": 4,
  "no_rope_layers": [1, 1, 1, 0] * 9,
  "num_attention_heads": 16,
  "num_hidden_layers": 36,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 5000000.0,
  "sliding_window": None,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 128256,
}  # HuggingFaceTB/SmolLM3-3B
GEMMA3 = {
  "model_type": "gemma3_text",
  "architectures": ["Gemma3ForCausalLM"],
  "attention_bias": False,
  "attn_logit_softcapping": None,
  "cache_implementation": "hybrid",
  "eos_token_id": [1, 106],
  "final_logit_softcapping": None,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "hidden_size": 1152,
  "intermediate_size": 6912,
  "max_position_embeddings": 32768,
  "num_attention_heads": 4,
  "num_hidden_layers": 26,
  "num_key_value_heads": 1,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-06,
  "rope_local_base_freq": 10000,
  "rope_scaling": None,
  "rope_theta": 1000000,
  "sliding_window": 512,
  "sliding_window_pattern": 6,
  "vocab_size": 262144,
}  # google/gemma-3-1b-it
RELEASED = dict(qwen3=QWEN3, llama32=LLAMA32, pythia=PYTHIA, smollm3=SMOLLM3, gemma3=GEMMA3)


def without(raw, *names):
  return {name: value for name, value in raw.items() if name not in names}


def network(raw):
  return model_config(raw, WHERE).cfg


@pytest.fixture
def lines(monkeypatch):
  found = []
  for module in (config_keys, rotary, hf_fields):
    monkeypatch.setattr(module.logging, "warning", lambda text, *args: found.append(text % args))
  return found


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_released_configs_are_read_without_a_word_and_come_back(name, head, lines):
  raw = RELEASED[name]
  first = dataclasses.replace(model_config(raw, WHERE), head=head)
  assert not lines
  written = to_hf_config(first.cfg, first.vocab_size, head)
  assert model_config(written, WHERE) == first
  if head == "lm":  # nothing that the file said is lost
    kept = written.keys() & raw.keys() - {"bos_token_id", "eos_token_id"}
    assert {key: written[key] for key in kept} == {key: raw[key] for key in kept}


def test_qwen3():
  cfg = network(QWEN3)
  assert (cfg.qk_norm, cfg.head_dim, cfg.d_model // cfg.num_heads) == (True, 128, 64)
  assert (cfg.use_bias, cfg.qkv_bias, cfg.rope_base) == (False, False, 1e6)
  assert network(without(QWEN3, "head_dim")).head_dim == 128, "as transformers, not 1024 / 16"
  assert not network(without(QWEN3, "tie_word_embeddings")).tie_embeddings


WINDOW = {"use_sliding_window": True, "sliding_window": 512}


def test_windows_of_qwen():
  """As in transformers: the layers from max_window_layers on, or those that layer_types names."""
  letters = lambda cfg: (cfg.layer_pattern * cfg.num_layers)[: cfg.num_layers]
  cfg = network(QWEN3 | WINDOW | {"max_window_layers": 25})
  assert (cfg.attention_window, letters(cfg)) == (512, "G" * 25 + "L" * 3)
  cfg = network(QWEN3 | WINDOW | {"max_window_layers": 0})
  assert (cfg.attention_window, cfg.layer_pattern) == (512, "L")
  kinds = ["sliding_attention", "full_attention"] * 14
  cfg = network(QWEN3 | WINDOW | {"max_window_layers": 0, "layer_types": kinds})
  assert (cfg.attention_window, cfg.layer_pattern) == (512, "LG")
  written = to_hf_config(cfg, 7, "lm")
  assert written["layer_types"] == kinds and "max_window_layers" not in written
  assert network(written | {"vocab_size": 7}) == cfg
  # None of these has a window.
  plain = network(QWEN3)
  for changes in (
    {"max_window_layers": 28},
    {"sliding_window": None},
    {"use_sliding_window": False},
  ):
    assert network(QWEN3 | WINDOW | changes) == plain


def test_llama_3_2():
  cfg = network(LLAMA32)
  assert cfg.tie_embeddings and cfg.rope_scaling == rotary.RopeScalingConfig(
    "llama3", 32.0, 1.0, 4.0, 8192, 0.0
  )


def test_pythia():
  cfg = network(PYTHIA)
  assert (cfg.position, cfg.norm, cfg.mlp) == ("rope", "layernorm", "gelu_exact")
  assert (cfg.parallel_residual, cfg.rotary_dim, cfg.head_dim) == (True, 16, 64)
  assert (cfg.use_bias, cfg.tie_embeddings, cfg.num_kv_heads) == (True, False, 12)
  assert network(PYTHIA | {"hidden_act": "gelu_new"}).mlp == "gelu"
  assert not network(PYTHIA | {"use_parallel_residual": False}).parallel_residual
  assert network(without(PYTHIA, "use_parallel_residual")).parallel_residual
  assert network(PYTHIA | {"rotary_pct": 1.0}).rotary_dim == 0
  assert network(without(PYTHIA, "rotary_pct")).rotary_dim == 16


def test_smollm3():
  cfg = network(SMOLLM3)
  assert (cfg.layer_pattern, cfg.rope_base, cfg.norm) == ("GGGN", 5e6, "rmsnorm")
  short = without(SMOLLM3, "no_rope_layers", "layer_types")
  assert network(short) == cfg
  assert network(short | {"no_rope_layer_interval": 3}).layer_pattern == "GGN"
  assert network(short | {"no_rope_layers": [0] + [1] * 35}).layer_pattern == "N" + "G" * 35
  assert network(short | {"no_rope_layers": [1] * 40}).layer_pattern == "GL", "no window: all alike"
  assert network(without(SMOLLM3, "tie_word_embeddings")).tie_embeddings


def test_gemma_3():
  cfg = network(GEMMA3)
  assert (cfg.norm, cfg.mlp, cfg.qk_norm, cfg.sandwich_norm) == ("rmsnorm_1p", "geglu", True, True)
  assert (cfg.layer_pattern, cfg.attention_window) == ("LLLLLG", 512)
  assert (cfg.rope_base, cfg.rope_local_base) == (1e6, 1e4)
  assert (cfg.scale_embeddings, cfg.tie_embeddings, cfg.query_pre_attn_scalar) == (True, True, 0)
  assert network(GEMMA3 | {"query_pre_attn_scalar": 168}).query_pre_attn_scalar == 168
  # As transformers 5 writes it.
  kinds = ["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(26)]
  five = without(
    GEMMA3, "rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"
  )
  five |= {"layer_types": kinds, "_sliding_window_pattern": 6}
  blocks = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
  }
  found = network(five | {"rope_parameters": blocks})
  assert (found.rope_base, found.rope_local_base, found.layer_pattern) == (2e6, 3e4, "LLLLLG")
  assert (found.rope_scaling.kind, found.rope_scaling.factor) == ("linear", 8.0)
  four = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 2e6}
  assert network(GEMMA3 | four | {"rope_local_base_freq": 3e4}) == found


@pytest.mark.parametrize(
  "raw, message",
  [
    (QWEN3 | WINDOW | {"max_window_layers": -1}, "max_window_layers=-1 must be a whole number"),
    (QWEN3 | WINDOW | {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, and"),
    (QWEN3 | WINDOW | {"layer_types": ["chunked_attention"] * 28}, "must be full_attention only"),
    (
      QWEN3 | WINDOW | {"sliding_window": None, "layer_types": ["sliding_attention"] * 28},
      "must be full_attention only",
    ),
    (QWEN3 | {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    (without(QWEN3, "num_key_value_heads"), "lacks 'num_key_value_heads'"),
    (QWEN3 | {"layer_types": ["sliding_attention"] * 28}, "must be full_attention only"),
    (
      QWEN3 | {"partial_rotary_factor": 0.5},
      "partial_rotary_factor=0.5 is not supported, only 1.0",
    ),
    (PYTHIA | {"attention_bias": False}, "attention_bias=False is not supported, only True"),
    (PYTHIA | {"hidden_act": "relu"}, "hidden_act='relu' is not supported; known: gelu, gelu_new"),
    (PYTHIA | {"rotary_pct": 0.3}, "rotary_pct=0.3 must leave an even number of the 64 dimensions"),
    (PYTHIA | {"rotary_pct": 0.01}, "of the 64 dimensions of a head to turn, got 0"),
    (PYTHIA | {"rotary_pct": 1.5}, "rotary_pct=1.5 must be above 0 and at most 1"),
    (
      PYTHIA | {"partial_rotary_factor": 0.5},
      "partial_rotary_factor=0.5 contradicts rotary_pct=0.25",
    ),
    (
      PYTHIA | {"rope_theta": 5e5},
      "rotary_emb_base=10000 contradicts rope_theta=500000 at the top",
    ),
    (
      without(PYTHIA, "rotary_emb_base") | {"rope_theta": 5e5},
      "rope_theta=500000.0 is not read by transformers 5, which takes 10000: write rotary_emb_base",
    ),
    (PYTHIA | {"hidden_size": 770}, "hidden_size=770 must be a multiple of num_attention_heads=12"),
    (
      SMOLLM3 | {"no_rope_layers": [1, 1]},
      "no_rope_layers=[1, 1] must hold a 1 (rotary positions)",
    ),
    (SMOLLM3 | {"no_rope_layers": [2] * 36}, "or 0 for each of 36 layers"),
    (SMOLLM3 | {"no_rope_layers": [True] * 36}, "or 0 for each of 36 layers"),
    (
      SMOLLM3 | {"use_sliding_window": True},
      "use_sliding_window=True is not supported, only False",
    ),
    (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
    (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
    (GEMMA3 | {"hidden_activation": "silu"}, "hidden_activation='silu' is not supported"),
    (GEMMA3 | {"layer_types": ["sliding_attention"] * 3}, "layer_types has 3 entries, and num_h"),
    (
      GEMMA3 | {"layer_types": ["chunked_attention"] * 26},
      "layer_types=['chunked_attention'] must",
    ),
    (
      GEMMA3 | {"rope_parameters": {"rope_theta": 1e6}},
      "rope_theta=1000000.0 is not supported: it",
    ),
    (
      GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
      "rope_type='linear' is not supported, only 'default'",
    ),
    (
      GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}},
      "rope_theta=20000.0 contradicts rope_local_base_freq=10000 at the top",
    ),
    (LLAMA32 | {"rope_local_base_freq": 1e4}, "rope_local_base_freq=10000.0 is not read by this"),
    (LLAMA32 | {"no_rope_layers": [1] * 16}, "is not read by this architecture"),
    (LLAMA32 | {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar=64 is not supported"),
  ],
)
def test_what_we_lack_is_refused(raw, message):
  with pytest.raises(UserError) as error:
    network(raw)
  assert str(error.value).startswith(WHERE) and message in str(error.value)
  assert "\n" not in str(error.value)
