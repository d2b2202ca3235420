"""The command `label training`: registers the reward models of a run with the labeling project that they learned from.

Called by label.py. It reads the run's results; what becomes of them is in labels/trainings.py.
"""

import calendar
import pathlib
import time

from instructjax.core.errors import UserError
from instructjax.core.stages import STAGES
from instructjax.data import label_records, readers
from instructjax.labels import schema, trainings
from instructjax.train import finished
from instructjax.train.finished import Done


def register(place: str, workdir: str, now: float) -> list[str]:
  """Registers each finished reward model of a run, and returns a line on each.

  Args:
    place: the project's folder or URL.
    workdir: the run's folder.
    now: the time.
  Raises:
    UserError: the folder holds no finished reward model, or one was trained on something else than this project.
  """
  folder = pathlib.Path(workdir)
  names = [row.name for row in STAGES.values() if row.kind == "rm"]
  found = {name: done for name in names if (done := finished.read_done(folder / name)) is not None}
  if not found:
    raise UserError(
      f"--workdir={workdir} holds no finished reward model: stage rm has no done.json"
    )
  for stage, done in found.items():
    _require_of(place, stage, done)
  database = schema.open_(place)
  try:
    return [
      _one(database, folder.resolve().name, stage, done, now) for stage, done in found.items()
    ]
  finally:
    database.close()


def _spec(done: Done) -> str:
  source = done.require_provenance().sources.get("comparisons")
  return source.spec if source else ""


def _require_of(place: str, stage: str, done: Done):
  """Checks that a reward model was trained on this project's rankings.

  Raises:
    UserError: it was not.
  """
  spec = _spec(done)
  project = readers.labeling_project(spec)
  if project is None or _whole(project[0]) != _whole(place):
    raise UserError(
      f"stage {stage} was trained on {spec or 'rankings of its own run'}, not on labels:{place}: register it with the"
      " project that its rankings came from"
    )


def _whole(place: str) -> str:
  return place if label_records.is_url(place) else str(pathlib.Path(place).expanduser().resolve())


def _one(database: schema.Database, run: str, stage: str, done: Done, now: float) -> str:
  judged, made = done.result.validation, done.require_provenance()
  reach = 1.96 * judged.accuracy_stderr
  at = calendar.timegm(time.strptime(made.date, "%Y-%m-%dT%H:%M:%SZ"))
  project = readers.labeling_project(_spec(done))
  until = int(project[1].get("until", "0")) if project and STAGES[stage].round == 1 else 0
  new = trainings.Training(
    done.identity,
    f"{run}/{stage}",
    judged.accuracy,
    max(judged.accuracy - reach, 0.0),
    min(judged.accuracy + reach, 1.0),
    judged.pairs,
    float(at),
  )
  agree, is_new = trainings.register(database, new, until, at - made.seconds, now)
  people = "no item was ranked by two labelers"
  if agree.mean is not None:
    people = (
      f"labelers agree on {agree.mean:.3f} of {agree.count} ({agree.low:.3f} to {agree.high:.3f})"
    )
  known = "registered" if is_new else "registered before"
  return (
    f"{new.name}: right on {new.accuracy:.3f} of {new.pairs} held-out pairs ({new.low:.3f} to {new.high:.3f});"
    f" {people}; {known}"
  )
