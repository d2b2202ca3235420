"""Builds a run, checks beforehand for whatever would stop it later, and runs the unfinished stages. Called by main."""

import collections
import importlib
import pathlib
import shlex
import time
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh

from instructjax.core import provenance, terminal
from instructjax.core.config import Config, MeshConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import ROLES, STAGES
from instructjax.parallel import agreement, constraints, distributed, memory, sharding
from instructjax.stages import lineage, meshes, outlook, pinned, policies, room, run_tokenizer
from instructjax.stages.contents import Contents
from instructjax.stages.context import (
  Context,
  given_fingerprint,
  require_same_data,
)
from instructjax.stages.run_data import RunData
from instructjax.train import finished, metrics, profiling, tracking

_AnyMesh = TypeVar("_AnyMesh", Mesh, AbstractMesh)


def module(stage: str) -> ModuleType:
  """The module that runs and checks a stage. It is imported here, so that a run imports only the stages it needs."""
  return importlib.import_module(f"instructjax.stages.{STAGES[stage].module}")


def check(ctx: Context, stages: list[str]):
  """Looks for mistakes that would otherwise stop the run hours later.

  Here it checks what every stage needs: the records must be readable, and finished stages must have been made with the
  data that lie there now. For the rest it calls the `check` of each stage that is still to run. `make_context` has
  checked what settings alone can break.

  Args:
    ctx: the run.
    stages: the plan, finished stages included.
  Raises:
    UserError: a source that a coming stage reads has no usable record, a source has changed since a stage was finished,
      or a stage's `check` fails.
  """
  # What is finished first: nothing is to be trained beside a stage that will be refused.
  for stage in stages:
    require_same_data(ctx, stage)
  coming = _coming(ctx.workdir, stages)
  # As tokens where possible, because records that are too long drop out: a source may be readable and still leave none.
  read = {
    "prompts": ctx.data.prompt_tokens,
    "comparisons": lambda s: ctx.data.records("comparisons", s),
  }
  distributed.at("reading the data")
  for kind in lineage.kinds_read(ctx.config, coming):
    for split in ("train", "validation"):
      read[kind](split) if kind in read else ctx.data.tokens(kind, split)
  for stage in coming:
    _call(stage, "check", ctx)


def require_same_everywhere(ctx: Context, stages: list[str]):
  """Checks that all processes of the run read the same tokenizer, weights and data, from whatever paths.

  Raises:
    UserError: in all of them: some differ.
  """
  team = distributed.team()
  if team is None:
    return
  distributed.at("comparing the data of all processes")
  kinds = lineage.kinds_read(ctx.config, _coming(ctx.workdir, stages))
  ctx.contents.share(team, "data and weights", kinds, ctx.given.values())
  facts = {"tokenizer": ctx.tokenizer.fingerprint}
  facts |= {
    f"weights for {stage}": given_fingerprint(ctx, given) for stage, given in ctx.given.items()
  }
  for kind in kinds:
    source = ctx.data.source(kind)
    facts[f"the content of config.data.{kind}"] = f"{source.checksum}\t{source.spec}"
  agreement.require_same(team, "data", facts)


def _coming(workdir: pathlib.Path, stages: list[str]) -> list[str]:
  """The stages that are not finished."""
  return [stage for stage in stages if finished.read_done(workdir / stage) is None]


def _require_sources(config: Config, workdir: pathlib.Path):
  """Checks that the config names a source for each kind of records that a coming stage reads.

  Raises:
    UserError: some are missing; it names all of them at once.
  """
  kinds = lineage.kinds_read(config, _coming(workdir, lineage.plan(config)))
  missing = [kind for kind in kinds if not getattr(config.data, kind)]
  if missing:
    flags = " ".join(f"--config.data.{kind}=jsonl:PATH" for kind in missing)
    raise UserError(
      f"config.data must name a source of {', '.join(missing)} for stage {config.stage}; give"
      f" {flags} (or another source; only presets tiny and smollm2 bring their own)"
    )


