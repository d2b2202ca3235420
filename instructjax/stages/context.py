"""The Context that every stage receives (config, workdir, mesh, tokenizer, data), and the fingerprint of a stage.

One Context is built per run, by pipeline.py. Called by the stages. Imports no stage.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from instructjax import models
from instructjax.core import provenance, terminal
from instructjax.core.blocks import ROUNDING, SAME_NUMBERS, determining, marked
from instructjax.core.config import Config, ExecutionConfig, OptimConfig
from instructjax.core.provenance import Provenance
from instructjax.core.stages import REFERENCE, ROLES, STAGES, RoleName
from instructjax.data.tokenizer import Tokenizer
from instructjax.models import adapters, transformer
from instructjax.parallel import sharding
from instructjax.stages import lineage
from instructjax.stages.contents import Contents, NotThere
from instructjax.stages.run_data import RunData
from instructjax.train import finished, stage_runs
from instructjax.train.adapter_base import BASE, VALUE_BASE, BaseRecord
from instructjax.train.tracking import Tracking
from instructjax.train.weights import Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
  """One pipeline run.

  Attributes:
    config, workdir, mesh, tokenizer: those of the run.
    given: weights that the config names in place of trained ones, by the stage that would train them.
    data: records and token lists.
    contents: what the files hold that the run reads.
    tracking: where the run can be followed beside its metrics.jsonl.
  """

  config: Config
  workdir: pathlib.Path
  mesh: Mesh
  tokenizer: Tokenizer
  given: Mapping[str, Weights]
  data: RunData
  contents: Contents
  tracking: Tracking

  def directory(self, stage: str) -> pathlib.Path:
    """Where a stage's files are."""
    return self.workdir / stage

  def done(self, stage: str) -> finished.Done | None:
    """The done.json of a stage; None if the stage is not finished.

    Raises:
      UserError: the file is damaged, or another version wrote it.
    """
    return finished.read_done(self.directory(stage))

  def require_done(self, stage: str) -> finished.Done:
    """What a stage left that must have finished before this one.

    Raises:
      UserError: it has not.
    """
    return finished.require_done(self.directory(stage))

  def key(self, stage: str) -> jax.Array:
    """The stage's own root key, a function of the run's seed and the stage's name alone.

    It does not depend on which stages ran before, so a stage draws the same numbers in any plan.
    """
    return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(stage.encode()))

  def data_seed(self, stage: str) -> int:
    """The seed of a stage's order of data, as `key` for NumPy."""
    return zlib.crc32(f"{self.config.seed}/{stage}".encode()) & 0x7FFFFFFF

  def model(self, role: RoleName) -> transformer.Model:
    """The network of a role (a key of `core.stages.ROLES`) as it runs on this mesh."""
    return make_model(self.config, self.mesh, role, self.tokenizer.vocab_size)

  @property
  def execution(self) -> ExecutionConfig:
    """How networks are run on the devices of this run's mesh."""
    return models.resolve_execution(self.config.execution, sharding.platform_of(self.mesh))

  def own_rows(self, batch_size: int) -> np.ndarray:
    """The places in a global batch of the rows that this process draws.

    Raises:
      UserError: the batch does not divide over the mesh.
    """
    return sharding.own_rows(self.mesh, batch_size)


def make_model(
  config: Config, mesh: Mesh | AbstractMesh | None, role: RoleName, vocab_size: int
) -> transformer.Model:
  """The network of a role (a key of `core.stages.ROLES`) as it runs on a mesh; None stands for one device.

  Policy and reward model have the config's adapter. A stage that trains a base takes `bare` of them.
  """
  row = ROLES[role]
  network = getattr(config, row.block).network
  adapter = config.adapter if lineage.is_adapted(config) and role != "reward_base" else None
  return models.model_on(mesh, network, config.execution, vocab_size, row.head, adapter)


def bare(model: transformer.Model) -> transformer.Model:
  """The same network without an adapter: all of its weights are trained."""
  return model.clone(adapter=None)


def canonical(value: Any) -> str:
  """The JSON that stands for a value in a fingerprint: of a config block, only the fields that decide its numbers."""
  plain = determining(value) if dataclasses.is_dataclass(value) else value
  return json.dumps(plain, sort_keys=True)


