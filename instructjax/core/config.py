"""The whole configuration as frozen dataclasses, with the rules that its values must follow.

`configs/` holds the values and their sources; the files of this folder hold the names, types and rules. `main` converts
the ml_collections config once, with `from_config_dict`; code below `main` sees neither a ConfigDict nor a flag.

A run that continues from a checkpoint must have the settings that the checkpoint was made with. The exceptions are the
fields marked ROUNDING or SAME_NUMBERS (see blocks.py); these marks are the only list of exceptions.

The comments beside fields are also data: `--settings` and docs/settings.md print them. A comment ends in the unit, in
square brackets, where the field has one.
"""

import dataclasses
from typing import Any, Literal

from instructjax.core import places
from instructjax.core.blocks import (
  FILE,
  SAME_NUMBERS,
  SOURCE,
  WIDE,
  build,
  require,
  require_positive,
  validate,
)
from instructjax.core.network import (
  AdapterConfig,
  ExecutionConfig,
  ModelConfig,
  NetworkConfig,
  RopeScalingConfig,
)
from instructjax.core.rl_training import PPOConfig, RolloutConfig
from instructjax.core.running import (
  CheckpointConfig,
  GuardConfig,
  LogConfig,
  MeshConfig,
  ProfileConfig,
)
from instructjax.core.stages import TARGETS
from instructjax.core.training import (
  BestOfNConfig,
  CollectConfig,
  EvaluateConfig,
  OptimConfig,
  PretrainConfig,
  RMConfig,
  SFTConfig,
)

