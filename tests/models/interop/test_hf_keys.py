"""The architecture that a network is an instance of, and every switch that none has refused by name."""

import dataclasses

import pytest

from instructjax.core.errors import UserError
from instructjax.models.interop import hf_keys
from instructjax.models.interop.hf_config import model_config, to_hf_config
from tests import tiny

NETWORKS = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA, **tiny.FAMILIES}


@pytest.mark.parametrize("name", NETWORKS)
def test_family_and_back(name):
  cfg = NETWORKS[name]
  family = hf_keys.family_of(cfg)
  assert family == {"gemma3": "gemma3_text"}.get(name, name)
  written = to_hf_config(cfg, 19, "lm")
  found = model_config(written, "config.json").cfg
  # GPT-2's file has no rotary base.
  rope_base = found.rope_base if name == "gpt2" else cfg.rope_base
  assert found == dataclasses.replace(cfg, rope_base=rope_base)


def test_other_values_of_what_an_architecture_leaves_open():
  neox, gemma3 = tiny.FAMILIES["gpt_neox"], tiny.FAMILIES["gemma3"]
  for cfg in (
    dataclasses.replace(neox, parallel_residual=False, mlp="gelu", rotary_dim=0),
    dataclasses.replace(gemma3, query_pre_attn_scalar=0, layer_pattern="LLG"),
    dataclasses.replace(tiny.FAMILIES["smollm3"], use_bias=True, layer_pattern="NGG"),
    dataclasses.replace(tiny.LLAMA, qkv_bias=True),
  ):
    assert model_config(to_hf_config(cfg, 19, "lm"), "config.json").cfg == cfg


def test_a_share_of_a_head_that_rounding_would_lower():
  """int(50 * (14 / 50)) is 14, int(50 * (29 / 50)) is 28: transformers takes the integer part."""
  assert int(50 * (29 / 50)) == 28
  cfg = dataclasses.replace(
    tiny.FAMILIES["gpt_neox"], d_model=400, num_heads=4, num_kv_heads=4, head_dim=100, rotary_dim=58
  )
  written = to_hf_config(cfg, 19, "lm")
  assert int(100 * written["rotary_pct"]) == 58
  assert model_config(written, "config.json").cfg == cfg


def test_gemma_3_in_the_words_of_old_and_new_versions():
  cfg = dataclasses.replace(tiny.FAMILIES["gemma3"], layer_pattern="LLG")
  written = to_hf_config(cfg, 19, "lm")
  assert written["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"]
  assert (written["sliding_window_pattern"], written["sliding_window"]) == (3, 3)
  assert (written["rope_theta"], written["rope_local_base_freq"]) == (100.0, 10.0)
  irregular = dataclasses.replace(cfg, layer_pattern="GLL")
  assert "sliding_window_pattern" not in to_hf_config(irregular, 19, "lm")


@pytest.mark.parametrize(
  "family, changes, message",
  [
    ("gpt2", dict(attention_window=8), "attention_window=8 (GPT-3's banded layers)"),
    ("gpt2", dict(norm="rmsnorm"), "position='learned' is GPT-2's, whose norm must be 'layernorm'"),
    ("gpt2", dict(mlp="swiglu"), "whose mlp must be 'gelu', got 'swiglu'"),
    ("gpt2", dict(use_bias=False), "whose use_bias must be True, got False"),
    ("gpt2", dict(use_bias=False, qkv_bias=True), "whose use_bias must be True, got False"),
    ("gpt2", dict(num_kv_heads=2), "num_heads=4, num_kv_heads=2, head_dim=4 must be equal numbers"),
    ("gpt2", dict(head_dim=8), "must be equal numbers of heads that fill d_model=16 (GPT-2)"),
    ("gpt2", dict(parallel_residual=True), "whose parallel_residual must be False, got True"),
    ("gpt2", dict(scale_embeddings=True), "whose scale_embeddings must be False, got True"),
    (
      "llama",
      dict(norm="layernorm"),
      "position='rope' with norm='layernorm' is GPT-NeoX's, whose mlp",
    ),
    (
      "llama",
      dict(mlp="gelu"),
      "norm='rmsnorm' is Llama's, whose mlp must be 'swiglu', got 'gelu'",
    ),
    ("llama", dict(num_heads=6), "d_model=16 must be a multiple of num_heads=6 (Llama)"),
    ("llama", dict(attention_window=8), "must be 0 or reach over max_length=16"),
    ("llama", dict(rotary_dim=2), "norm='rmsnorm' is Llama's, whose rotary_dim must be 0, got 2"),
    ("llama", dict(rope_local_base=9.0), "whose rope_local_base must be 0, got 9.0"),
    ("llama", dict(sandwich_norm=True), "whose sandwich_norm must be False, got True"),
    (
      "qwen3",
      dict(qkv_bias=True),
      "qk_norm=True is Qwen3's, whose qkv_bias must be False, got True",
    ),
    (
      "qwen3",
      dict(layer_pattern="GN"),
      "layer_pattern='GN' is SmolLM3's, whose qk_norm must be False",
    ),
    ("gpt_neox", dict(use_bias=False), "is GPT-NeoX's, whose use_bias must be True, got False"),
    ("gpt_neox", dict(mlp="geglu"), "whose mlp must be 'gelu' or 'gelu_exact', got 'geglu'"),
    ("gemma3", dict(mlp="swiglu"), "norm='rmsnorm_1p' is Gemma 3's, whose mlp must be 'geglu'"),
    ("gemma3", dict(qk_norm=False), "whose qk_norm must be True, got False"),
    (
      "gemma3",
      dict(attention_window=0),
      "must be above 0 and whose layer_pattern must be of G and L",
    ),
    (
      "gemma3",
      dict(layer_pattern="LNG"),
      "got attention_window=3, rope_local_base=10, layer_pattern='LNG'",
    ),
  ],
)
def test_what_hugging_face_lacks_is_refused(family, changes, message):
  cfg = dataclasses.replace(NETWORKS[family], **changes)
  with pytest.raises(UserError) as error:
    to_hf_config(cfg, 19, "lm")
  assert str(error.value).startswith("no Hugging Face architecture holds this model: ")
  assert message in str(error.value)
  assert "\n" not in str(error.value)