def fingerprint(ctx: Context, stage: str) -> dict[str, str]:
  """Everything that decides a stage's result: a stage is resumed or reused only if all of it is the same.

  It holds config blocks as JSON, so that a message can name the fields that differ. Settings that move numbers by
  rounding only, or not at all, are left out (see `changeable`), as are the devices.

  Args:
    ctx: the run.
    stage: name of the stage.
  Returns:
    name -> canonical JSON or hash. The settings are those of `lineage.blocks`. Each `parent:NAME` is the hash of that
    stage's own fingerprint, or of given weights, so a change in any earlier stage shows here too. Each `data:KIND` is
    what the stage's records of a kind hold. Of a finished stage whose source is gone, it is what the stage read.
  Raises:
    UserError: a source or given weights cannot be read, or `collect` did not write the comparisons.
  """
  blocks = {**lineage.blocks(ctx.config, stage), "seed": ctx.config.seed}
  result = {f"config.{name}": canonical(value) for name, value in blocks.items()}
  if STAGES[stage].kind == "rm" and "rm" in blocks:
    result["config.rm"] = json.dumps(
      determining(blocks["rm"]) | _rows_of_dropout(ctx.config), sort_keys=True
    )
  result["tokenizer"] = ctx.tokenizer.fingerprint
  if ctx.tokenizer.chats.clock is not None:
    result["date of chats"] = ctx.tokenizer.chats.clock
  if stage in ctx.given:
    result[f"weights:{stage}"] = given_fingerprint(ctx, ctx.given[stage])
  for parent in lineage.parents(ctx.config, stage):
    is_replaced = lineage.is_replaced(ctx.config, parent)
    result[f"parent:{parent}"] = (
      given_fingerprint(ctx, ctx.given[parent])
      if is_replaced
      else ctx.require_done(parent).identity
    )
  return result | _data_fingerprints(ctx, stage)


def _rows_of_dropout(config: Config) -> dict[str, Any]:
  """Settings of the reward model's rows, where they decide more than rounding.

  An adapter's dropout has one draw for each column of a row, so it matters which answers share one.
  """
  if not (config.adapter.rank and config.adapter.dropout):
    return {}
  names = ("row_length", "share_prompts", *(["microbatches"] if config.rm.row_length else []))
  return {name: getattr(config.rm, name) for name in names}


def given_fingerprint(ctx: Context, given: Weights) -> str:
  """What weights that the config names are recognised by."""
  return ctx.contents.of_weights(given).fingerprint if given.files else given.fingerprint


def _data_fingerprints(ctx: Context, stage: str) -> dict[str, str]:
  done, result = ctx.done(stage), {}
  for kind in lineage.contents(ctx.config, stage):
    name = f"data:{kind}"
    try:
      result[name] = ctx.contents.of(kind).fingerprint
    except NotThere as error:
      if done is None or name not in done.fingerprint:
        raise
      logging.warning("%s is finished, and is not compared with its data: %s", stage, error)
      result[name] = done.fingerprint[name]
  return result


def require_same_data(ctx: Context, stage: str):
  """Checks that a finished stage was made with what its sources hold now.

  Sources that are gone are taken for the same, and so is what a stage reads that would do its work anew.

  Raises:
    UserError: a file has another content, or there is another number of files.
  """
  done = ctx.done(stage)
  if done is None or STAGES[stage].kind in ("select", "evaluate"):
    return
  now = _data_fingerprints(ctx, stage)
  made_with = {part: done.fingerprint.get(part, "none") for part in now}
  finished.require_same_run(ctx.directory(stage), made_with, now, _files_behind(ctx, now))


