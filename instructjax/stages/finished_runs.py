"""Reads what finished runs have left in their folders, for a comparison of several. Called by compare.py and sweeps."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from instructjax.core import places
from instructjax.core.errors import UserError
from instructjax.core.foreign import JSON_BYTES, parse_json, read_text
from instructjax.core.stages import RL_STAGES, STAGES, stage_of_kind
from instructjax.report.comparison_groups import Run, settings_of
from instructjax.stages.sweep_points import RECORD
from instructjax.train import finished
from instructjax.train.metrics import read_metrics


def read_all(paths: Sequence[str | pathlib.Path]) -> list[Run]:
  """The runs in these folders, under names that tell them apart.

  Raises:
    UserError: one is no finished run or cannot be read, or one is named twice.
  """
  folders = [pathlib.Path(places.require(str(path), "RUN")) for path in paths]
  known: dict[pathlib.Path, pathlib.Path] = {}
  for folder in folders:
    if folder.resolve() in known:
      raise UserError(f"{folder} is given twice: copies of a run are no error bars")
    known[folder.resolve()] = folder
  return [read(folder, name) for folder, name in zip(folders, _names(list(known)), strict=True)]


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
  """The last parts of the paths, as many as are needed to tell them apart."""
  for count in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
    names = ["/".join(folder.parts[-count:]) for folder in folders]
    if len(set(names)) == len(names):
      return names
  return [str(folder) for folder in folders]


def read(folder: pathlib.Path, name: str) -> Run:
  """What a finished run has left.

  Raises:
    UserError: it is not finished, or a file is damaged or of another version.
  """
  if not folder.is_dir():
    raise UserError(f"{folder} is no folder: give the --workdir of a finished run")
  evaluate = stage_of_kind("evaluate").name
  dones = {stage: done for stage in STAGES if (done := finished.read_done(folder / stage))}
  if evaluate not in dones:
    raise UserError(
      f"{folder} is no finished run: it has no {evaluate}/{finished.DONE}; run the main job to its end first"
    )
  made = dones[evaluate].require_provenance()
  # Stages of earlier commands may lie there too, which were not judged.
  parents = _line(dones, evaluate)
  dones = {stage: done for stage, done in dones.items() if stage in parents}
  fingerprints = {stage: done.fingerprint for stage, done in dones.items()}
  if tokenizer := finished.read_done(folder / finished.TOKENIZER):
    fingerprints[finished.TOKENIZER] = tokenizer.fingerprint
  seed = dones[evaluate].fingerprint.get("config.seed", "0")
  path = folder / evaluate / "results.json"
  results = parse_json(read_text(path, JSON_BYTES), str(path))
  findings = folder / "report" / "findings.json"
  # The reader takes an object, and the file holds a list.
  listed = parse_json(f'{{"findings": {read_text(findings, JSON_BYTES)}}}', str(findings))
  judged = [dones[stage] for stage in dones if STAGES[stage].kind == "rm"][:1]
  validation = judged[0].result.validation if judged else None
  logs = {stage: read_metrics(folder / stage) for stage in dones}
  try:
    return Run(
      name=name,
      seed=int(seed),
      settings=_swept(folder, settings_of(fingerprints)),
      findings=_findings(listed["findings"]),
      policies={policy: dict(row) for policy, row in results["policies"].items()},
      best_of_n=[dict(row) for row in results["best_of_n"]],
      reward_std=validation.score_std if validation else None,
      curves={
        STAGES[stage].require_policy().name: logs[stage] for stage in RL_STAGES if stage in dones
      },
      logs=logs,
      made={stage: done.provenance or made for stage, done in dones.items()},
    )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f"{folder}: {path.name} or {findings.name} is not as this version writes it; delete {folder / evaluate} and run"
      " the main job again"
    ) from error


def _line(dones: dict[str, finished.Done], last: str) -> list[str]:
  """A stage and all that it comes from, by the fingerprints."""
  needed = [last]
  for name in needed:  # the list grows meanwhile
    for part in dones[name].fingerprint if name in dones else ():
      parent = part.removeprefix("parent:")
      if parent != part and parent not in needed and parent in STAGES:
        needed.append(parent)
  return needed


def _swept(folder: pathlib.Path, settings: dict[tuple[str, str], str]) -> dict:
  """The settings of a run, and those values of a point of a sweep that change its numbers by rounding only."""
  path = folder / RECORD
  if not path.is_file():
    return settings
  values = parse_json(read_text(path, JSON_BYTES), str(path)).get("values")
  known = {field for _, field in settings} | {"seed"}
  swept = values if isinstance(values, dict) else {}
  return settings | {
    (stage_of_kind("evaluate").name, field): json.dumps(value)
    for field, value in swept.items()
    if field not in known
  }


def _findings(rows: Any) -> list[dict]:
  """The findings, each with the keys that a comparison reads."""
  keys = ("id", "claim", "rule", "measured", "interval", "holds")
  return [{key: row[key] for key in keys} for row in rows]
