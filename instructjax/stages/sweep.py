"""Runs a config at every combination of swept values and seeds; what the swept fields don't touch is trained once.

Called by main for `--sweep` and `--seeds`. Each point of the sweep is a run of its own in a folder of its own, and can
be resumed, reported or deleted like any other. Before a point is run, the finished stages that an earlier point has
made with the same settings are put into its folder; the pipeline then finds them finished, and compares their
fingerprints as it does in every run.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax

from instructjax.core import terminal
from instructjax.core.config import Config
from instructjax.core.errors import StageStopped, UserError, Waiting, one_line, writing
from instructjax.core.stages import STAGES
from instructjax.parallel import distributed, memory
from instructjax.stages import lineage, pinned, pipeline
from instructjax.stages.context import canonical
from instructjax.stages.sweep_points import RECORD, Point
from instructjax.train import finished

_SCRATCH = ".linking"


def key(config: Config, stage: str) -> str:
  """A hash of all settings that may decide a stage's result, time or memory; equal keys mean an equal fingerprint.

  It is known before anything is trained or read. The hash covers more than a fingerprint does: rounding and speed too,
  because who sweeps such a field wants to see what it does.
  """
  blocks = lineage.blocks(config, stage)
  settings = {name: _plain(block) for name, block in blocks.items()}
  settings["data"] = canonical(config.data) if "data" in blocks else None
  named = {kind: getattr(config.data, kind) for kind in lineage.reads(config, stage)}
  parents = {name: key(config, name) for name in lineage.parents(config, stage)}
  return _hash(
    stage, settings, named, parents, lineage.given(config, stage), _everywhere(config), config.seed
  )


def _everywhere(config: Config) -> list:
  """Settings that touch every stage."""
  weights = [config.model.weights, config.reward_model.weights]
  return [*map(_plain, (config.tokenizer, config.execution, config.mesh)), weights]


def tokenizer_key(config: Config) -> str:
  """As `key`, for the tokenizer; one that is given does not depend on the seed."""
  given = [lineage.given(config, stage) for stage in STAGES]
  if config.tokenizer.path or any(given):
    return _hash(finished.TOKENIZER, _plain(config.tokenizer), given)
  data = config.data
  source = [data.documents, data.validation_fraction, data.on_bad_record]
  return _hash(finished.TOKENIZER, _plain(config.tokenizer), source, config.seed)


def _plain(block: Any) -> Any:
  as_dict: Any = dataclasses.asdict  # the type checker does not know that a block is a dataclass
  return as_dict(block) if dataclasses.is_dataclass(block) else block


def _hash(*parts: Any) -> str:
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def keys(config: Config) -> dict[str, str]:
  """Key of each folder that a point shares with others: its tokenizer and its stages, all but the evaluation."""
  shared = [stage for stage in lineage.plan(config) if STAGES[stage].kind != "evaluate"]
  return {finished.TOKENIZER: tokenizer_key(config)} | {
    stage: key(config, stage) for stage in shared
  }


def plan(points: Sequence[Point]) -> list[dict[str, str]]:
  """For each point: folder that an earlier point makes with the same settings -> the name of that point."""
  first: dict[tuple[str, str], str] = {}
  result = []
  for point in points:
    own = keys(point.config).items()
    result.append({name: first[name, of] for name, of in own if (name, of) in first})
    for name, of in own:
      first.setdefault((name, of), point.name)
  return result


def run(points: Sequence[Point], folder: pathlib.Path) -> list[pathlib.Path]:
  """Runs all points, one after the other. Stopped at any moment, the same call goes on.

  Args:
    points: see `sweep_points.points`.
    folder: the sweep's; each point has a folder of its name in it. The caller holds its lock.
  Returns:
    The folders of the points.
  Raises:
    UserError: a point's settings cannot run, which is said before anything is trained; files cannot be written; or
      some points were stopped because of their metrics. The others are run all the same.
    Waiting: some points wait for people. The others are run all the same.
    Preempted: the run was told to stop.
  """
  if (folder / finished.TOKENIZER).exists():
    raise UserError(
      f"--workdir={folder} holds a run, not a sweep: give a sweep a folder of its own"
    )
  tell = terminal.say if jax.process_index() == 0 else lambda line: None
  points = [_with_caches(point, folder) for point in points]
  for point in points:
    try:
      pipeline.require_possible(point.config, folder / point.name)
    except UserError as error:
      raise UserError(f"point {point.name}: {error}") from error
  is_begun = any((folder / point.name).exists() for point in points)
  for point in points:
    pinned.pin(point.config, folder, is_begun)
  if jax.process_index() == 0:
    terminal.show(_overview(points))
  stopped, waiting = [], []
  for number, point in enumerate(points, start=1):
    workdir = folder / point.name
    head = f"point {number}/{len(points)} {point.name}: "
    if is_finished(point, workdir):
      tell(f"{head}finished already")
      continue
    pinned.share(folder, workdir)
    reused = _prepare(point, workdir)
    distributed.meet(f"stages of {point.name} linked")
    coming = [name for name in lineage.plan(point.config) if name not in reused]
    tell(f"{head}reuses {', '.join(reused) or 'nothing'}; runs {', '.join(coming)}")
    try:
      with finished.workdir_lock(workdir):
        pipeline.run(point.config, workdir)
    except StageStopped as error:
      tell(f"{head}{one_line(error)}")
      stopped.append(point.name)
    except Waiting as told:  # the other points ask people meanwhile
      tell(f"{head}{told}")
      waiting.append(point.name)
    # The next point compiles its own programs, most of which the sweep's folder has already.
    jax.clear_caches()
    memory.release_freed_memory()
  if stopped:
    raise UserError(
      f"{len(stopped)} of {len(points)} points were stopped because of their metrics, see above: {', '.join(stopped)}"
    )
  if waiting:
    raise Waiting(
      f"{len(waiting)} of {len(points)} points wait for people, see above: {', '.join(waiting)}"
    )
  return [folder / point.name for point in points]


def _with_caches(point: Point, folder: pathlib.Path) -> Point:
  """The point with the sweep's own cache of tokens, unless the config names one."""
  if point.config.data.token_cache:
    return point
  data = dataclasses.replace(point.config.data, token_cache=str(folder / "cache" / "tokens"))
  return dataclasses.replace(point, config=dataclasses.replace(point.config, data=data))