def _files_behind(ctx: Context, fingerprint: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
  """The paths behind parts of a fingerprint, for messages."""
  result = {}
  for part in fingerprint:
    what, _, name = part.partition(":")
    with contextlib.suppress(NotThere):
      if what == "data":
        result[part] = ctx.contents.of(name).files
      elif what in ("parent", "weights") and name in ctx.given and ctx.given[name].files:
        result[part] = ctx.contents.of_weights(ctx.given[name]).files
  return result


def changeable(ctx: Context, stage: str, blocks: Mapping[str, Any]) -> dict[str, dict]:
  """What fingerprints leave out, as `stage_runs.StageRun` has it: settings of these blocks and execution, versions.

  In place of the paths of bases it has those of the given weights that the stage's networks descend from.
  """
  named = {"execution": ctx.execution, **blocks}
  settings = {
    metadata["on_resume"]: {
      f"{name}.{field}": value
      for name, block in named.items()
      if dataclasses.is_dataclass(block)
      for field, value in marked(block, metadata).items()
    }
    for metadata in (ROUNDING, SAME_NUMBERS)
  }
  # Of a stage's own network, which it calls `model`, and of an RL stage's value network.
  same = settings[SAME_NUMBERS["on_resume"]]
  value = "rm" if ctx.config.ppo.value_init == "reward_model" else REFERENCE
  for name, of in (("model.weights", stage), ("reward_model.weights", value)):
    if name in same:
      same[name] = lineage.origin(ctx.config, of)
  return settings | {stage_runs.LIBRARIES: provenance.versions()}


def stage_run(ctx: Context, stage: str) -> stage_runs.StageRun:
  """How the outer loop is to name, save and log a stage."""
  made_with = fingerprint(ctx, stage)
  if (
    lineage.trains_adapter(ctx.config, stage) and stage not in ctx.given
  ):  # a given reward model is only measured
    made_with |= _base_records(ctx, stage)
  return stage_runs.StageRun(
    name=stage,
    directory=ctx.directory(stage),
    checkpoint=ctx.config.checkpoint,
    log=ctx.config.log,
    profile=ctx.config.profile,
    tracking=ctx.tracking,
    fingerprint=made_with,
    files=_files_behind(ctx, made_with),
    changeable=changeable(ctx, stage, lineage.blocks(ctx.config, stage)),
    started=time.monotonic(),
  )


def goes_on(ctx: Context, stage: str) -> bool:
  """Whether what is given in place of a stage is an adapter that fits the run's, which is trained on.

  Raises:
    UserError: the adapter cannot be read.
  """
  given = ctx.given.get(stage)
  if given is None or not given.is_adapter or not lineage.is_adapted(ctx.config):
    return False
  return not given.misfit(ctx.model(STAGES[stage].require_role()).clone(adapter=ctx.config.adapter))


def _base_records(ctx: Context, stage: str) -> dict[str, str]:
  """What a stage's fingerprint says of the base of the adapter that it trains."""

  def record(frozen: str) -> str:
    given, inside = ctx.given.get(frozen), goes_on(ctx, frozen)
    if given is None:
      found = BaseRecord(frozen, "own", ctx.require_done(frozen).identity, inside)
    else:
      base = given.require_base() if inside else given
      found = BaseRecord(frozen, base.kind, given_fingerprint(ctx, base), inside)
    return json.dumps(dataclasses.asdict(found), sort_keys=True)

  config = ctx.config
  if not STAGES[stage].is_rl or not lineage.variant(config, stage).has_value_network:
    return {BASE: record(lineage.frozen_stage(config, stage))}
  policy, reward = lineage.frozen_stages(config)
  value = policy if config.ppo.value_init == "policy" else reward
  return {BASE: record(policy), VALUE_BASE: record(value)}


def tell_adapter(ctx: Context, stage: str, role: RoleName, optim: OptimConfig):
  """Says what a stage with an adapter trains, and at which rate."""
  if not lineage.is_adapted(ctx.config) or jax.process_index() != 0:
    return
  model = ctx.model(role)
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  trained = count(adapters.trained_shapes(model))
  everything = count(transformer.param_shapes(model))
  cfg = model.require_adapter()
  terminal.say(
    f"{stage} trains adapters of rank {cfg.rank} on {', '.join(cfg.targets)}: {trained:,} numbers beside"
    f" {everything:,} frozen ones, at a learning rate of {optim.learning_rate:.3g}"
    f" (adapter.rate_factor={cfg.rate_factor:g} times that of all weights)"
  )


def provenance_of(ctx: Context, stage: str, run: stage_runs.StageRun) -> Provenance:
  """The provenance of a stage that has just finished: code, command, data and machine.

  Its seconds count from when this process began the stage. The time of earlier runs that were stopped is not known.
  """
  seconds = time.monotonic() - run.started  # first: a checksum may take long
  kinds = lineage.kinds_read(ctx.config, [stage])
  return provenance.collect(
    {kind: ctx.data.source(kind) for kind in kinds},
    list(ctx.mesh.devices.flat),
    jax.process_count(),
    seconds,
  )


def finish(
  ctx: Context,
  stage: str,
  run: stage_runs.StageRun,
  step: int | None,
  result: Any,
  made: Provenance | None = None,
):
  """Marks a stage as finished: writes its done.json, provenance included, and tells the trackers its result.

  Args:
    ctx: the run.
    stage: name of the stage.
    run: the stage as `stage_run` made it.
    step: step of the checkpoint that later stages start from; None for a stage without checkpoints.
    result: what the stage measured.
    made: the stage's provenance, if it has been collected already.
  Raises:
    UserError: the file cannot be written.
  """
  if jax.process_index() == 0:
    made = made or provenance_of(ctx, stage, run)
    finished.write_done(run.directory, finished.Done(stage, run.fingerprint, step, result, made))
    ctx.tracking.report(stage, result)


def is_finished(run: stage_runs.StageRun) -> bool:
  """Whether the stage is finished already, with these settings.

  Raises:
    UserError: it is finished, but was made with another config, tokenizer or parent, or with other data.
  """
  done = finished.read_done(run.directory)
  if done is None:
    return False
  finished.require_same_run(run.directory, done.fingerprint, run.fingerprint, run.files)
  logging.info("%s is finished already", run.name)
  return True
