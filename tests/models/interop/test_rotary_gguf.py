"""Rotary keys of GGUF metadata: the frequencies of llama.cpp, or a refusal that names the key."""

import math
import pathlib

import gguf
import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.models import positions
from instructjax.models.interop import describe, gguf_file

BASE, HEAD_DIM = 500.0, 4
# By llama.cpp (llama-model.cpp, llama-context.cpp, ggml's rope): the angle of pair i at position p is
# p * scale * base^(-2i / head_dim) / freqs[i], and cosine and sine are multiplied by attn_factor. scale is 1 / factor
# for type linear, which is the default, and 1 for type none. With base 500 and heads of four: 1 and 500^-0.5.
PLAIN = np.array([1.0, 500**-0.5])
YARN = {"scaling.type": "yarn", "scaling.factor": 4.0}
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
  # Of two pairs within 64 or 1000 tokens: the second makes 64 / 140 and 7.1 turns, and the first 10.2 and 159. A pair's
  # number is ln(tokens / (turns 2 pi)) / ln(500) * 2, so 32 turns in 64 tokens are pair -.37 and one turn is pair .75.
  "yarn": (YARN, PLAIN * [1, 0.25], 0.1 * math.log(4) + 1),
  "yarn, original length": (
    YARN | {"scaling.original_context_length": 1000},
    # 32 turns are pair .52, so 0; one turn is pair 1.63, so 2: the second pair keeps half.
    PLAIN * [1, 0.5 + 0.5 / 4],
    0.1 * math.log(4) + 1,
  ),
  "yarn, attn_factor": (
    YARN | {"scaling.attn_factor": 1.2},
    PLAIN * [1, 0.25],
    1.2 * (0.1 * math.log(4) + 1),
  ),
  "yarn, as it is built in": (
    YARN
    | {
      "scaling.yarn_ext_factor": 1.0,
      "scaling.yarn_beta_fast": 32.0,
      "scaling.yarn_beta_slow": 1.0,
      "scaling.yarn_log_multiplier": 0.0,
      "scaling.finetuned": 1,
    },
    PLAIN * [1, 0.25],
    0.1 * math.log(4) + 1,
  ),
  "yarn without a factor": ({"scaling.type": "yarn"}, PLAIN, 1.0),
  "yarn, no ext_factor": (YARN | {"scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor=0 is not"),
  "yarn, attn_factor 0": (YARN | {"scaling.attn_factor": 0.0}, "attn_factor=0 must be"),
  "yarn, beta_fast": (YARN | {"scaling.yarn_beta_fast": 16.0}, "beta_fast=16 is not read for this"),
  "yarn, log_multiplier": (
    YARN | {"scaling.yarn_log_multiplier": 0.1},
    "log_multiplier=0.1 is not",
  ),
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
  keys, expected, *factor = GGUF[name]
  path = write(tmp_path / "model.gguf", arch, keys)
  if isinstance(expected, str):
    with pytest.raises(UserError, match=expected):
      gguf_file.open_file(path)
    return
  found = describe(gguf_file.open_file(path)).cfg
  np.testing.assert_allclose(positions.rotary_frequencies(found), expected, rtol=1e-6)
  assert positions.attention_factor(found) == pytest.approx(*factor or [1.0])


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
  found = positions.rotary_frequencies(describe(gguf_file.open_file(path)).cfg)
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
