"""Every spelling of rotary settings: the frequencies of transformers or llama.cpp, or a refusal that names the key."""

import json
import math
import pathlib

import gguf
import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys
from instructjax.models import layers
from instructjax.models.interop import describe, gguf_file, hf_config, rotary

GOLDEN = json.loads((pathlib.Path(__file__).parents[2] / "golden/rotary.json").read_text())["cases"]
# Spellings that transformers computes and we refuse -> what the message must name. All others are equal, or are refused
# by transformers as well.
REFUSED = {
  "theta in both places, different": "rope_parameters: rope_theta=500.0 contradicts rope_theta=700",
  "theta only in the block that is replaced": "rope_scaling and rope_parameters contradict",
  "factor without a type": "rope_scaling lacks 'rope_type', and has factor=4.0",
  "factor without a type, version 5": "rope_parameters lacks 'rope_type', and has factor=4.0",
  "linear, types that differ": "type='llama3' contradicts rope_type='linear'",
  "default, old type linear": "type='linear' contradicts rope_type='default'",
  "linear, factor below 1": "rope_scaling.factor=0.5 must be >= 1",
  "both, other factors": "rope_scaling and rope_parameters contradict",
  "default scaling beside parameters": "rope_scaling and rope_parameters contradict",
  "llama3 and linear": "rope_scaling and rope_parameters contradict",
  "llama3, original lengths differ": "original_max_position_embeddings=32 contradicts",
  "llama3, low above high": "low_freq_factor=8.0 must be > 0 and below",
  "dynamic, original length": "original_max_position_embeddings=32 must be",
  "yarn": "rope_type='yarn' is not supported",
  "yarn, old type": "type='yarn' is not supported",
  "yarn, factor 1": "rope_type='yarn' is not supported",
  "yarn, attention_factor": "rope_type='yarn' is not supported",
  "longrope": "rope_type='longrope' is not supported",
  "proportional": "rope_type='proportional' is not supported",
  "partial at the top": "partial_rotary_factor=0.5 is not supported",
  "partial at the top beside linear": "partial_rotary_factor=0.5 is not supported",
  "partial inside": "rope_parameters: partial_rotary_factor=0.5 is not supported",
  "by kind of layer": "rope_parameters: full_attention=",
  "by kind of layer, one": "rope_parameters: full_attention=",
  "rotary_pct": "rotary_pct=0.25 is not read by this architecture",
  "rotary_dim": "rotary_dim=4 is not read",
  "rotary_emb_base": "rotary_emb_base=500 is not read",
  "rope_local_base_freq": "rope_local_base_freq=500.0 is not read",
  "rope_type at the top": "rope_type='linear' is not read",
  "rope_scaling_factor": "rope_scaling_factor=4.0 is not read",
  "no_rope_layers": "no_rope_layers=[1, 0] is not read",
}


def frequencies(raw: dict) -> np.ndarray:
  return np.asarray(layers.rotary_frequencies(hf_config.model_config(raw, "config.json").cfg))


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_are_those_of_transformers(name):
  case, spelling = GOLDEN[name], name.partition(": ")[2]
  if spelling in REFUSED or "error" in case:
    with pytest.raises(UserError) as error:
      frequencies(case["config"])
    assert REFUSED.get(spelling, "config.json: ") in str(error.value)
    assert "\n" not in str(error.value)
    return
  np.testing.assert_allclose(frequencies(case["config"]), case["inv_freq"], rtol=2e-6)
  assert case["factor"] == 1, "cosine and sine are multiplied by nothing else here"


def test_what_is_refused_is_computed_by_transformers():
  """Otherwise an entry of REFUSED would say nothing."""
  assert {f"llama: {name}" for name in REFUSED} <= {
    n for n, c in GOLDEN.items() if "error" not in c
  }


