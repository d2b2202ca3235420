"""Config blocks for the architecture of a network (NetworkConfig) and for how it is computed (ExecutionConfig).

The two are separate because only the architecture identifies a network. Checkpoints, exports and comparisons refer to a
NetworkConfig. An ExecutionConfig changes results by rounding error only, and may differ from one run to the next.

`config.py` has the other blocks. `--settings` and docs/settings.md print the comments beside the fields.
"""

import dataclasses
from typing import Literal

from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, WEIGHTS, require, require_positive


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
  """How rotary positions are stretched beyond the context length that a model was first trained with."""

  # none keeps the rotations as trained; linear divides all rotation speeds by factor; llama3 divides only the slow ones
  kind: Literal["none", "linear", "llama3"]
  factor: float  # what the rotation speeds are divided by
  # llama3: rotations with fewer turns than this within original_length count as slow and are scaled by factor
  low_freq_factor: float
  # llama3: rotations with more turns than this are not scaled; those in between are interpolated
  high_freq_factor: float
  original_length: int  # llama3: context length that the model was first trained with [tokens]

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
  """The architecture: a decoder whose switches cover the GPT-2/GPT-3 and Llama families."""

  num_layers: int  # transformer layers, each with attention and an MLP
  d_model: int  # width of the residual stream
  num_heads: int  # attention heads of the queries
  # attention heads of the keys and values; fewer than num_heads is grouped-query attention
  num_kv_heads: int
  head_dim: int  # width of one attention head
  d_mlp: int  # hidden width of the MLP
  max_length: int  # longest context, prompt and response together [tokens]
  # learned is a table of position embeddings (GPT); rope is rotary embeddings (Llama)
  position: Literal["learned", "rope"]
  rope_base: float  # rotary embeddings: base of the geometric series of wavelengths
  rope_scaling: RopeScalingConfig
  # layernorm (GPT) or rmsnorm (Llama), applied before attention, before the MLP and after the last layer
  norm: Literal["layernorm", "rmsnorm"]
  norm_eps: float  # added to the variance before the norm divides by its square root
  # gelu has two matrices (GPT); swiglu has three, one of them a gate (Llama)
  mlp: Literal["gelu", "swiglu"]
  use_bias: bool  # whether every projection has a bias
  qkv_bias: bool  # whether the projections to q, k and v have a bias (Qwen2); implied by use_bias
  # how many tokens back every second layer attends (GPT-3's alternating pattern); 0 is the whole context in all layers
  # [tokens]
  attention_window: int
  tie_embeddings: bool  # whether the output projection shares its weights with the embedding table
  # standard deviation of the initial weights; projections into the residual stream start with a smaller one
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
      "rope_base",
      "norm_eps",
    )
    require_positive(self, where, *sizes)
    require(self.init_std >= 0, f"{where}.init_std={self.init_std} must be >= 0")
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

  @property
  def fused_qkv(self) -> bool:
    """Whether the files of such networks hold q, k and v as one matrix, as those of GPT-2 do; Llama's hold three."""
    return self.norm == "layernorm"


@dataclasses.dataclass(frozen=True)
class ModelConfig(NetworkConfig):
  """A network, and where its weights come from.

  It extends NetworkConfig instead of holding one, to keep setting names short: `config.model.d_model` rather than
  `config.model.network.d_model`. Code that compares or describes networks uses `network`, which leaves out the path of
  the weights.
  """

  # weights to start from: a stage's folder, a Hugging Face folder, FILE.gguf or hf://ORG/NAME; '' trains from scratch
  weights: str = dataclasses.field(metadata={**SAME_NUMBERS, **WEIGHTS})

  @property
  def network(self) -> NetworkConfig:
    """The architecture alone."""
    names = [field.name for field in dataclasses.fields(NetworkConfig)]
    return NetworkConfig(**{name: getattr(self, name) for name in names})


MATRICES = ("q", "k", "v", "out", "gate", "up", "down")  # of a layer, that can be adapted


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Low-rank adapters (LoRA): what is trained, in every stage after pretraining, in place of all weights."""

  # rank of the update of each adapted matrix; 0 trains all weights, and nothing else of this block is then used
  rank: int
  alpha: float  # the update is multiplied by alpha / rank
  # adapted matrices: q, k, v and out of attention; gate, up and down of the MLP (gate only where it has one)
  targets: tuple[str, ...]
  # what the learning rates of the stages that train adapters are multiplied by
  rate_factor: float
  # probability of dropping an element of what A is multiplied with, in supervised and reward-model training; RL has no
  # dropout, because its ratios compare one network with itself
  dropout: float
  # numbers of the frozen base: float is the format of the computation; int8 holds the layers' matrices as whole numbers
  # with a scale for each output, and the rest as float
  base: Literal["float", "int8"]

  def validate(self, where: str):
    require(self.rank >= 0, f"{where}.rank={self.rank} must be >= 0")
    require_positive(self, where, "alpha", "rate_factor")
    require(0 <= self.dropout < 1, f"{where}.dropout={self.dropout} must be in [0, 1)")
    unknown = [name for name in self.targets if name not in MATRICES]
    require(
      bool(self.targets) and not unknown and len(set(self.targets)) == len(self.targets),
      f"{where}.targets={self.targets} must hold some of {', '.join(MATRICES)}, each once",
    )


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """How the networks of a run are computed.

  models/execution.py replaces `auto` once, depending on the mesh's devices, before a Model is made.
  """

  # number format of the computation; trained weights are always kept in float32
  dtype: Literal["float32", "bfloat16"] = dataclasses.field(metadata=ROUNDING)
  # scan runs the layers in one loop; unroll compiles each layer separately; auto unrolls on CPUs only
  layers: Literal["auto", "scan", "unroll"] = dataclasses.field(metadata=ROUNDING)
  # attention kernel: splash is a fused kernel for TPUs; auto uses it on TPUs, and plain elsewhere
  attention: Literal["auto", "plain", "splash"] = dataclasses.field(metadata=ROUNDING)
  # what each layer stores for the backward pass: everything (none), its products with weights (products), or only its
  # input (full); storing less saves memory and costs time
  remat: Literal["none", "products", "full"] = dataclasses.field(metadata=ROUNDING)
  # how sampling splits the weights: tensor splits them over the tensor axis only; 2d keeps the layout of training and
  # moves activations instead; auto takes tensor while that copy is a small part of a device's memory
  # (constraints.DECODE_SHARE)
  decode_layout: Literal["auto", "tensor", "2d"] = dataclasses.field(metadata=ROUNDING)
