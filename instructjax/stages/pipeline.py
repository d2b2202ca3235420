"""Builds a run, looks ahead for what would stop it, and runs the stages that are missing. Called by main."""

import importlib
import pathlib
import time
from collections.abc import Mapping
from types import ModuleType

import jax
import rich
from jax.experimental import multihost_utils

from instructjax.core import results
from instructjax.core.config import Config
from instructjax.core.errors import UserError, writing
from instructjax.core.stages import STAGES
from instructjax.data import sources
from instructjax.data import tokenizer as tokenizers
from instructjax.data.records import Document
from instructjax.parallel import distributed, memory, sharding
from instructjax.stages import lineage, policies
from instructjax.stages.context import Context, canonical, require_fit
from instructjax.stages.run_data import RunData
from instructjax.train import finished, metrics, profiling
from instructjax.train.weights import Weights


def module(stage: str) -> ModuleType:
  """The module that runs and checks a stage, imported when it is asked for."""
  return importlib.import_module(f"instructjax.stages.{STAGES[stage].module}")


def check(ctx: Context, stages: list[str]):
  """Looks ahead for what would stop the run hours later.

  What every stage needs is looked at here: that the mesh divides networks and batches, and that records can be read.
  The rest is each coming stage's own `check`.

  Args:
    ctx: the run.
    stages: of the plan, finished ones included.
  Raises:
    UserError: a batch or a parameter does not divide over the mesh; a source that a coming stage reads has no usable
      record; or a stage's `check` says so.
  """
  rows = [STAGES[stage] for stage in stages]
  roles = dict.fromkeys(row.role for row in rows if row.role)
  batches = dict.fromkeys(name for row in rows for name in row.batches)
  require_fit(ctx.config, ctx.mesh, ctx.tokenizer.vocab_size, roles, batches)
  coming = _coming(ctx.workdir, stages)
  for kind in _kinds_read(ctx.config, coming):
    for split in ("train", "validation"):
      ctx.data.prompt_tokens(split) if kind == "prompts" else ctx.data.records(kind, split)
  for stage in coming:
    try:
      module(stage).check(ctx, stage)
    except UserError as error:
      raise UserError(f"stage {stage}: {error}") from error


def _coming(workdir: pathlib.Path, stages: list[str]) -> list[str]:
  return [stage for stage in stages if finished.read_done(workdir / stage) is None]


def _kinds_read(config: Config, stages: list[str]) -> list[str]:
  """Kinds of record that these stages read from a source that the config names."""
  kinds = {kind for stage in stages for kind in STAGES[stage].reads}
  return sorted(kinds - ({"comparisons"} if lineage.collects(config) else set()))


def _require_sources(config: Config, workdir: pathlib.Path):
  """Before anything is read or trained, all that is missing at once.

  Raises:
    UserError: the config names no source of records that a coming stage reads.
  """
  kinds = _kinds_read(config, _coming(workdir, lineage.plan(config)))
  missing = [kind for kind in kinds if not getattr(config.data, kind)]
  if missing:
    flags = " ".join(f"--config.data.{kind}=jsonl:PATH" for kind in missing)
    raise UserError(
      f"config.data must name a source of {', '.join(missing)} for stage {config.stage}; give"
      f" {flags} (or another source; only preset tiny brings its own)"
    )


def make_context(config: Config, workdir: pathlib.Path) -> Context:
  """All that the stages of a run are handed.

  Raises:
    UserError: a source of records is not given, given weights do not fit, or see `make_mesh` and
      `_tokenizer`.
  """
  mesh = sharding.make_mesh(config.mesh)
  _require_sources(config, workdir)  # before a tokenizer is trained on documents
  given = policies.given_weights(config)
  tokenizer = _tokenizer(config, workdir / finished.TOKENIZER, given)
  return Context(
    config=config,
    workdir=workdir,
    mesh=mesh,
    tokenizer=tokenizer,
    given=given,
    data=RunData(config, workdir, tokenizer),
  )