def _overview(points: Sequence[Point]) -> terminal.Table:
  """What each point reuses and what it trains."""
  rows = []
  for point, reused in zip(points, plan(points), strict=True):
    stages = lineage.plan(point.config)
    names = [name for name in stages if name in reused]
    makers = dict.fromkeys(reused[name] for name in names)
    rows.append(
      [
        point.name,
        f"{', '.join(names)} (of {', '.join(makers)})" if names else "nothing",
        ", ".join(name for name in stages if name not in reused),
      ]
    )
  return terminal.Table(
    columns=["point", "reuses", "runs"],
    rows=rows,
    title=f"a sweep of {len(points)} points",
    prose=["reuses", "runs"],
  )


def is_finished(point: Point, workdir: pathlib.Path) -> bool:
  """Whether all of a point's stages are finished, made with the settings that it has now."""
  if _recorded(workdir) != record(point):
    return False
  stages = lineage.plan(point.config)
  page = workdir / "report" / "index.html"
  is_reported = STAGES[stages[-1]].kind != "evaluate" or page.is_file()
  return is_reported and all(finished.read_done(workdir / name) for name in stages)


def record(point: Point) -> dict[str, str]:
  """What a point's folder says of the settings that each of its stages was made with."""
  last = lineage.plan(point.config)[-1]
  return keys(point.config) | {last: key(point.config, last)}


def _prepare(point: Point, workdir: pathlib.Path) -> list[str]:
  """Puts into a point's folder what another point has finished with the same settings.

  Returns:
    The names of the stages that are finished in the folder now.
  Raises:
    UserError: files cannot be read or written.
  """
  wanted = record(point)
  if jax.process_index() == 0:
    with writing(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      for name, of in keys(point.config).items():
        donor = _donor(workdir, name, of)
        if donor and not (workdir / name).exists():
          _link(donor / name, workdir / name)
      # A stage that is finished keeps the key that it was made with: the pipeline says whether it may be gone on with.
      known = {n: k for n, k in _recorded(workdir).items() if finished.read_done(workdir / n)}
      made = {"values": dict(point.values), "keys": wanted | known}
      scratch = workdir / f"{RECORD}.tmp"
      scratch.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
      os.replace(scratch, workdir / RECORD)
  distributed.meet(f"settings of {point.name} recorded")
  stages = lineage.plan(point.config)
  return [name for name in stages if finished.read_done(workdir / name)]


def _recorded(workdir: pathlib.Path) -> dict[str, str]:
  """What `record` said when the point was last run; {} if it was not, or the file is damaged."""
  try:
    return dict(json.loads((workdir / RECORD).read_text(encoding="utf-8"))["keys"])
  except (OSError, ValueError, TypeError, LookupError):
    return {}


def _donor(workdir: pathlib.Path, name: str, of: str) -> pathlib.Path | None:
  """Another point of the sweep, also of an earlier call, that has finished a folder with this key."""
  for path in sorted(workdir.parent.glob(f"*/{RECORD}")):
    is_other = path.parent != workdir
    if (
      is_other and _recorded(path.parent).get(name) == of and finished.read_done(path.parent / name)
    ):
      return path.parent
  return None


def _link(source: pathlib.Path, target: pathlib.Path):
  """Copies a finished folder; renamed into place, so that it is whole or absent.

  Checkpoints are hard links: their files are written once and never changed, so they take no space, and deleting one
  point leaves the others whole. Everything else is small and may be written again, so it is copied.
  """
  scratch = target.parent / _SCRATCH
  shutil.rmtree(scratch, ignore_errors=True)

  def link_or_copy(old: str, new: str):
    if "checkpoints" in pathlib.Path(old).relative_to(source).parts:
      try:
        os.link(old, new)
        return
      except OSError:  # a file system without hard links
        pass
    shutil.copy2(old, new)

  shutil.copytree(source, scratch, copy_function=link_or_copy)
  os.rename(scratch, target)
