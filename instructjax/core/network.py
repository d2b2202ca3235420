"""Config blocks for the architecture of a network (NetworkConfig) and for how it is computed (ExecutionConfig).

The two are separate because only the architecture identifies a network. Checkpoints, exports and comparisons refer to a
NetworkConfig. An ExecutionConfig changes results by rounding error only, and may differ from one run to the next.

`config.py` has the other blocks. `--settings` and docs/settings.md print the comments beside the fields.
"""

import dataclasses
import re
from typing import Literal

from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, WEIGHTS, require, require_positive


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
  """How rotary positions are stretched beyond the context length that a model was first trained with."""

  # none keeps the rotations as trained; linear divides all rotation speeds by factor; llama3 and yarn divide only the
  # slow ones
  kind: Literal["none", "linear", "llama3", "yarn"]
  factor: float  # what the rotation speeds are divided by
  # llama3, yarn: rotations with fewer turns than this within original_length count as slow and are scaled by factor;
  # yarn's beta_slow
  low_freq_factor: float
  # llama3, yarn: rotations with more turns than this are not scaled, and those in between are interpolated; yarn's
  # beta_fast
  high_freq_factor: float
  # llama3, yarn: context length that the model was first trained with [tokens]
  original_length: int
  # yarn: what cosine and sine are multiplied by, so that attention is sharper; 0 is the paper's 0.1 ln(factor) + 1
  attention_factor: float

  def validate(self, where: str):
    require(self.factor >= 1, f"{where}.factor={self.factor} must be >= 1")
    require(
      0 < self.low_freq_factor < self.high_freq_factor,
      f"{where}.low_freq_factor={self.low_freq_factor} must be > 0 and below"
      f" high_freq_factor={self.high_freq_factor}",
    )
    require_positive(self, where, "original_length")
    require(
      self.attention_factor >= 0,
      f"{where}.attention_factor={self.attention_factor} must be >= 0; 0 is 0.1 ln(factor) + 1",
    )


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """The architecture: a decoder whose switches cover the families of docs/generate-and-export.md, GPT-2 to Gemma 3."""

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
  # rotary embeddings: base in the L layers of layer_pattern, unscaled (Gemma 3); 0 for that of the other layers
  rope_local_base: float
  # rotary embeddings: how many dimensions of a head turn, the first ones (GPT-NeoX, Pythia); 0 for all
  rotary_dim: int
  rope_scaling: RopeScalingConfig
  # layernorm (GPT) or rmsnorm (Llama), applied before attention, before the MLP and after the last layer; rmsnorm_1p is
  # rmsnorm with weights of 1 + w (Gemma)
  norm: Literal["layernorm", "rmsnorm", "rmsnorm_1p"]
  norm_eps: float  # added to the variance before the norm divides by its square root
  sandwich_norm: bool  # whether the outputs of attention and MLP are normalised too, before they are added (Gemma)
  qk_norm: bool  # whether each head's query and key are normalised, by rmsnorm, before they turn (Qwen3, Gemma 3)
  # gelu (GPT-2, its tanh approximation) and gelu_exact (GPT-NeoX) have two matrices; swiglu (Llama) and geglu (Gemma)
  # have three, one of them a gate
  mlp: Literal["gelu", "gelu_exact", "swiglu", "geglu"]
  # whether attention and MLP read the same residual stream and are added together (GPT-NeoX), instead of in turn
  parallel_residual: bool
  use_bias: bool  # whether every projection has a bias
  qkv_bias: bool  # whether the projections to q, k and v have a bias (Qwen2); implied by use_bias
  # how many tokens back the L layers of layer_pattern attend; 0 is the whole context [tokens]
  attention_window: int
  # the kinds of layers, a letter each, repeated to the last layer: G attends to the whole context, L (local) to
  # attention_window, N to the whole context without positions. GL is GPT-3's, GGGN SmolLM3's, LLLLLG Gemma 3's
  layer_pattern: str
  # attention scores are divided by the square root of this (Gemma); 0 for head_dim
  query_pre_attn_scalar: int
  scale_embeddings: (
    bool  # whether token embeddings are multiplied by the square root of d_model (Gemma)
  )
  tie_embeddings: bool  # whether the output projection shares its weights with the embedding table
  # standard deviation of the initial weights; projections into the residual stream start with a smaller one
  init_std: float

  @property
  def is_gated(self) -> bool:
    """Whether the MLP has three matrices, one of them a gate."""
    return self.mlp in ("swiglu", "geglu")

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
      self.rope_scaling.kind != "yarn" or self.rope_base > 1,
      f"{where}.rope_base={self.rope_base} must be above 1 for rope_scaling.kind='yarn'",
    )
    for name in ("attention_window", "rope_local_base", "query_pre_attn_scalar"):
      value = getattr(self, name)
      require(value >= 0, f"{where}.{name}={value} must be >= 0")
    require(
      re.fullmatch("[GLN]+", self.layer_pattern) is not None,
      f"{where}.layer_pattern={self.layer_pattern!r} must be letters G, L or N",
    )
    require(
      not self.qk_norm or self.norm != "layernorm",
      f"{where}.qk_norm=True must come with norm='rmsnorm' or 'rmsnorm_1p', got {self.norm!r}",
    )
    require(
      not (self.parallel_residual and self.sandwich_norm),
      f"{where}.parallel_residual=True and sandwich_norm=True exclude each other",
    )
    self._validate_positions(where)

  def _validate_positions(self, where: str):
    if self.position == "rope":
      require(
        self.head_dim % 2 == 0,
        f"{where}.head_dim={self.head_dim} must be even for rotary positions",
      )
      require(
        0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
        f"{where}.rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}",
      )
      return
    for name in ("rotary_dim", "rope_local_base"):
      value = getattr(self, name)
      require(value == 0, f"{where}.{name}={value} must be 0 for learned positions")
    require(
      self.rope_scaling.kind == "none",
      f"{where}.rope_scaling.kind={self.rope_scaling.kind!r} must be 'none' for learned positions",
    )
    require(
      "N" not in self.layer_pattern,
      f"{where}.layer_pattern={self.layer_pattern!r} must have no N for learned positions",
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

  # weights to start from: a stage's folder, a Hugging Face folder, FILE.gguf, hf://ORG/NAME or package:PACKAGE/FILE;
  # '' trains from scratch
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
  # attention kernel: splash is a fused kernel for TPUs, cudnn one for NVIDIA GPUs; auto uses splash on TPUs, and plain
  # elsewhere
  attention: Literal["auto", "plain", "splash", "cudnn"] = dataclasses.field(metadata=ROUNDING)
  # what each layer stores for the backward pass: everything (none), its products with weights (products), or only its
  # input (full); storing less saves memory and costs time
  remat: Literal["none", "products", "full"] = dataclasses.field(metadata=ROUNDING)
  # how sampling splits the weights: tensor splits them over the tensor axis only; 2d keeps the layout of training and
  # moves activations instead; auto takes tensor while that copy is a small part of a device's memory
  # (constraints.DECODE_SHARE)
  decode_layout: Literal["auto", "tensor", "2d"] = dataclasses.field(metadata=ROUNDING)
