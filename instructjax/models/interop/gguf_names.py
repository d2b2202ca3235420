"""How llama.cpp keeps the weights of an architecture, seen from Hugging Face's side.

Used by gguf_file.py (reading) and gguf_export.py (writing). Imports config only.

What llama.cpp does otherwise:
  - rows of q and k of architecture `llama` are interleaved rotary pairs: i is followed by i + K / 2.
    qwen2 and gpt2 are stored as they are;
  - gpt2's matrices are [out, in], where Hugging Face's Conv1D has [in, out];
  - Llama 3's rotary scaling is stored as its result, a divisor for each frequency.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from instructjax.core.config import RopeScalingConfig

ROPE_FREQS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
  """GGUF's names of tensors to Hugging Face's, both without `.weight` and `.bias`."""

  layers: str  # Hugging Face's list of layers
  outer: Mapping[str, str]
  layer: Mapping[str, str]  # inside blk.N. and the list of layers
  permuted: frozenset[str] = frozenset()  # rotary rows to put back in order
  transposed: frozenset[str] = frozenset()

  def hf_name(self, name: str) -> str | None:
    """None for a tensor that the architecture does not have."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
      return None
    if stem in self.outer:
      return f"{self.outer[stem]}.{suffix}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if not stem.startswith("blk.") or not block.isdecimal() or part not in self.layer:
      return None
    return f"{self.layers}.{block}.{self.layer[part]}.{suffix}"

  def gguf_names(self, hf_names: Sequence[str]) -> list[str]:
    """The inverse of hf_name, of all tensors of one network.

    Raises:
      ValueError: a tensor has no name here, or a name here is that of no tensor.
    """
    outer = {theirs: ours for ours, theirs in self.outer.items()}
    layer = {theirs: ours for ours, theirs in self.layer.items()}
    result = []
    for hf_name in hf_names:
      stem, _, suffix = hf_name.rpartition(".")
      block, _, part = stem.removeprefix(self.layers + ".").partition(".")
      name = f"blk.{block}.{layer[part]}" if part in layer else outer.get(stem)
      if name is None or self.hf_name(f"{name}.{suffix}") != hf_name:
        raise ValueError(f"gguf_names: tensor {hf_name} has no name of GGUF's; add it to the table")
      result.append(f"{name}.{suffix}")
    used = {part_of(name) for name in result} | {"output"}  # absent where embeddings are tied
    for name in (*self.outer, *self.layer):
      if name not in used:
        raise ValueError(f"gguf_names: {name} is the name of no tensor of this network")
    return result

  def is_permuted(self, name: str) -> bool:
    return part_of(name) in self.permuted

  def is_transposed(self, name: str) -> bool:
    return part_of(name) in self.transposed  # biases too: they stay the same


def part_of(name: str) -> str:
  """`blk.7.attn_q.weight` -> `attn_q`."""
  return name.split(".")[-2]


_QWEN2 = Architecture(
  layers="model.layers",
  outer={
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
  },
  layer={
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
  },
)
_GPT2 = Architecture(
  layers="transformer.h",
  outer={
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
  },
  layer={
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
  },
  transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
)
ARCHITECTURES = {
  "llama": dataclasses.replace(_QWEN2, permuted=frozenset({"attn_q", "attn_k"})),
  "qwen2": _QWEN2,
  "gpt2": _GPT2,
}


def split_halves(value: np.ndarray, head_dim: int, rank: int) -> np.ndarray:
  """Rows (or elements of a bias) of each head: 0, K/2, 1, K/2 + 1 ... back to 0, 1, 2 ..."""
  width = value.shape[-1] if rank == 2 else 1
  return value.reshape(-1, head_dim // 2, 2, width).swapaxes(1, 2).reshape(value.shape)


def interleave_halves(value: np.ndarray, head_dim: int) -> np.ndarray:
  """The inverse of split_halves, as llama.cpp's converter does it."""
  width = value.shape[-1] if value.ndim == 2 else 1
  return value.reshape(-1, 2, head_dim // 2, width).swapaxes(1, 2).reshape(value.shape)


def llama3_factors(scaling: RopeScalingConfig, base: float, head_dim: int) -> np.ndarray:
  """What each rotary frequency is divided by: 1 for fast ones, the factor for slow ones."""
  wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
  turns = scaling.original_length / wavelength
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)
