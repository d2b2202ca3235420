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

  kind: Literal["none", "linear", "llama3"]
  factor: float  # by which slow rotations are slowed down further (linear: all of them)
  low_freq_factor: float  # llama3: fewer turns than this in original_length are slow
  high_freq_factor: float  # llama3: more turns than this are left alone; interpolated between
  original_length: int  # llama3: context before stretching, tokens

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

  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_mlp: int
  max_length: int  # context, tokens
  position: Literal["learned", "rope"]
  rope_base: float
  rope_scaling: RopeScalingConfig
  norm: Literal["layernorm", "rmsnorm"]
  norm_eps: float
  mlp: Literal["gelu", "swiglu"]
  use_bias: bool  # biases on every projection
  qkv_bias: bool  # biases on q, k, v only (Qwen2); implied by use_bias
  attention_window: (
    int  # 0: all layers dense; else every second layer is banded, this many tokens wide (GPT-3)
  )
  tie_embeddings: bool
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

  # '' = train from scratch (the pretrain stage); else what weights.locate takes
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

  # Compute; weights are float32 masters.
  dtype: Literal["float32", "bfloat16"] = dataclasses.field(metadata=ROUNDING)
  # auto: unroll on CPU, where a scan would copy each layer's weights first; scan elsewhere.
  layers: Literal["auto", "scan", "unroll"] = dataclasses.field(metadata=ROUNDING)
  # auto: splash on TPU; plain elsewhere, where the kernel would be interpreted.
  attention: Literal["auto", "plain", "splash"] = dataclasses.field(metadata=ROUNDING)
  # What a layer keeps for its gradient: everything, what its products with weights yield, or its input only.
  remat: Literal["none", "products", "full"] = dataclasses.field(metadata=ROUNDING)
  # How sampling splits weights: over tensor only, or (2d) as in training, with activations moved to them. auto: tensor
  # while its copy takes no more than constraints.DECODE_SHARE of a device's memory.
  decode_layout: Literal["auto", "tensor", "2d"] = dataclasses.field(metadata=ROUNDING)