__all__ = [
  "AdapterConfig",
  "BestOfNConfig",
  "CheckpointConfig",
  "CollectConfig",
  "Config",
  "DataConfig",
  "EvaluateConfig",
  "ExecutionConfig",
  "GuardConfig",
  "LogConfig",
  "MeshConfig",
  "ModelConfig",
  "NetworkConfig",
  "OptimConfig",
  "PPOConfig",
  "PretrainConfig",
  "ProfileConfig",
  "RMConfig",
  "RolloutConfig",
  "RopeScalingConfig",
  "SFTConfig",
  "TokenizerConfig",
  "from_config_dict",
  "network_config",
]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  # a tokenizer.json, sentencepiece .model, .gguf or folder; '' uses the tokenizer that comes with the given weights,
  # or trains one on data.documents
  path: str = dataclasses.field(metadata=FILE)
  # vocabulary size of the tokenizer to train; if a tokenizer is given, it must equal that tokenizer's size [pieces]
  vocab_size: int

  def validate(self, where: str):
    require_positive(self, where, "vocab_size")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where records come from: a simulated task (`demo:`), `jsonl:PATH[.gz]` or another source of data/sources.py.

  '' is no source. What sources hold is in the fingerprints of the stages (stages/contents.py), where they lie is not.
  """

  # source of plain text for pretraining and for the pretraining mix, as SCHEME:PATH (see docs/data.md); '' is no source
  documents: str = dataclasses.field(metadata=SOURCE | SAME_NUMBERS)
  # source of prompts with answers to imitate; '' is no source
  demonstrations: str = dataclasses.field(metadata=SOURCE | SAME_NUMBERS)
  # source of ranked answers for the reward model; '' is no source, and demo: or conversation: lets simulated labelers
  # rank answers that the SFT policy samples
  comparisons: str = dataclasses.field(metadata=SOURCE | SAME_NUMBERS)
  # source of prompts for RL and evaluation; '' is no source
  prompts: str = dataclasses.field(metadata=SOURCE | SAME_NUMBERS)
  max_prompt_length: int  # prompts longer than this are dropped and counted [tokens]
  # longest response, including its EOS; longer responses in the data are dropped and counted [tokens]
  max_response_length: int
  # share of records held out for validation, chosen by a hash of the prompt or document; used only for sources that
  # have no validation split
  validation_fraction: float
  # folder of tokenized documents and demonstrations, which several runs may share; '' is WORKDIR/cache/tokens
  token_cache: str = dataclasses.field(metadata=FILE | SAME_NUMBERS)
  # raise stops the run at the first unusable record; skip drops and counts such records
  on_bad_record: Literal["raise", "skip"]

  @property
  def are_collected(self) -> bool:
    """Whether comparisons come from simulated labelers, who rank answers that the run samples."""
    return self.comparisons in places.SIMULATED

  @property
  def are_by_people(self) -> bool:
    """Whether comparisons come from a labeling project, in which people can rank answers that the run samples."""
    return self.comparisons.startswith("labels:")

  def validate(self, where: str):
    require(
      0 < self.validation_fraction < 1,
      f"{where}.validation_fraction={self.validation_fraction} must be in (0, 1)",
    )
    require_positive(self, where, "max_prompt_length", "max_response_length")


@dataclasses.dataclass(frozen=True)
class Config:
  # the stage to run, together with the stages that it starts from; each config file sets it
  stage: str
  preset: str  # name of the size preset, for reports; chosen with --config=FILE:PRESET
  # seeds everything random; the same seed on the same machine gives the same numbers
  seed: int = dataclasses.field(metadata=WIDE)
  model: ModelConfig  # the network of the policy and of the base model that it starts from
  # the network of the reward model, of the value network, and of the larger base model that evaluate compares with
  reward_model: ModelConfig
  adapter: AdapterConfig
  execution: ExecutionConfig
  tokenizer: TokenizerConfig  # how text becomes tokens
  data: DataConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig  # when a run is saved, and what is kept
  log: LogConfig  # what a run shows while it is in progress
  profile: ProfileConfig  # which steps are traced for a profiler
  guard: GuardConfig
  pretrain: PretrainConfig  # pretraining of the policy's base model, if no weights are given
  reward_pretrain: PretrainConfig  # pretraining of the reward model's base model
  sft: SFTConfig  # the supervised baseline (C.1)
  ppo_init: SFTConfig  # the supervised start of RL and its KL reference (C.3)
  collect: CollectConfig
  rm: RMConfig  # training of the reward model (C.2)
  ppo: PPOConfig  # reinforcement learning, with or without the pretraining gradient (C.4)
  rollout: RolloutConfig
  best_of_n: BestOfNConfig
  evaluate: EvaluateConfig  # how policies are compared

  @property
  def same_network(self) -> bool:
    """Whether the policy and the reward model have the same network apart from the head."""
    return self.model.network == self.reward_model.network

  def validate(self, where: str = "config"):
    require(0 <= self.seed < 2**63, f"{where}.seed={self.seed} must be >= 0 and below 2**63")
    require(
      self.stage in TARGETS,
      f"{where}.stage={self.stage[:80]!r} must be one of {', '.join(TARGETS)}",
    )
    self._validate_lengths(where)
    self._validate_adapter(where)
    self._validate_reward_model(where)
    self._validate_rl(where)
    self._validate_collected(where)

  def _validate_lengths(self, where: str):
    """Checks that whatever stands in one row fits in it, and in its network."""
    # Policy, reward model and value network all read a prompt together with its response.
    total = self.data.max_prompt_length + self.data.max_response_length
    for name in ("model", "reward_model"):
      limit = getattr(self, name).max_length
      require(
        total <= limit,
        f"data.max_prompt_length + max_response_length = {total} must not exceed {where}.{name}.max_length={limit}",
      )
    require(
      self.rm.row_length == 0 or self.rm.row_length >= total,
      f"{where}.rm.row_length={self.rm.row_length} must be 0 or at least data.max_prompt_length"
      f" + max_response_length = {total}: an answer fits in one row",
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

  def _validate_adapter(self, where: str):
    """Checks that the networks have the matrices that are adapted."""
    asked = {"q", "k", "v"} & set(self.adapter.targets)
    for name in ("model", "reward_model"):
      fused = getattr(self, name).network.fused_qkv and self.adapter.rank > 0
      require(
        not fused or len(asked) in (0, 3),
        f"{where}.adapter.targets={self.adapter.targets} must have all of q, k, v or none: files of networks like"
        f" {where}.{name} hold them as one matrix",
      )
      has_gate = getattr(self, name).is_gated
      require(
        self.adapter.rank == 0 or has_gate or self.adapter.targets != ("gate",),
        f"{where}.adapter.targets={self.adapter.targets} must name a matrix of {where}.{name}, whose MLP has no gate",
      )

  def _validate_reward_model(self, where: str):
    """Checks what the reward model starts from."""
    # The reward model can take over the SFT model's weights only if every tensor fits.
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
      not self.rm.weights or self.rm.start_from == "base",
      f"{where}.rm.weights={self.rm.weights!r} is a finished reward model, so that nothing would start from"
      " rm.start_from='sft'; use 'base'",
    )
    require(
      not self.rm.weights or self.reward_model.weights in ("", self.model.weights),
      f"{where}.rm.weights={self.rm.weights!r} must come without {where}.reward_model.weights="
      f"{self.reward_model.weights!r}, from which nothing would start",
    )

  def _validate_rl(self, where: str):
    """Checks what the RL stages take from other blocks."""
    require(
      self.ppo.value_init == "reward_model" or self.same_network,
      f"{where}.ppo.value_init='policy' must have reward_model equal to model, and they differ; use 'reward_model'",
    )
    warmup, few = self.ppo.value_warmup, self.evaluate.overoptimization_iterations
    require(
      not self.evaluate.overoptimization or warmup < few,
      f"{where}.ppo.value_warmup={warmup} must be below evaluate.overoptimization_iterations={few}, a stage that has"
      " the warm-up too",
    )
    grouped = [name for name in ("rloo", "grpo") if name in (self.stage, *self.evaluate.compare)]
    size, answers = self.evaluate.group_size, self.ppo.batch_size
    require(
      not grouped or answers % size == 0,
      f"{where}.evaluate.group_size={size} must divide ppo.batch_size={answers}, the answers of an iteration of"
      f" {' and '.join(grouped)}",
    )
    minibatch = answers // self.ppo.num_minibatches
    require(
      not grouped or not self.ppo.share_prompts or minibatch % size == 0,
      f"{where}.evaluate.group_size={size} must divide a minibatch's {minibatch} answers of {' and '.join(grouped)}"
      " with ppo.share_prompts, which keeps those to a prompt together",
    )
    require(
      self.rollout.slots <= self.ppo.batch_size,
      f"{where}.rollout.slots={self.rollout.slots} must not exceed ppo.batch_size={self.ppo.batch_size}",
    )

  def _validate_collected(self, where: str):
    """Checks that answers that are ranked during the run can be, and can be learnt from."""
    require(
      not (self.data.are_collected or self.collect.rounds > 1)
      or self.collect.max_responses <= self.rm.max_responses,
      f"{where}.collect.max_responses={self.collect.max_responses} must not exceed"
      f" rm.max_responses={self.rm.max_responses}",
    )
    require(
      self.collect.rounds == 1 or self.data.are_collected or self.data.are_by_people,
      f"{where}.collect.rounds={self.collect.rounds} must be 1 beside data.comparisons={self.data.comparisons!r}: only"
      " simulated labelers, as of demo:, and people in a project, labels:DIR, can rank more answers during a run",
    )


def from_config_dict(config: Any) -> Config:
  """Converts an ml_collections ConfigDict, or a plain nested dict, to a frozen and validated Config.

  If the reward model has the same network as the policy and names no weights of its own, it gets the policy's weights.

  Raises:
    UserError: a field is unknown (with the nearest known one), missing, of the wrong type, or breaks a rule.
  """
  plain = config.to_dict() if hasattr(config, "to_dict") else config
  result = _expand(build(Config, plain, "config"), "config")
  # Validated before the weights are filled in: a rule refuses reward_model.weights beside rm.start_from='sft', and must
  # only see what the user has set.
  validate(result, "config")
  return _with_shared_base(result)


def _with_shared_base(config: Config) -> Config:
  """The config in which a reward model that names no weights has those of the policy, if the networks are the same."""
  if not config.same_network or config.reward_model.weights:
    return config
  reward_model = dataclasses.replace(config.reward_model, weights=config.model.weights)
  return dataclasses.replace(config, reward_model=reward_model)


def with_finished_reward_model(config: Config) -> Config:
  """The config in which `reward_model.weights`, found to be a finished reward model, are `rm.weights`."""
  path = config.reward_model.weights
  changed = dataclasses.replace(
    config,
    rm=dataclasses.replace(config.rm, weights=path),
    reward_model=dataclasses.replace(config.reward_model, weights=""),
  )
  return _with_shared_base(changed)


def _expand(block: Any, where: str) -> Any:
  """The block with `~` expanded in the fields that name places.

  Raises:
    UserError: a field's value can be no place on this machine.
  """
  changed: dict[str, Any] = {}
  for field in dataclasses.fields(block):
    value, name = getattr(block, field.name), f"{where}.{field.name}"
    if dataclasses.is_dataclass(value):
      changed[field.name] = _expand(value, name)
    elif field.metadata.get("path") == "source":
      changed[field.name] = places.expand_source(value, name)
    elif "path" in field.metadata:
      schemes = places.WEIGHTS if field.metadata["path"] == "weights" else ()
      changed[field.name] = places.expand(value, name, schemes)
  return dataclasses.replace(block, **changed)


def network_config(values: dict, where: str) -> NetworkConfig:
  """Converts the plain dict that a finished stage has saved to a validated NetworkConfig.

  Args:
    values: field name -> value.
    where: what to call the block in messages.
  Raises:
    UserError: a field is unknown, missing, of the wrong type, or breaks a rule.
  """
  result = build(NetworkConfig, values, where)
  validate(result, where)
  return result