def _tokenizer(
  config: Config, directory: pathlib.Path, given: Mapping[str, Weights]
) -> tokenizers.Tokenizer:
  """The one named, that of the given weights, or one trained on the documents; kept in the workdir.

  Args:
    config: of the run.
    directory: where it is kept.
    given: weights in place of bases; the first one's tokenizer is taken where the config names none.
  Raises:
    UserError: it is not of the size, or not the one, that the config or the workdir names.
  """
  cfg, theirs = config.tokenizer, [weights.tokenizer_path for weights in given.values()]
  source = cfg.path or next(iter(theirs), "")
  tokenizer = tokenizers.load(source) if source else _train(config, directory)
  policies.require_given_weights(config, given, tokenizer)
  if tokenizer.vocab_size != cfg.vocab_size:
    raise UserError(
      f"config.tokenizer.vocab_size={cfg.vocab_size} must be the {tokenizer.vocab_size} pieces of"
      f" {tokenizer.path}"
    )
  # Last: a workdir belongs to the tokenizer it holds, and one from a mistaken flag must not stay.
  return _keep(tokenizer, directory) if source else tokenizer


def _keep(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> tokenizers.Tokenizer:
  """Copies a tokenizer from elsewhere into the workdir, so that the run's folder is whole."""
  if finished.read_done(directory):
    if tokenizers.load(directory).fingerprint != tokenizer.fingerprint:
      raise UserError(
        f"cannot go on with {directory.parent}: it was made with another tokenizer than"
        f" {tokenizer.path}. Use another --workdir, or the tokenizer in {directory}."
      )
  elif jax.process_index() == 0:
    with writing(directory):
      tokenizer.save(directory)
    _write_tokenizer_done(directory, {"tokenizer": tokenizer.fingerprint})
  multihost_utils.sync_global_devices("tokenizer kept")
  return tokenizer


def _train(config: Config, directory: pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer trained on the documents, once a workdir."""
  cfg, data = config.tokenizer, config.data
  source = {"spec": data.documents, "validation_fraction": data.validation_fraction}
  blocks = {"config.tokenizer": cfg, "config.documents": source, "config.seed": config.seed}
  fingerprint = {name: canonical(value) for name, value in blocks.items()}
  done = finished.read_done(directory)
  if done:
    finished.require_same_run(directory, done.fingerprint, fingerprint)
  elif jax.process_index() == 0:
    documents = sources.load(
      data.documents,
      "documents",
      "train",
      seed=config.seed,
      validation_fraction=data.validation_fraction,
      on_bad_record=data.on_bad_record,
    )
    texts = [document.text for document in documents if isinstance(document, Document)]
    tokenizers.train_tokenizer(texts, cfg.vocab_size, directory / "tokenizer.model", config.seed)
    _write_tokenizer_done(directory, fingerprint)
  multihost_utils.sync_global_devices("tokenizer trained")
  return tokenizers.load(directory)


def _write_tokenizer_done(directory: pathlib.Path, fingerprint: Mapping[str, str]):
  done = finished.Done(finished.TOKENIZER, fingerprint, None, results.Nothing())
  finished.write_done(directory, done)


def run(config: Config, workdir: pathlib.Path):
  """Runs every stage of the plan that is not finished yet.

  Raises:
    UserError: see `check`; or a finished stage was made with another config, tokenizer or parent.
    UserError: a stage was stopped, or files cannot be written.
    Preempted: the run was told to stop.
  """
  ctx = make_context(config, workdir)
  stages = lineage.plan(config)
  check(ctx, stages)
  ran = []
  tell = rich.print if jax.process_index() == 0 else lambda line: None
  with jax.set_mesh(ctx.mesh):
    for number, stage in enumerate(stages, start=1):
      distributed.require_going_on()
      tell(rf"\[{number}/{len(stages)}] [bold]{stage}[/]")
      is_finished = ctx.done(stage) is not None
      start = time.monotonic()
      module(stage).run(ctx, stage)
      if not is_finished:
        ran.append((stage, time.monotonic() - start, ctx.directory(stage)))
        memory.release_freed_memory()
      multihost_utils.sync_global_devices(f"{stage} finished")  # one process writes, all go on
  if ran and jax.process_index() == 0:
    _print_times(config, ran)
  tell(f"finished: {workdir}")


def _print_times(config: Config, ran: list[tuple[str, float, pathlib.Path]]):
  """What the stages that ran took, and where the time of their traced steps went."""
  rich.print(profiling.stage_table(ran))
  for stage, _, directory in ran if config.profile.steps else ():
    table = profiling.profile_table(stage, directory / "profile")
    if table:
      rich.print(table)
    elif metrics.read_metrics(directory):
      rich.print(
        f"{stage}: it took none of the steps {config.profile.steps}, so that none was traced"
      )