def _require_room(config: Config, mesh: Mesh | AbstractMesh, stages: list[str]):
  """Checks by an estimate that each stage fits in the memory of the devices.

  Raises:
    UserError: one does not.
  """
  shape = dict(mesh.shape)
  if isinstance(mesh, Mesh) and sharding.platform_of(mesh) == "cpu":
    share = len(mesh.local_devices)
    room.require(config, shape, stages, room.host_memory(), "this machine", share)
    return
  size = constraints.device_memory(mesh)
  if size is not None:
    room.require(config, shape, stages, size, f"a {mesh.abstract_mesh.abstract_device.device_kind}")


def _require_settings(
  config: Config, mesh: Mesh | AbstractMesh, stages: list[str], workdir: pathlib.Path
):
  """Checks what settings alone can break, before data and tokenizer take their time.

  Raises:
    UserError: the mesh does not divide a batch, a part of one or a parameter, or a stage's `check_settings` fails.
  """
  meshes.require_fit(config, mesh, stages)
  for stage in _coming(workdir, stages):
    _call(stage, "check_settings", config)


def _call(stage: str, name: str, about: Config | Context):
  """Calls a check of a stage's module, if it has one of this name.

  Raises:
    UserError: the check fails; the message begins with the stage's name.
  """
  checks = module(stage)
  if not hasattr(checks, name):
    return
  try:
    getattr(checks, name)(about, stage)
  except UserError as error:
    raise UserError(f"stage {stage}: {error}") from error


def require_possible(config: Config, workdir: pathlib.Path) -> tuple[Config, Mesh, list[str]]:
  """Checks what can be known of a run before any data are read.

  Returns:
    The config with what given weights decide, the mesh, and the plan.
  Raises:
    UserError: the mesh does not fit the devices; see `require_possible_on` too.
  """
  return require_possible_on(sharding.make_mesh, config, workdir)


def require_possible_on(
  make_mesh: Callable[[MeshConfig], _AnyMesh], config: Config, workdir: pathlib.Path
) -> tuple[Config, _AnyMesh, list[str]]:
  """`require_possible` for devices that need not be attached to this machine.

  Args:
    make_mesh: the mesh of these devices.
    config, workdir: the run's.
  Returns:
    As for `require_possible`.
  Raises:
    UserError: the mesh does not fit the devices, a source of records is not named, a stage does not fit in memory, or
      its settings do not go together.
  """
  make_mesh(config.mesh)  # before any file is opened, whether its axes fit the devices
  config = policies.settle(config)
  stages = lineage.plan(config)
  mesh = make_mesh(meshes.settle(config, stages, make_mesh))
  _require_sources(config, workdir)
  _require_room(config, mesh, _coming(workdir, stages))
  _require_settings(config, mesh, stages, workdir)
  return config, mesh, stages


def make_context(config: Config, workdir: pathlib.Path) -> Context:
  """Makes the Context of a run, training a tokenizer if it needs one.

  Raises:
    UserError: the mesh does not fit the devices, a source of records is not named, the extra of a tracker is missing,
      or the given weights or the tokenizer do not fit the config or the workdir.
  """
  tracked = tracking.open_run(config, workdir)
  # Before `run_tokenizer`, which may read documents and train on them for minutes.
  config, mesh, _ = require_possible(config, workdir)
  pinned.pin(config, workdir)
  given = policies.given_weights(config)
  # Fingerprints hold the names of process 0's places, while each process reads from its own.
  own, config = config, agreement.with_first_places(distributed.team(), config)
  contents = Contents(own, workdir)
  tokenizer = run_tokenizer.of_run(
    config, workdir / finished.TOKENIZER, given, own.tokenizer.path, contents
  )
  return Context(
    config=config,
    workdir=workdir,
    mesh=mesh,
    tokenizer=tokenizer,
    given=given,
    data=RunData(own, workdir, tokenizer, contents),
    contents=contents,
    tracking=tracked,
  )


