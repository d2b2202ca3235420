"""Keys of config.json that change the logits are obeyed or refused, and those that nothing reads are named."""

import pytest

from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys
from instructjax.models.interop import config_keys


@pytest.fixture
def lines(monkeypatch):
  found = []
  monkeypatch.setattr(config_keys.logging, "warning", lambda text, *args: found.append(text % args))
  return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
  "name, value",
  [
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("logit_scale", 0.0625),
    ("logits_scaling", 8),
    ("quantization_config", {"quant_method": "gptq"}),
    ("compression_config", {}),
    ("transformers_weights", "other.safetensors"),
    ("per_layer_config", {"0": {"sliding_window": 8}}),
    ("pruned_heads", {"0": [1]}),
    ("scale_attn_by_inverse_layer_idx", True),
    ("scale_attn_weights", False),
    ("use_qk_norm", True),
    ("num_local_experts", 8),
    ("is_encoder_decoder", True),
    ("alibi", [1]),
  ],
)
def test_refused(family, name, value, lines):
  with pytest.raises(UserError, match=f"^FILE: {name}=.* is not supported"):
    config_keys.check(Keys({name: value}, "FILE"), family)


def test_values_that_change_nothing_pass(lines):
  raw = {name: values[0] for name, values in config_keys._MUST_BE.items() if values}
  raw |= dict.fromkeys(config_keys._MUST_BE.keys() - raw.keys())
  config_keys.check(Keys(raw, "FILE"), "llama")
  assert not lines


@pytest.mark.parametrize(
  "family, keys",
  [
    ("gpt2", ["hidden_act", "rms_norm_eps"]),  # of Llama
    ("llama", ["activation_function", "layer_norm_eps", "sliding_window"]),
    ("mistral", ["attention_bias"]),
    ("qwen2", ["attention_bias", "mlp_bias"]),
  ],
)
def test_what_nothing_reads_is_named(family, keys, lines):
  raw = dict.fromkeys(keys, 1) | {"use_cache": True, "bos_token_id": 1, "vocab_size": 5, "x": None}
  config_keys.check(Keys(raw, "FILE"), family)
  assert lines == [
    f"FILE: not read, since architecture {family} has no use for it in transformers either:"
    f" {', '.join(keys)}"
  ]


def test_many_and_long_keys_are_cut(lines):
  config_keys.check(Keys({f"{i}\n{'x' * 10_000}": 1 for i in range(30)}, "FILE"), "llama")
  assert len(lines) == 1 and lines[0].isprintable() and len(lines[0]) < 1200
  assert lines[0].endswith("and 22 more")
