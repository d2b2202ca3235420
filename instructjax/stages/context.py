"""What every stage is handed: config, workdir, mesh, tokenizer, records, and what makes two runs of a stage the same.

Called by the stages and pipeline.py. Imports no stage.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import zlib
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import models
from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, determining, marked
from instructjax.core.config import Config, ExecutionConfig
from instructjax.core.errors import UserError
from instructjax.data import sources
from instructjax.data.tokenize import tokenize_prompts
from instructjax.data.tokenizer import Tokenizer
from instructjax.models import transformer
from instructjax.parallel import sharding
from instructjax.train import finished, loop, weights

BASE_OF = {"pretrain": "model", "reward_pretrain": "reward_model"}  # stage -> config block


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
  """One pipeline run. Records and token lists are read once and kept."""

  config: Config
  workdir: pathlib.Path
  mesh: Mesh
  tokenizer: Tokenizer

  def directory(self, stage: str) -> pathlib.Path:
    """Where a stage's files are."""
    return self.workdir / stage

  def weights_path(self, stage: str) -> str:
    """What the config gives in place of a stage that trains a base, or ''."""
    block = BASE_OF.get(stage)
    return getattr(self.config, block).weights if block else ""

  @functools.cache
  def given_weights(self, stage: str) -> weights.Weights | None:
    """The weights there, opened; None where the stage is trained."""
    path = self.weights_path(stage)
    if not path:
      return None
    try:
      return weights.locate(path)
    except UserError as error:
      raise UserError(f"config.{BASE_OF[stage]}.weights: {error}") from error

  def key(self, stage: str) -> jax.Array:
    """The stage's own root key: a function of the run's seed and the stage's name."""
    return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(stage.encode()))

  def data_seed(self, stage: str) -> int:
    return zlib.crc32(f"{self.config.seed}/{stage}".encode()) & 0x7FFFFFFF

  @functools.cache
  def records(self, kind: str, split: str) -> list:
    """Records of `kind` from the source the config names, seeded by the run."""
    data = self.config.data
    spec = getattr(data, kind)
    if kind == "comparisons" and self.collects:
      spec, split = f"jsonl:{self.directory('collect') / split}.jsonl", "all"
    records = sources.load(
      spec,
      kind,
      split,
      seed=self.config.seed,
      validation_fraction=data.validation_fraction,
      on_bad_record=data.on_bad_record,
    )
    return sources.render(records, self.tokenizer.render_chat, on_bad_record=data.on_bad_record)

  @functools.cache
  def document_tokens(self, split: str) -> list[list[int]]:
    """Token lists of the documents, each after the BOS token where the model is given one."""
    tokenizer = self.tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [bos + tokenizer.encode(record.text) for record in self.records("documents", split)]

  @functools.cache
  def prompt_tokens(self, split: str) -> list[list[int]]:
    """Token lists of the prompts that fit max_prompt_length, as in App. C (longer ones are filtered, counted)."""
    return tokenize_prompts(
      self.records("prompts", split),
      self.tokenizer,
      max_prompt_length=self.config.data.max_prompt_length,
    )[0]

  def model(self, role: str) -> transformer.Model:
    """The network definition of `policy` (also the reference), `reward` (also value) or `reward_base`."""
    cfg, head = {
      "policy": (self.config.model, "lm"),
      "reward": (self.config.reward_model, "scalar"),
      "reward_base": (self.config.reward_model, "lm"),
    }[role]
    vocab_size = self.tokenizer.vocab_size
    return models.model_on(self.mesh, cfg.network, self.execution, vocab_size, head)

  @property
  def execution(self) -> ExecutionConfig:
    """How networks are run on the devices of this run's mesh."""
    return models.resolve_execution(self.config.execution, models.platform_of(self.mesh))

  def require_fit(self, roles: Iterable[str], batches: Mapping[str, int]):
    """Refuses a mesh that does not divide the parameters of `roles`, or one of the batches.

    Raises:
      UserError: see `sharding.require_fit`.
    """
    models = {role: self.model(role) for role in roles}
    axes = {role: transformer.param_axes(model) for role, model in models.items()}
    shapes = {role: transformer.param_shapes(model) for role, model in models.items()}
    sharding.require_fit(self.mesh, axes, shapes, batches)

  @property
  def collects(self) -> bool:
    """Whether comparisons are collected from simulated labelers (stage `collect`) instead of read."""
    return self.config.data.comparisons == "demo:"

  def own_rows(self, batch_size: int) -> np.ndarray:
    """Places in a global batch of the rows that this process draws."""
    return sharding.own_rows(self.mesh, batch_size)


def canonical(value) -> str:
  """One spelling of a plain value, or of what decides a config block's numbers."""
  plain = determining(value) if dataclasses.is_dataclass(value) else value
  return json.dumps(plain, sort_keys=True)


def fingerprint(ctx: Context, blocks: dict, parents: tuple[str, ...] = ()) -> dict[str, str]:
  """What a resumed or reused stage must have in common with the one on disk.

  Args:
    ctx: the run.
    blocks: name -> config dataclass or plain value that the stage depends on.
    parents: stages whose finished weights or files this one starts from.
  Returns:
    name -> canonical JSON or hash; `parent:NAME` entries carry the parents' own fingerprints on.
  """
  result = {f"config.{name}": canonical(value) for name, value in blocks.items()}
  result["config.seed"] = canonical(ctx.config.seed)
  result["tokenizer"] = ctx.tokenizer.fingerprint
  for parent in parents:
    given = ctx.given_weights(parent)
    made_with = None if given else finished.read_done(ctx.directory(parent))["fingerprint"]
    result[f"parent:{parent}"] = (
      given.fingerprint if given else hashlib.sha256(canonical(made_with).encode()).hexdigest()
    )
  return result


def changeable(ctx: Context, blocks: dict) -> dict[str, dict]:
  """The settings of these blocks, and of execution, that no fingerprint has, as `loop.StageRun` wants them."""
  named = {"execution": ctx.execution}
  for name, block in blocks.items():
    if dataclasses.is_dataclass(block):
      # The stage's own block goes by the name that it has in the config.
      own = (other for other, value in vars(ctx.config).items() if value is block)
      named[next(own) if name == "stage" else name] = block
  return {
    metadata["on_resume"]: {
      f"{name}.{field}": value
      for name, block in named.items()
      for field, value in marked(block, metadata).items()
    }
    for metadata in (ROUNDING, SAME_NUMBERS)
  }


def stage_run(
  ctx: Context, stage: str, blocks: dict, parents: tuple[str, ...] = ()
) -> loop.StageRun:
  return loop.StageRun(
    name=stage,
    directory=ctx.directory(stage),
    checkpoint=ctx.config.checkpoint,
    log=ctx.config.log,
    profile=ctx.config.profile,
    fingerprint=fingerprint(ctx, blocks, parents),
    changeable=changeable(ctx, blocks),
  )


def is_finished(run: loop.StageRun) -> bool:
  """Whether the stage is done already.

  Raises:
    UserError: it is, but was made with another config, tokenizer or parent.
  """
  done = finished.read_done(run.directory)
  if done is None:
    return False
  finished.require_same_run(run.directory, done["fingerprint"], run.fingerprint)
  logging.info("%s is finished already", run.name)
  return True
