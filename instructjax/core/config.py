"""The whole configuration as frozen dataclasses, with every rule it must obey.

`configs/` holds the values (each with its unit or source); this file holds names, types and `validate()`. `main`
converts the ml_collections config once with `from_config_dict`; below it nobody sees a ConfigDict or a flag.
"""

import dataclasses
import re
from typing import Literal

from instructjax.core.blocks import build, require, require_positive, validate
from instructjax.core.stages import RL_STAGES, TARGETS


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
class ModelConfig:
  """One decoder with switches: GPT-2/GPT-3 and Llama families."""

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
  dtype: Literal["float32", "bfloat16"]  # compute; weights are float32 masters
  layers: Literal["auto", "scan", "unroll"]  # auto: unroll on CPU, scan elsewhere
  attention: Literal["auto", "plain", "splash"]  # auto: splash on TPU, plain elsewhere
  # What a layer keeps for its gradient: everything, what its products with weights yield, or its input only.
  remat: Literal["none", "products", "full"]
  # How sampling splits weights: over tensor only, or (2d) as in training, with activations moved to them. auto: tensor
  # while its copy takes no more than constraints.DECODE_SHARE of a device's memory.
  decode_layout: Literal["auto", "tensor", "2d"]
  weights: str  # '' = train from scratch (the pretrain stage); else what weights.locate takes

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
class OptimConfig:
  """Adam and its learning-rate schedule."""

  learning_rate: float
  schedule: Literal["constant", "cosine", "linear"]
  warmup_steps: int
  warmup_start: float  # fraction of learning_rate at step 0
  end_fraction: float  # fraction of learning_rate at the last step (cosine, linear)
  b1: float
  b2: float
  eps: float
  eps_placement: Literal["pytorch", "tensorflow"]
  weight_decay: float
  clip_norm: float | None

  def validate(self, where: str):
    require(self.learning_rate > 0, f"{where}.learning_rate={self.learning_rate} must be > 0")
    require(
      0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"{where}.b1={self.b1}, b2={self.b2} must be in [0, 1)"
    )
    require(self.eps > 0, f"{where}.eps={self.eps} must be > 0")
    require(self.warmup_steps >= 0, f"{where}.warmup_steps={self.warmup_steps} must be >= 0")
    require(
      0 <= self.warmup_start <= 1, f"{where}.warmup_start={self.warmup_start} must be in [0, 1]"
    )
    require(
      0 <= self.end_fraction <= 1, f"{where}.end_fraction={self.end_fraction} must be in [0, 1]"
    )
    require(self.weight_decay >= 0, f"{where}.weight_decay={self.weight_decay} must be >= 0")
    require(
      self.clip_norm is None or self.clip_norm > 0,
      f"{where}.clip_norm={self.clip_norm} must be None or > 0",
    )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  path: str  # '' = the given weights' own, or one trained on the documents; else what load takes
  vocab_size: int  # pieces to train; must equal the tokenizer's where there is one already


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where records come from: `demo:`, `jsonl:PATH[.gz]` or another source of data/sources.py; '' is none."""

  documents: str
  demonstrations: str
  comparisons: str
  prompts: str
  max_prompt_length: int  # tokens; longer prompts are filtered and counted (App. C: > 1k filtered)
  max_response_length: int  # tokens, EOS included
  validation_fraction: (
    float  # held out by a hash of the prompt or document, for sources without their own split
  )
  on_bad_record: Literal["raise", "skip"]

  def validate(self, where: str):
    require(
      0 < self.validation_fraction < 1,
      f"{where}.validation_fraction={self.validation_fraction} must be in (0, 1)",
    )
    require_positive(self, where, "max_prompt_length", "max_response_length")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 (at most once) takes what is left."""

  slice: int  # TPU slices of the job, between which there is only the data centre's network
  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every_steps: int  # besides epoch ends and the last step
  keep: int  # newest checkpoints kept, besides the best and epoch ends

  def validate(self, where: str):
    require_positive(self, where, "every_steps", "keep")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  every_steps: int
  samples: (
    int  # rows of the sample table shown in the terminal by RL stages, at each log step; 0 = none
  )
  tensorboard: bool

  def validate(self, where: str):
    require_positive(self, where, "every_steps")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  steps: str  # 'A:B' traces steps A to B - 1 of each stage, to look into and for the table at the end; '' = none

  def validate(self, where: str):
    match = re.fullmatch(r"(\d+):(\d+)", self.steps)
    require(
      not self.steps or (match is not None and 2 <= int(match[1]) < int(match[2])),
      f"{where}.steps={self.steps!r} must be '' or 'A:B' with 2 <= A < B, as '3:5' for steps 3 and 4:"
      " a stage's first step compiles",
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  num_steps: int
  batch_size: int  # packed rows
  length: int  # tokens a row
  evaluate_every: int  # steps between held-out losses; the step with the lowest is the base
  optim: OptimConfig

  def validate(self, where: str):
    require_positive(self, where, "num_steps", "batch_size", "length", "evaluate_every")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Also ppo_init (C.3): the same stage with pretrain_mix > 0."""

  num_epochs: int
  batch_size: int  # packed rows
  length: int  # tokens a row
  dropout: float  # residual dropout
  pretrain_mix: float  # share of rows that are pretraining text
  optim: OptimConfig

  def validate(self, where: str):
    require_positive(self, where, "num_epochs", "batch_size", "length")
    require(0 <= self.dropout < 1, f"{where}.dropout={self.dropout} must be in [0, 1)")
    require(
      0 <= self.pretrain_mix < 1, f"{where}.pretrain_mix={self.pretrain_mix} must be in [0, 1)"
    )
    rows = round(self.pretrain_mix * self.batch_size)
    require(
      rows < self.batch_size and (rows > 0) == (self.pretrain_mix > 0),
      f"{where}.pretrain_mix={self.pretrain_mix} must give both kinds of text a row of"
      f" batch_size={self.batch_size}, and it gives {rows} rows to pretraining text",
    )


@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """Collecting comparisons from simulated labelers (only for `data.comparisons='demo:'`)."""

  num_prompts: int  # ranked prompts (draws of training prompts)
  num_heldout_prompts: int  # ranked by held-out labelers, for evaluation only
  min_responses: int  # K is uniform in [min, max]
  max_responses: int
  temperature: float

  def validate(self, where: str):
    require_positive(self, where, "num_prompts", "num_heldout_prompts", "temperature")
    require(
      2 <= self.min_responses <= self.max_responses,
      f"{where}.min_responses={self.min_responses} must be from 2 to max_responses={self.max_responses}",
    )


@dataclasses.dataclass(frozen=True)
class RMConfig:
  start_from: Literal["base", "sft"]  # base: the reward model's own pretrained weights
  num_epochs: int
  batch_size: int  # prompts
  max_responses: int  # C: answers a prompt is padded to; a prompt with more is refused
  row_length: int  # tokens of a row that answers share, here and where they are scored later; 0 = one a row, padded
  ties: Literal["drop", "half"]
  optim: OptimConfig
  cross_validation_folds: int  # over labelers (sec 4.1); 0 = off
  cross_validation_prompts: int  # prompts used by each fold's training

  def validate(self, where: str):
    require_positive(self, where, "num_epochs", "batch_size", "cross_validation_prompts")
    require(self.max_responses >= 2, f"{where}.max_responses={self.max_responses} must be >= 2")
    require(
      self.cross_validation_folds == 0 or self.cross_validation_folds >= 2,
      f"{where}.cross_validation_folds={self.cross_validation_folds} must be 0 or >= 2",
    )


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  num_iterations: int
  batch_size: int  # episodes an iteration
  num_minibatches: int
  num_epochs: int  # inner epochs
  packed_rows: int  # rows, of several episodes each, scored or trained on at a time; 0 = one episode a row, padded
  temperature: float
  behaviour_logprob: Literal["rollout", "rescore"]
  beta: float  # KL coefficient (eq. 2)
  kl_controller: Literal["fixed", "adaptive"]
  kl_target: float  # nats a sample, adaptive only
  kl_horizon: int  # episodes, adaptive only
  gamma: float  # pretraining-loss coefficient (eq. 2); 0 = PPO
  ptx_rows: int  # pretraining rows an episode
  ptx_chunks: int  # parts that a minibatch's pretraining rows are taken in: fewer are faster on a mesh, and larger
  ptx_length: int  # tokens of a pretraining row
  ptx_reduction: Literal[
    "mean", "sum"
  ]  # over tokens of a minibatch's rows, or sum over tokens and mean over rows
  discount: float
  gae_lambda: float
  clip: float
  value_clip: float | None
  whiten_advantages: bool
  whiten_rewards: bool
  missing_eos: Literal["as_is", "fixed", "exclude"]
  missing_eos_score: float  # the score when missing_eos='fixed'
  ema_decay: float  # per iteration; 0 keeps no average
  max_kl: float  # nats a sample: above it the run stops with a message; 0 = no limit
  policy_optim: OptimConfig
  value_optim: OptimConfig

  def validate(self, where: str):
    sizes = (
      "num_iterations",
      "batch_size",
      "num_minibatches",
      "num_epochs",
      "ptx_rows",
      "ptx_chunks",
      "ptx_length",
    )
    require_positive(self, where, *sizes)
    require(self.clip > 0, f"{where}.clip={self.clip} must be > 0")
    require(
      self.value_clip is None or self.value_clip > 0,
      f"{where}.value_clip={self.value_clip} must be None or > 0",
    )
    require(
      self.batch_size % self.num_minibatches == 0,
      f"{where}.batch_size={self.batch_size} must be divisible by num_minibatches={self.num_minibatches}",
    )
    minibatch = self.batch_size // self.num_minibatches
    rows = minibatch * self.ptx_rows
    require(
      rows % self.ptx_chunks == 0,
      f"{where}.ptx_chunks={self.ptx_chunks} must divide the {rows} pretraining rows of a minibatch",
    )
    require(
      self.packed_rows == 0 or (self.packed_rows > 0 and minibatch % self.packed_rows == 0),
      f"{where}.packed_rows={self.packed_rows} must be 0 or divide batch_size / num_minibatches={minibatch}",
    )
    # As lm-human-preferences asserts: the mean of fewer rewards is mostly noise.
    require(
      not self.whiten_rewards or minibatch >= 8,
      f"{where}.whiten_rewards=True must have batch_size / num_minibatches >= 8, got {minibatch}",
    )
    require(self.temperature > 0, f"{where}.temperature={self.temperature} must be > 0")
    require(self.beta >= 0, f"{where}.beta={self.beta} must be >= 0")
    require(self.gamma >= 0, f"{where}.gamma={self.gamma} must be >= 0")
    for name in ("discount", "gae_lambda"):
      value = getattr(self, name)
      require(0 <= value <= 1, f"{where}.{name}={value} must be in [0, 1]")
    require(self.max_kl >= 0, f"{where}.max_kl={self.max_kl} must be >= 0; 0 is no limit")
    require(0 <= self.ema_decay < 1, f"{where}.ema_decay={self.ema_decay} must be in [0, 1)")
    require(
      self.kl_controller == "fixed" or (self.kl_target > 0 and self.kl_horizon > 0),
      f"{where}.kl_target={self.kl_target} and kl_horizon={self.kl_horizon} must be > 0 for the adaptive controller",
    )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How PPO's responses are decoded; the tokens do not depend on it."""

  slots: int  # rows decoded at once, over all data shards; 0 = all of ppo.batch_size

  def validate(self, where: str):
    require(self.slots >= 0, f"{where}.slots={self.slots} must be >= 0; 0 is the whole batch")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  num_prompts: int  # test prompts
  samples_per_prompt: int
  temperature: float
  weights: Literal["ema", "raw"]  # which RL weights are judged
  compare: tuple[str, ...]  # RL stages run for comparison besides the one asked for
  overoptimization: bool  # also run PPO with beta=0 and best-of-n, for the over-optimisation plot
  overoptimization_iterations: int
  best_of_n: int  # N samples a prompt for best-of-n; below 2 = off
  best_of_n_prompts: int
  bootstrap: int  # resamples over prompts for the 95% intervals
  pretrain_batches: int  # validation rows for the pretraining loss, in batches
  pretrain_every: int  # RL iterations between two measurements of it

  def validate(self, where: str):
    sizes = (
      "num_prompts",
      "samples_per_prompt",
      "overoptimization_iterations",
      "bootstrap",
      "pretrain_batches",
      "pretrain_every",
      "best_of_n_prompts",
      "temperature",
    )
    require_positive(self, where, *sizes)
    known = [name for name in RL_STAGES if name in TARGETS]
    require(
      set(self.compare) <= set(known),
      f"{where}.compare={self.compare} must hold only {' and '.join(map(repr, known))}",
    )


@dataclasses.dataclass(frozen=True)
class Config:
  stage: str
  preset: str
  seed: int
  model: ModelConfig
  reward_model: (
    ModelConfig  # also the value network, and the larger base that evaluate compares with
  )
  tokenizer: TokenizerConfig
  data: DataConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig
  log: LogConfig
  profile: ProfileConfig
  pretrain: PretrainConfig
  reward_pretrain: PretrainConfig  # the reward model's base
  sft: SFTConfig
  ppo_init: SFTConfig
  collect: CollectConfig
  rm: RMConfig
  ppo: PPOConfig
  rollout: RolloutConfig
  evaluate: EvaluateConfig

  @property
  def same_network(self) -> bool:
    """Whether policy and reward model differ in their head only."""
    free = dict(weights="", layers="auto", attention="auto", remat="none", decode_layout="auto")
    bare = [dataclasses.replace(cfg, **free) for cfg in (self.model, self.reward_model)]
    return bare[0] == bare[1]

  def validate(self, where: str = "config"):
    require(0 <= self.seed < 2**63, f"{where}.seed={self.seed} must be >= 0 and below 2**63")
    require(
      self.stage in TARGETS, f"{where}.stage={self.stage!r} must be one of {', '.join(TARGETS)}"
    )
    total = self.data.max_prompt_length + self.data.max_response_length
    for name in ("model", "reward_model"):
      limit = getattr(self, name).max_length
      require(
        total <= limit,
        f"data.max_prompt_length + max_response_length = {total} must not exceed {where}.{name}.max_length={limit}",
      )
    require(
      self.rm.start_from == "base" or self.same_network,
      f"{where}.rm.start_from='sft' must have reward_model equal to model, and they differ; use 'base'",
    )
    require(
      self.rm.start_from == "base" or self.reward_model.weights in ("", self.model.weights),
      f"{where}.rm.start_from='sft' must come without {where}.reward_model.weights="
      f"{self.reward_model.weights!r}, from which nothing would start; use 'base'",
    )
    require(
      self.data.comparisons != "demo:" or self.collect.max_responses <= self.rm.max_responses,
      f"{where}.collect.max_responses={self.collect.max_responses} must not exceed"
      f" rm.max_responses={self.rm.max_responses}",
    )
    require(
      self.rm.row_length == 0 or self.rm.row_length >= total,
      f"{where}.rm.row_length={self.rm.row_length} must be 0 or at least data.max_prompt_length"
      f" + max_response_length = {total}: an answer fits in one row",
    )
    require(
      self.rollout.slots <= self.ppo.batch_size,
      f"{where}.rollout.slots={self.rollout.slots} must not exceed ppo.batch_size={self.ppo.batch_size}",
    )
    for name in ("sft", "ppo_init"):
      length = getattr(self, name).length
      require(
        total <= length,
        f"data.max_prompt_length + max_response_length = {total} must not exceed {where}.{name}.length={length}:"
        " a demonstration fits in one row",
      )
    rows = (
      ("pretrain.length", "model"),
      ("reward_pretrain.length", "reward_model"),
      ("ppo.ptx_length", "model"),
    )
    for name, model in rows:
      block, field = name.split(".")
      length, limit = getattr(getattr(self, block), field), getattr(self, model).max_length
      require(
        length <= limit,
        f"{where}.{name}={length} must not exceed {where}.{model}.max_length={limit}",
      )


def from_config_dict(config) -> Config:
  """Frozen, validated Config from an ml_collections ConfigDict (or plain nested dict).

  A reward model of the policy's network starts from the policy's weights unless it names its own.

  Raises:
    UserError: a field is unknown (with the nearest known one), missing, of the wrong type, or breaks a rule.
  """
  plain = config.to_dict() if hasattr(config, "to_dict") else config
  result = build(Config, plain, "config")
  validate(result, "config")
  if result.same_network and not result.reward_model.weights:
    reward_model = dataclasses.replace(result.reward_model, weights=result.model.weights)
    result = dataclasses.replace(result, reward_model=reward_model)
  return result


def model_config(values: dict, where: str) -> ModelConfig:
  """Validated ModelConfig from a plain dict, as a finished stage keeps it.

  Raises:
    UserError: as from_config_dict.
  """
  result = build(ModelConfig, values, where)
  validate(result, where)
  return result