def test_live():
  """The recorded numbers against the transformers that is installed, if there is one."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from tests.golden import rotary_by_transformers

  for name in ("llama: llama3", "qwen2: both equal"):
    now = rotary_by_transformers.computed(GOLDEN[name]["config"])
    np.testing.assert_allclose(now["inv_freq"], GOLDEN[name]["inv_freq"], rtol=1e-6)


def test_keys_that_a_type_has_no_use_for_are_named(monkeypatch):
  lines = []
  monkeypatch.setattr(rotary.logging, "warning", lambda text, *args: lines.append(text % args))
  frequencies(GOLDEN["llama: linear, mscale"]["config"])
  assert lines == [
    "config.json: rope_scaling: keys that rope_type linear has no use for, as in transformers: mscale"
  ]


@pytest.mark.parametrize(
  "value", [[], [1], 0, 1.5, True, "linear", {"a": {"b": 1}}, {"rope_type": []}, {"factor": {}}]
)
@pytest.mark.parametrize("block", ["rope_scaling", "rope_parameters"])
def test_values_of_every_type(block, value):
  with pytest.raises(UserError, match=f"config.json: {block}"):
    rotary.from_config(Keys({block: value, "max_position_embeddings": 8}, "config.json"))


@pytest.mark.parametrize("name", ["rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", [[], {}, "x", True, math.inf, math.nan, 10**400, -1])
def test_numbers_of_every_kind(name, value):
  with pytest.raises(UserError, match=name):
    rotary.from_config(Keys({name: value, "max_position_embeddings": 8}, "config.json"))


def test_switches_that_are_off_pass():
  raw = GOLDEN["llama: nothing"]["config"]
  off = {"rotary_pct": 1.0, "use_mrope": False, "rope_interleaved": False, "rotary_dim": None}
  np.testing.assert_array_equal(frequencies(raw | off), frequencies(raw))
  for name, on in (("use_mrope", True), ("rope_interleaved", True), ("use_rope", False)):
    with pytest.raises(UserError, match=f"config.json: {name}={on} is not read"):
      frequencies(raw | {name: on})


def test_learned_positions_have_no_rotary_keys():
  raw = {"model_type": "gpt2", "vocab_size": 5, "rope_scaling": {"type": "linear", "factor": 2.0}}
  with pytest.raises(UserError, match="rope_scaling=.* this architecture has learned positions"):
    hf_config.model_config(raw, "config.json")


# --- GGUF -----------------------------------------------------------------------------------------

BASE, HEAD_DIM = 500.0, 4
# By llama.cpp (llama-model.cpp, llama-context.cpp, ggml's rope): the angle of pair i at position p is
# p * scale * base^(-2i / head_dim) / freqs[i], and cosine and sine are multiplied by attn_factor. scale is 1 / factor
# for type linear, which is the default, and 1 for type none. With base 500 and heads of four: 1 and 500^-0.5.
PLAIN = np.array([1.0, 500**-0.5])
GGUF = {
  "nothing": ({}, PLAIN),
  "type none": ({"scaling.type": "none"}, PLAIN),
  "type none, factor": ({"scaling.type": "none", "scaling.factor": 4.0}, PLAIN),
  "linear": ({"scaling.type": "linear", "scaling.factor": 4.0}, PLAIN / 4),
  "linear without a factor": ({"scaling.type": "linear"}, PLAIN),
  "factor without a type": ({"scaling.factor": 4.0}, PLAIN / 4),
  "factor 0": ({"scaling.factor": 0.0}, PLAIN),
  "factor 1": ({"scaling.factor": 1.0}, PLAIN),
  "old key": ({"scale_linear": 4.0}, PLAIN / 4),
  "old key and type": ({"scaling.type": "linear", "scale_linear": 4.0}, PLAIN / 4),
  "old key beside the new one, which wins": (
    {"scaling.factor": 2.0, "scale_linear": 4.0},
    PLAIN / 2,
  ),
  "old key, type none": ({"scaling.type": "none", "scale_linear": 4.0}, PLAIN),
  "base missing": ({"freq_base": None}, np.array([1.0, 1e4**-0.5])),
  "attn_factor 1": ({"scaling.attn_factor": 1.0}, PLAIN),
  "yarn's keys without yarn": (
    {
      "scaling.original_context_length": 16,
      "scaling.yarn_beta_fast": 16.0,
      "scaling.yarn_beta_slow": 2.0,
      "scaling.yarn_log_multiplier": 0.1,
    },
    PLAIN,
  ),
  "yarn": ({"scaling.type": "yarn", "scaling.factor": 4.0}, "rope.scaling.type='yarn'"),
  "longrope": ({"scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
  "type of no kind": ({"scaling.type": ""}, "rope.scaling.type=''"),
  "attn_factor": ({"scaling.attn_factor": 1.2}, "rope.scaling.attn_factor=1.2"),
  "yarn_attn_factor": ({"scaling.yarn_attn_factor": 2.0}, "rope.scaling.yarn_attn_factor=2"),
  "yarn_ext_factor": ({"scaling.yarn_ext_factor": 1.0}, "rope.scaling.yarn_ext_factor=1"),
  "factor below 1": ({"scaling.factor": 0.5}, "rope.scaling.factor=0.5 must be 1 or more"),
  "factor not a number": ({"scaling.factor": math.nan}, "rope.scaling.factor=nan must be"),
  "old key negative": ({"scale_linear": -4.0}, "rope.scale_linear=-4 must be 1 or more"),
  "factor of another type": ({"scaling.factor": "4"}, "rope.scaling.factor' must be one value"),
  "base 0": ({"freq_base": 0.0}, "rope.freq_base=0 must be a number above 0"),
  "base infinite": ({"freq_base": math.inf}, "rope.freq_base=inf must be a number above 0"),
  "rotated in part": ({"dimension_count": 2}, "rope.dimension_count=2 must equal the width"),
  "sections": ({"dimension_sections": [1, 1, 0]}, "rope.dimension_sections=.* not supported"),
  "another base": ({"freq_base_swa": 1e4}, "rope.freq_base_swa=10000.0 is a rotary key"),
}
KINDS = {
  int: gguf.GGUFValueType.UINT32,
  float: gguf.GGUFValueType.FLOAT32,
  str: gguf.GGUFValueType.STRING,
  list: gguf.GGUFValueType.ARRAY,
}


def write(path, arch, keys, freqs=None, head_dim=HEAD_DIM) -> pathlib.Path:
  """A network of one layer and two heads with these rotary keys."""
  width = 2 * head_dim
  values = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": width,
    "feed_forward_length": 3,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": BASE,
  } | {f"rope.{name}": value for name, value in keys.items()}
  writer = gguf.GGUFWriter(path, arch)
  for name, value in values.items():
    if value is not None:
      writer.add_key_value(f"{arch}.{name}", value, KINDS[type(value)])
  zeros = lambda *shape: np.zeros(shape, np.float32)
  tensors = {f"blk.0.attn_{name}.weight": zeros(width, width) for name in ("q", "k", "v", "output")}
  tensors |= {f"blk.0.{name}_norm.weight": zeros(width) for name in ("attn", "ffn")}
  tensors |= {f"blk.0.ffn_{name}.weight": zeros(3, width) for name in ("gate", "up")}
  tensors |= {"blk.0.ffn_down.weight": zeros(width, 3), "output_norm.weight": zeros(width)}
  tensors |= {"token_embd.weight": zeros(5, width)}
  if arch == "qwen2":
    tensors |= {f"blk.0.attn_{name}.bias": zeros(width) for name in "qkv"}
  if freqs is not None:
    tensors["rope_freqs.weight"] = np.asarray(freqs, np.float32)
  for name, value in tensors.items():
    writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("name", GGUF)
def test_frequencies_are_those_of_llama_cpp(name, arch, tmp_path):
  keys, expected = GGUF[name]
  path = write(tmp_path / "model.gguf", arch, keys)
  if isinstance(expected, str):
    with pytest.raises(UserError, match=expected):
      gguf_file.open_file(path)
    return
  found = describe(gguf_file.open_file(path)).cfg
  np.testing.assert_allclose(layers.rotary_frequencies(found), expected, rtol=1e-6)


def test_divisors(tmp_path):
  """Heads of 8 and base 500,000: wavelengths 6.28, 167, 4443 and 118,142; see `gguf_names.llama3_factors`."""
  # 8192 / 4443 = 1.844 turns: (1.844 - 1) / 3 = .2813 of the way from factor 8 to 1: 1 / (.7187 / 8 + .2813) = 2.694.
  freqs = [1.0, 1.0, 2.694, 8.0]
  keys = {"freq_base": 500000.0}
  exact = 1 / ((1 - (smooth := (8192 / (2 * math.pi * 500000**0.5) - 1) / 3)) / 8 + smooth)
  assert abs(exact - freqs[2]) < 1e-3
  freqs[2] = exact
  path = write(tmp_path / "a.gguf", "llama", keys, freqs, 8)
  expected = 500000.0 ** -(np.arange(4) / 4) / freqs
  found = layers.rotary_frequencies(describe(gguf_file.open_file(path)).cfg)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # llama.cpp multiplies by both, and it reads the tensor for llama only.
  for arch, more, message in (
    ("llama", {"scaling.factor": 2.0}, "are two rotary scalings"),
    ("qwen2", {}, "'rope_freqs.weight' of shape .* is none of architecture 'qwen2'"),
  ):
    with pytest.raises(UserError, match=message):
      gguf_file.open_file(write(tmp_path / f"{arch}.gguf", arch, keys | more, freqs, 8))
  for number, wrong in enumerate(([1, 1, 1, math.nan], [1, 1, 0, 8], [1, 1, math.inf, 8], [8.0])):
    with pytest.raises(UserError, match="must be Llama 3's rotary scaling"):
      gguf_file.open_file(write(tmp_path / f"{number}.gguf", "llama", keys, wrong, 8))