def run(config: Config, workdir: pathlib.Path):
  """Runs every stage of the plan that is not finished yet.

  Raises:
    UserError: `make_context` or `check` fails, or a finished stage was made with another config, tokenizer or parent.
    UserError: a stage was stopped because of its metrics (StageStopped), or files cannot be written.
    Preempted: the run was told to stop.
  """
  ctx = make_context(config, workdir)
  config = ctx.config
  stages = lineage.plan(config)
  require_same_everywhere(ctx, stages)
  check(ctx, stages)
  ran = []
  tell = terminal.say if jax.process_index() == 0 else lambda line, bold="", rest="": None
  chosen = meshes.choice(config, ctx.mesh)
  for line in (*([chosen] if chosen else []), *_other_versions(ctx, stages)):
    tell(line)
  with jax.set_mesh(ctx.mesh), ctx.tracking:
    for number, stage in enumerate(stages, start=1):
      distributed.require_going_on()
      distributed.at(f"the start of {stage}")
      left = _outlook(ctx, stages[number - 1 :], ran)
      tell(f"[{number}/{len(stages)}] ", bold=stage, rest=left)
      is_finished = ctx.done(stage) is not None
      start = time.monotonic()
      # Also for a finished stage, which only checks that its settings are the same, or is done anew.
      module(stage).run(ctx, stage)
      if not is_finished:
        ran.append((stage, time.monotonic() - start, ctx.directory(stage)))
        memory.release_freed_memory()
      # One process writes done.json, and all of them read it to go on.
      distributed.meet(f"{stage} finished")
  if ran and jax.process_index() == 0:
    _print_times(config, ran)
  tell(f"finished: {workdir}")
  for line in next_steps(stages, config.stage, workdir):
    tell(line)


def _outlook(ctx: Context, coming: list[str], ran: list[tuple[str, float, pathlib.Path]]) -> str:
  """About how long the coming stages take, in words; '' while that is not known."""
  if jax.process_index() != 0 or ctx.done(coming[0]):
    return ""
  # Of earlier runs only the stages whose work shows in the config alone: the data of others are not read again.
  plan = lineage.plan(ctx.config)
  earlier = [name for name in plan if STAGES[name].kind in ("base", "rl") and ctx.done(name)]
  seconds = outlook.seconds_left(ctx, coming, {*earlier, *(stage for stage, _, _ in ran)})
  return "" if seconds is None else f"  about {outlook.words(seconds)} left"


def next_steps(stages: list[str], target: str, workdir: pathlib.Path) -> list[str]:
  """What a user may do with a finished run: commands that can be pasted.

  Args:
    stages: the run's plan.
    target: the stage that was asked for. The plan may go on after it, with other policies to compare it with.
    workdir: its folder.
  """
  rows = [STAGES[stage] for stage in stages]
  speakers = [row.name for row in rows if row.role and ROLES[row.role].head == "lm"]
  folder = lambda stage: shlex.quote(str(workdir / stage))
  lines = []
  if any(row.kind == "evaluate" for row in rows):
    lines.append(f"  to see the report: open {workdir / 'report' / 'index.html'} in a browser")
  if STAGES[target].kind == "best_of_n":
    chosen = folder(f"{target}/{module(target).FILE}")
    lines.append(
      f"  the chosen answers: {chosen}; sft learns from them in another --workdir, with"
      f" --config.data.demonstrations=jsonl:{chosen}"
    )
  if speakers:
    speaker = target if target in speakers else speakers[-1]
    shown = folder(speaker)
    lines += [
      f"  to talk to it: instructjax generate --checkpoint={shown} --interactive",
      f"  for transformers: instructjax export --checkpoint={shown} --format=hf --out=export/{speaker}",
    ]
  return lines


def _other_versions(ctx: Context, stages: list[str]) -> list[str]:
  """Lines that name the finished stages which other versions made, and the versions; none where all are the same."""
  found = collections.defaultdict(list)
  for stage in stages:
    if done := ctx.done(stage):
      made = done.require_provenance()
      before = {"instructjax": made.version, **made.libraries}
      found[provenance.changed_versions(before, provenance.versions())].append(stage)
  return [
    f"{', '.join(made)}: finished under other versions than this run's {changed}; used as they are"
    for changed, made in found.items()
    if changed
  ]


def _print_times(config: Config, ran: list[tuple[str, float, pathlib.Path]]):
  """Prints the time of each stage that ran, and the phases of its traced steps."""
  terminal.show(profiling.stage_table(ran))
  for stage, _, directory in ran if config.profile.steps else ():
    is_shown = profiling.show_profile(stage, directory / "profile")
    if not is_shown and metrics.read_metrics(directory):
      terminal.say(
        f"{stage}: it took none of the steps {config.profile.steps}, so that none was traced"
      )
