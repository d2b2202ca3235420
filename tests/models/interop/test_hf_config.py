"""config.json in both spellings, back again, and every switch that we lack refused by name."""

import dataclasses
import importlib

import pytest

from instructjax.core.config import RopeScalingConfig, from_config_dict
from instructjax.models.interop import hf_fields
from instructjax.models.interop.hf_config import model_config, to_hf_config

WHERE = "weights/config.json"
GPT2 = {
  "model_type": "gpt2",
  "architectures": ["GPT2LMHeadModel"],
  "activation_function": "gelu_new",
  "layer_norm_epsilon": 1e-05,
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_layer": 12,
  "n_positions": 1024,
  "vocab_size": 50257,
}  # openai-community/gpt2, what it has of the keys that matter
SMOLLM2 = {
  "model_type": "llama",
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "hidden_act": "silu",
  "hidden_size": 576,
  "initializer_range": 0.041666666666666664,
  "intermediate_size": 1536,
  "max_position_embeddings": 8192,
  "mlp_bias": False,
  "num_attention_heads": 9,
  "num_hidden_layers": 30,
  "num_key_value_heads": 3,
  "rms_norm_eps": 1e-05,
  "rope_scaling": None,
  "rope_theta": 100000,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "vocab_size": 49152,
}
LLAMA3 = {
  "factor": 32.0,
  "high_freq_factor": 4.0,
  "low_freq_factor": 1.0,
  "original_max_position_embeddings": 8192,
  "rope_type": "llama3",
}
MISTRAL = {
  "model_type": "mistral",
  "architectures": ["MistralForCausalLM"],
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "max_position_embeddings": 32768,
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "vocab_size": 32000,
}
QWEN2 = {
  "model_type": "qwen2",
  "architectures": ["Qwen2ForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 896,
  "intermediate_size": 4864,
  "max_position_embeddings": 32768,
  "max_window_layers": 21,
  "num_attention_heads": 14,
  "num_hidden_layers": 24,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "vocab_size": 151936,
}


def without(raw, *names):
  return {name: value for name, value in raw.items() if name not in names}


def test_gpt2():
  found = model_config(GPT2, WHERE)
  cfg = found.cfg
  assert (found.vocab_size, found.head) == (50257, "lm")
  assert (cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.num_kv_heads) == (12, 768, 12, 12)
  assert (cfg.head_dim, cfg.d_mlp, cfg.max_length, cfg.norm_eps) == (64, 3072, 1024, 1e-5)
  assert (cfg.position, cfg.norm, cfg.mlp) == ("learned", "layernorm", "gelu")
  assert (cfg.use_bias, cfg.qkv_bias, cfg.tie_embeddings, cfg.init_std) == (True, False, True, 0.02)
  assert model_config(GPT2 | {"n_inner": 99}, WHERE).cfg.d_mlp == 99
  assert model_config(GPT2 | {"n_inner": None}, WHERE).cfg.d_mlp == 3072
  assert not model_config(GPT2 | {"tie_word_embeddings": False}, WHERE).cfg.tie_embeddings


def test_llama():
  cfg = model_config(SMOLLM2, WHERE).cfg
  assert (cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.num_kv_heads) == (30, 576, 9, 3)
  assert (cfg.head_dim, cfg.d_mlp, cfg.max_length, cfg.norm_eps) == (64, 1536, 8192, 1e-5)
  assert (cfg.position, cfg.norm, cfg.mlp) == ("rope", "rmsnorm", "swiglu")
  assert (cfg.use_bias, cfg.qkv_bias, cfg.tie_embeddings) == (False, False, True)
  assert (cfg.rope_base, cfg.rope_scaling.kind) == (1e5, "none")
  biased = model_config(SMOLLM2 | {"attention_bias": True, "mlp_bias": True}, WHERE).cfg
  assert biased.use_bias and not biased.qkv_bias
  bare = without(
    SMOLLM2, "tie_word_embeddings", "num_key_value_heads", "rope_theta", "rms_norm_eps"
  )
  cfg = model_config(bare, WHERE).cfg
  assert (cfg.tie_embeddings, cfg.num_kv_heads, cfg.rope_base, cfg.norm_eps) == (
    False,
    9,
    1e4,
    1e-6,
  )
  assert model_config(SMOLLM2 | {"head_dim": 32}, WHERE).cfg.head_dim == 32


def test_mistral_context_is_cut_to_the_window(monkeypatch):
  """Where every earlier token is inside the window, attention is dense."""
  lines = []
  monkeypatch.setattr(hf_fields.logging, "warning", lambda text, *args: lines.append(text % args))
  assert model_config(MISTRAL, WHERE).cfg.max_length == 4096
  assert lines == [
    f"{WHERE}: context of 32768 tokens cut to sliding_window=4096: up to there attention is dense"
  ]
  assert model_config(without(MISTRAL, "sliding_window"), WHERE).cfg.max_length == 4096
  del lines[:]
  assert model_config(MISTRAL | {"sliding_window": None}, WHERE).cfg.max_length == 32768
  assert model_config(MISTRAL | {"sliding_window": 50_000}, WHERE).cfg.max_length == 32768
  assert not lines


def test_qwen2():
  cfg = model_config(QWEN2, WHERE).cfg
  assert (cfg.use_bias, cfg.qkv_bias, cfg.rope_base) == (False, True, 1e6)
  assert (cfg.tie_embeddings, cfg.max_length) == (True, 32768)


@pytest.mark.parametrize(
  "scaling, expected",
  [
    (None, ("none", 8.0, 1.0, 4.0, 8192)),
    ({"rope_type": "default"}, ("none", 8.0, 1.0, 4.0, 8192)),
    ({"type": "linear", "factor": 2}, ("linear", 2.0, 1.0, 4.0, 8192)),
    ({"rope_type": "linear", "factor": 2.0}, ("linear", 2.0, 1.0, 4.0, 8192)),
    (LLAMA3 | {"original_max_position_embeddings": 77}, ("llama3", 32.0, 1.0, 4.0, 77)),
    (without(LLAMA3, "original_max_position_embeddings"), ("llama3", 32.0, 1.0, 4.0, 8192)),
  ],
)
def test_rope_scaling_in_both_spellings(scaling, expected):
  four = model_config(SMOLLM2 | {"rope_scaling": scaling, "rope_theta": 5e5}, WHERE).cfg
  assert four.rope_base == 5e5
  assert four.rope_scaling == RopeScalingConfig(*expected, 0.0)
  parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": 5e5}
  five = without(SMOLLM2, "rope_theta", "rope_scaling") | {"rope_parameters": parameters}
  assert model_config(five, WHERE).cfg == four


@pytest.mark.parametrize(
  "architectures, labels, head",
  [
    (None, None, "lm"),
    (["LlamaModel"], None, "lm"),
    (["LlamaForSequenceClassification"], {"id2label": {"0": "LABEL_0"}}, "scalar"),
    (["LlamaForSequenceClassification"], {"num_labels": 1}, "scalar"),
  ],
)
def test_head(architectures, labels, head):
  raw = SMOLLM2 | {"architectures": architectures} | (labels or {})
  assert model_config(raw, WHERE).head == head


@pytest.mark.parametrize(
  "raw, message",
  [
    ([], "[] must be a JSON object"),
    ({}, "lacks 'model_type'"),
    (
      {"model_type": "t5"},
      "model_type='t5' is not supported; known: gpt2, gpt_neox, llama, mistral, qwen2, qwen3, smollm3,"
      " gemma3_text",
    ),
    (
      {"model_type": "gemma2"},
      "model_type='gemma2' is not supported: it needs soft caps (attn_logit_softcapping,"
      " final_logit_softcapping); known: gpt2,",
    ),
    (
      {"model_type": "qwen3_moe"},
      "model_type='qwen3_moe' is not supported: it needs experts (num_experts); known: gpt2,",
    ),
    (without(SMOLLM2, "hidden_size"), "lacks 'hidden_size'"),
    (without(MISTRAL, "num_key_value_heads"), "lacks 'num_key_value_heads'"),
    (without(GPT2, "vocab_size"), "lacks 'vocab_size'"),
    (GPT2 | {"n_layer": "12"}, "n_layer='12' must be a positive whole number"),
    (GPT2 | {"n_layer": True}, "n_layer=True must be a positive whole number"),
    (GPT2 | {"n_layer": 0}, "n_layer=0 must be a positive whole number"),
    (SMOLLM2 | {"rope_theta": "1e4"}, "rope_theta='1e4' must be a number"),
    (SMOLLM2 | {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    (GPT2 | {"n_head": 7}, "n_embd=768 must be a multiple of n_head=7"),
    (
      SMOLLM2 | {"num_attention_heads": 7, "num_key_value_heads": 7},
      "hidden_size=576 must be a multiple of num_attention_heads=7",
    ),
    (SMOLLM2 | {"num_key_value_heads": 2}, ".num_heads=9 must be a multiple of num_kv_heads=2"),
    (SMOLLM2 | {"head_dim": 63}, ".head_dim=63 must be even"),
    (GPT2 | {"activation_function": "gelu"}, "activation_function='gelu' is not supported"),
    (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=False is not supported, only True"),
    (
      GPT2 | {"scale_attn_by_inverse_layer_idx": True},
      "scale_attn_by_inverse_layer_idx=True is not supported, only False",
    ),
    (GPT2 | {"add_cross_attention": True}, "add_cross_attention=True is not supported"),
    (SMOLLM2 | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; known: silu"),
    (SMOLLM2 | {"mlp_bias": True}, "attention_bias=False and mlp_bias=True must be equal"),
    (SMOLLM2 | {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not"),
    (SMOLLM2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    (
      SMOLLM2 | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
      ": rope_parameters: partial_rotary_factor=0.25 is not supported, only 1.0",
    ),
    (
      SMOLLM2 | {"rope_scaling": {"type": "longrope", "factor": 4.0}},
      ": rope_scaling: type='longrope' is not supported; known: default, linear, dynamic, llama3, yarn",
    ),
    (SMOLLM2 | {"rope_scaling": {"type": "linear"}}, ": rope_scaling lacks 'factor'"),
    (SMOLLM2 | {"rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_scaling.factor=0.5 must be >= 1"),
    (SMOLLM2 | {"rope_scaling": "llama3"}, ": rope_scaling: 'llama3' must be a JSON object"),
    (
      QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]},
      "layer_types=['sliding_attention'] must be full_attention only",
    ),
    (
      SMOLLM2 | {"architectures": ["LlamaForTokenClassification"]},
      "architectures=['LlamaForTokenClassification'] must be LlamaForCausalLM or"
      " LlamaForSequenceClassification",
    ),
    (
      SMOLLM2 | {"architectures": ["LlamaForSequenceClassification"]},
      "num_labels=2 must be 1: one score a sequence",
    ),
    (
      SMOLLM2
      | {"architectures": ["LlamaForSequenceClassification"], "id2label": dict.fromkeys("012")},
      "num_labels=3 must be 1",
    ),
  ],
)
def test_what_we_lack_is_refused(raw, message):
  with pytest.raises(ValueError) as error:
    model_config(raw, WHERE)
  assert str(error.value).startswith(WHERE) and message in str(error.value)
  assert "\n" not in str(error.value)


# --- back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "raw",
  [
    GPT2,
    GPT2 | {"n_inner": 100, "tie_word_embeddings": False},
    SMOLLM2,
    SMOLLM2 | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    SMOLLM2 | {"rope_scaling": LLAMA3},
    SMOLLM2 | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    SMOLLM2
    | {
      "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_slow": 1.0,
        "beta_fast": 32.0,
        "original_max_position_embeddings": 77,
        "attention_factor": 1.5,
      }
    },
    MISTRAL | {"sliding_window": None},
    QWEN2,
    QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21},
  ],
  ids=str,
)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_round_trip(raw, head):
  first = dataclasses.replace(model_config(raw, WHERE), head=head)
  written = to_hf_config(first.cfg, first.vocab_size, head)
  assert model_config(written, WHERE) == first
  if head == "lm":  # nothing that the file said is lost
    kept = written.keys() & raw.keys() - {"torch_dtype", "model_type", "architectures"}
    assert {name: written[name] for name in kept} == {name: raw[name] for name in kept}


def test_the_score_bias_and_the_pad_are_in_the_config():
  cfg = model_config(SMOLLM2, WHERE).cfg
  written = to_hf_config(cfg, 49152, "scalar", 0.25)
  assert written["architectures"] == ["LlamaForSequenceClassification"]
  assert (written["vocab_size"], written["pad_token_id"]) == (49153, 49152)
  assert written["instructjax_score_bias"] == 0.25
  assert written["id2label"] == {"0": "LABEL_0"}, "this is how transformers counts labels"


def test_presets_are_exportable():
  config = from_config_dict(importlib.import_module("configs.ppo_ptx").get_config("tiny"))
  assert to_hf_config(config.model, 2000, "lm")["model_type"] == "llama"
  # Fields that a family does not use are equal too, so that configs can be compared field by field.
  ours = config.model.network
  assert model_config(to_hf_config(ours, 2000, "lm"), WHERE).cfg == ours


def test_a_band_wider_than_the_context_is_dense(gpt2):
  cfg = dataclasses.replace(gpt2, attention_window=16)
  assert to_hf_config(cfg, 19, "lm")["model_type"] == "gpt2"
