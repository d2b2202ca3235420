"""What a network is, and how it is run: two configs, of which only the first makes two networks differ.

Part of `config.py`, which has the other blocks. What a checkpoint belongs to, what is exported and what is compared are
a NetworkConfig; an ExecutionConfig moves numbers by rounding only, and may change from one run to the next.
"""

import dataclasses
from typing import Literal

from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, require, require_positive


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
  """How rotary positions are stretched past the length a model was first trained at."""

  # none leaves positions as trained; linear slows all rotations by factor; llama3 slows only the slow ones
  kind: Literal["none", "linear", "llama3"]
  factor: float  # by how much rotations are slowed down
  # llama3: a rotation with fewer turns than this in original_length is slow and is scaled
  low_freq_factor: float
  # llama3: a rotation with more turns than this is left alone; in between it is interpolated
  high_freq_factor: float
  original_length: int  # llama3: context that the model was first trained at [tokens]

  def validate(self, where: str):
    require(self.factor >= 1, f"{where}.factor={self.factor} must be >= 1")
    require(
      0 < self.low_freq_factor < self.high_freq_factor,
      f"{where}.low_freq_factor={self.low_freq_factor} must be > 0 and below"
      f" high_freq_factor={self.high_freq_factor}",
    )
    require_positive(self, where, "original_length")


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """What a network is: one decoder with switches, GPT-2/GPT-3 and Llama families."""

  num_layers: int  # transformer layers, each attention and an MLP
  d_model: int  # width of the residual stream
  num_heads: int  # attention heads of queries
  # attention heads of keys and values; fewer than num_heads is grouped-query attention
  num_kv_heads: int
  head_dim: int  # width of one attention head
  d_mlp: int  # hidden width of the MLP
  max_length: int  # longest context, prompt and response together [tokens]
  # a learned table of positions (GPT), or rotary embeddings (Llama)
  position: Literal["learned", "rope"]
  rope_base: float  # rotary embeddings: base of the geometric series of wavelengths
  rope_scaling: RopeScalingConfig
  # layernorm (GPT) or rmsnorm (Llama), before attention, before the MLP and at the end
  norm: Literal["layernorm", "rmsnorm"]
  norm_eps: float  # added to the variance before the norm divides by its root
  mlp: Literal["gelu", "swiglu"]  # gelu has two matrices (GPT), swiglu three and a gate (Llama)
  use_bias: bool  # whether every projection has a bias
  qkv_bias: bool  # whether the projections to q, k and v have a bias (Qwen2); use_bias implies it
  # 0: every layer sees the whole context; else every second layer sees this many tokens back (GPT-3) [tokens]
  attention_window: int
  tie_embeddings: bool  # whether the output projection is the embedding table
  # standard deviation of the initial weights; projections into the residual stream have a smaller one
  init_std: float

  def validate(self, where: str):
    sizes = (
      "num_layers",
      "d_model",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "d_mlp",
      "max_length",
    )
    require_positive(self, where, *sizes)
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"{where}.num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}",
    )
    require(
      self.position != "rope" or self.head_dim % 2 == 0,
      f"{where}.head_dim={self.head_dim} must be even for rotary positions",
    )
    require(
      self.position == "rope" or self.rope_scaling.kind == "none",
      f"{where}.rope_scaling.kind={self.rope_scaling.kind!r} must be 'none' for learned positions",
    )
    require(
      self.attention_window >= 0, f"{where}.attention_window={self.attention_window} must be >= 0"
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig(NetworkConfig):
  """A network, and where its weights come from.

  It extends NetworkConfig instead of holding one, so that the network's settings are `config.model.d_model` and so on.
  Whoever compares or describes networks takes `network`, which the path of weights is no part of.
  """

  # where to start from: a stage's folder, a Hugging Face folder, FILE.gguf or hf://ORG/NAME; '' trains from scratch
  weights: str = dataclasses.field(metadata=SAME_NUMBERS)

  @property
  def network(self) -> NetworkConfig:
    names = [field.name for field in dataclasses.fields(NetworkConfig)]
    return NetworkConfig(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """How the networks of a run are computed.

  `auto` is chosen once for the devices of a mesh (models/execution.py); a Model has no `auto` left.
  """

  # of the computation; the weights that are trained are kept in float32
  dtype: Literal["float32", "bfloat16"] = dataclasses.field(metadata=ROUNDING)
  # how the layers are run: one loop over them, or written out one by one; auto writes them out on CPUs
  layers: Literal["auto", "scan", "unroll"] = dataclasses.field(metadata=ROUNDING)
  # the attention kernel: splash is a TPU's fused one; auto takes it on TPUs
  attention: Literal["auto", "plain", "splash"] = dataclasses.field(metadata=ROUNDING)
  # what a layer keeps for its gradient: everything (none), its products with weights, or only its input (full); the
  # less is kept, the less memory and the more time it takes
  remat: Literal["none", "products", "full"] = dataclasses.field(metadata=ROUNDING)
  # how sampling splits weights: over the tensor axis only, or (2d) as in training, and moves activations to them;
  # auto takes tensor while that copy is a small part of a device's memory (constraints.DECODE_SHARE)
  decode_layout: Literal["auto", "tensor", "2d"] = dataclasses.field(metadata=ROUNDING)
