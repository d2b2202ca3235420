"""How llama.cpp names and stores the weights of an architecture, compared with Hugging Face.

Used by gguf_file.py (reading) and gguf_export.py (writing). Imports config only.

The differences:
  - Names of tensors.
  - Rotary pairs of architecture `llama`. Hugging Face turns dimension i of a head together with i + K / 2, llama.cpp
    turns neighbours. So llama.cpp's rows of the query and key projections are interleaved: row i is followed by row
    i + K / 2. The same for smollm3. The other architectures turn halves in both, and gpt2 has no rotary positions:
    their rows stay in order.
  - gpt2's matrices are [out, in]; Hugging Face's Conv1D has [in, out].
  - gptneox's fused projection has all queries first, then all keys, then all values. Hugging Face's has the query, key
    and value of one head, then those of the next.
  - gemma3's norms are stored as what they multiply by, 1 + w. Hugging Face stores w.
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
  """The tensors of one architecture: GGUF's name -> Hugging Face's, both without `.weight` and `.bias`."""

  layers: str  # Hugging Face's path of the list of layers
  outer: Mapping[str, str]  # tensors outside of the layers
  layer: Mapping[str, str]  # tensors of a layer, without `blk.N.` and without Hugging Face's list
  # Both by GGUF's names: tensors whose rows are interleaved, and matrices that Hugging Face stores as [in, out].
  permuted: frozenset[str] = frozenset()
  transposed: frozenset[str] = frozenset()
  fused: frozenset[str] = (
    frozenset()
  )  # all queries, all keys, all values, where Hugging Face has a head at a time
  shifted: frozenset[str] = frozenset()  # norms stored as 1 + w

  def hf_name(self, name: str) -> str | None:
    """Hugging Face's name of a tensor; None if the architecture does not have it."""
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
    """GGUF's names of all tensors of one network: the inverse of `hf_name`.

    Raises:
      ValueError: a tensor has no name in this table, or a name in this table belongs to no tensor. Either way the table
        does not describe this network, and the file would lack something.
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
    used = {part_of(name) for name in result} | {"output"}  # a tied network has no output tensor
    for name in (*self.outer, *self.layer):
      if name not in used:
        raise ValueError(f"gguf_names: {name} is the name of no tensor of this network")
    return result

  def is_permuted(self, name: str) -> bool:
    return part_of(name) in self.permuted

  def is_transposed(self, name: str) -> bool:
    return part_of(name) in self.transposed  # biases included: they stay as they are

  def is_fused(self, name: str) -> bool:
    return part_of(name) in self.fused

  def is_shifted(self, name: str) -> bool:
    return part_of(name) in self.shifted


def part_of(name: str) -> str:
  """The part of a GGUF name that says what a tensor is: `blk.7.attn_q.weight` -> `attn_q`."""
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
_GPTNEOX = Architecture(
  layers="gpt_neox.layers",
  outer={
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
  },
  layer={
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
  },
  fused=frozenset({"attn_qkv"}),
)
_LLAMA = dataclasses.replace(_QWEN2, permuted=frozenset({"attn_q", "attn_k"}))
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3_NORMS = {
  "attn_norm": "input_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES = {
  "llama": _LLAMA,
  "qwen2": _QWEN2,
  "gpt2": _GPT2,
  "qwen3": dataclasses.replace(_QWEN2, layer={**_QWEN2.layer, **_HEAD_NORMS}),
  "gptneox": _GPTNEOX,
  "smollm3": _LLAMA,
  "gemma3": dataclasses.replace(
    _QWEN2,
    layer={**_QWEN2.layer, **_HEAD_NORMS, **_GEMMA3_NORMS},
    shifted=frozenset({"output_norm", *_HEAD_NORMS, *_GEMMA3_NORMS}),
  ),
}
# Hugging Face's model_type, where it is another name.
OF_FAMILY = {"gpt_neox": "gptneox", "gemma3_text": "gemma3"}
# Architectures whose tied head must stand in the file a second time for some versions of llama.cpp.
WITH_COPY = ("gpt2", "gptneox")
# What llama.cpp has built in for an architecture and no key tells (or only newer versions read it).
SMOLLM3_PATTERN = "GGGN"
GEMMA3_PATTERN = "LLLLLG"
GEMMA3_LOCAL_BASE = 10_000.0


def gemma3_scalar(num_layers: int, d_model: int, num_heads: int, head_dim: int) -> int:
  """What llama.cpp divides Gemma 3's scores by the square root of: it knows the largest model by its 62 layers."""
  return d_model // num_heads if num_layers == 62 else head_dim


def split_halves(value: np.ndarray, head_dim: int, rank: int) -> np.ndarray:
  """Puts the rows of each head from llama.cpp's order 0, K/2, 1, K/2 + 1 ... back into the order 0, 1, 2 ...

  Args:
    value: matrix of whole heads, or their bias with an element a row.
    head_dim: K.
    rank: 2 for a matrix, 1 for a bias (which may come as a matrix of one row).
  """
  # [heads, K/2, 2]: the second index says which half of the head a row belongs to. Swapped, the halves come first.
  width = value.shape[-1] if rank == 2 else 1
  return value.reshape(-1, head_dim // 2, 2, width).swapaxes(1, 2).reshape(value.shape)


def interleave_halves(value: np.ndarray, head_dim: int) -> np.ndarray:
  """The inverse of `split_halves`: the permutation of llama.cpp's converter."""
  width = value.shape[-1] if value.ndim == 2 else 1
  return value.reshape(-1, 2, head_dim // 2, width).swapaxes(1, 2).reshape(value.shape)


def split_fused(value: np.ndarray, num_heads: int) -> np.ndarray:
  """From all queries, all keys, all values (gptneox) to the query, key and value of one head after another.

  Args:
    value: matrix of rows of heads, or their bias with an element a row.
    num_heads: heads of the queries, and as many of keys and of values.
  """
  return value.reshape(3, num_heads, -1).swapaxes(0, 1).reshape(value.shape)


def fuse(value: np.ndarray, num_heads: int) -> np.ndarray:
  """The inverse of `split_fused`: the order that llama.cpp's converter writes."""
  return value.reshape(num_heads, 3, -1).swapaxes(0, 1).reshape(value.shape)


def llama3_factors(scaling: RopeScalingConfig, base: float, head_dim: int) -> np.ndarray:
  """Divisor of each rotary frequency, float32 [K / 2]: 1 for fast frequencies, the factor for slow ones.

  The rule is that of `positions.rotary_frequencies`, computed in float64.
  """
  wavelength = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
  turns = scaling.original_length / wavelength
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def decimal(value: float) -> float:
  """The shortest decimal that rounds to this float32: 1e-05, not 9.999999747378752e-06.

  GGUF stores float32, and the decimal is what the original config.json most likely said.
  """
  # What a float32 cannot hold becomes infinite, which the config's reader refuses.
  with np.errstate(over="ignore"):
    return float(str(np.float32(value)))
