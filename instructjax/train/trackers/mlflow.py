"""MLflow, the extra `mlflow`: one MLflow run for a run of the main job. Called by `tracking`."""

import importlib
import logging
import os
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

from instructjax.train.trackers import Ledger, Run, Status, TableRows

_MOST_PARAMS, _LONGEST_PARAM = 100, 6000  # MLflow's limits on a request and on a value
_MOST_METRICS = 1000
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def create(run: Run, before: Ledger | None) -> "Mlflow":
  """Creates the run, or goes on with the one that the ledger names.

  Where the data go is MLflow's own configuration (MLFLOW_TRACKING_URI, otherwise mlflow.db in the working directory),
  unless `run.offline` keeps them in the workdir.

  Raises:
    Exception: whatever MLflow raises, as without a network.
  """
  # Unless its user wants it: statistics of MLflow's use go to its makers otherwise.
  os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
  os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `where` says it
  mlflow = importlib.import_module("mlflow")
  for name in ("mlflow", "alembic"):  # which tell each step of making a database
    logging.getLogger(name).setLevel(logging.WARNING)
  uri = f"sqlite:///{run.workdir}/mlflow.db" if run.offline else mlflow.get_tracking_uri()
  # Of a local file the whole path: a run that goes on may do so from another folder.
  uri = re.sub(r"^sqlite:///(.+)", lambda m: f"sqlite:///{os.path.abspath(m[1])}", uri)
  client = mlflow.MlflowClient(tracking_uri=uri)
  name = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "instructjax"
  place = f"{_without_password(uri)}, experiment {name}"
  if before and before.place == place:
    client.update_run(before.id, status="RUNNING")
    info = client.get_run(before.id).info
    # A call returns when its data have arrived.
    result = Mlflow(mlflow, client, info, place, len(before.rows))
  else:
    artifacts = (run.workdir.absolute() / "mlartifacts").as_uri() if run.offline else None
    experiment = _experiment(client, name, artifacts)
    info = client.create_run(experiment, run_name=run.name).info
    result = Mlflow(mlflow, client, info, place, 0)
    result.log_params(run.config)
  client.log_dict(result.id, dict(run.config), "config.json")  # that of the last process, and whole
  return result


def _experiment(client, name: str, artifacts: str | None) -> str:
  """The id of the experiment, which is made if there is none."""
  found = client.get_experiment_by_name(name)
  return (
    found.experiment_id if found else client.create_experiment(name, artifact_location=artifacts)
  )


def _without_password(uri: str) -> str:
  """The URI as it may be shown: without a user's name and password."""
  return re.sub(r"(?<=://)[^/]*@", "", uri)


class Mlflow:
  """An MLflow run. Metrics are STAGE/NAME, and each stage counts its own steps."""

  def __init__(self, mlflow, client, info, place: str, received: int):
    self._entities, self._client = mlflow.entities, client
    self.id, self.place, self.received = info.run_id, place, received
    self._experiment = info.experiment_id

  @property
  def where(self) -> str:
    server = self.place.partition(",")[0]
    if server.startswith("http"):
      return f"{server.rstrip('/')}/#/experiments/{self._experiment}/runs/{self.id}"
    return f"{self.place}, run {self.id}"

  def log_params(self, config: Mapping[str, Any]):
    """Logs the config as parameters, which MLflow never changes."""
    params = [self._entities.Param(name, value) for name, value in flat(config).items()]
    for i in range(0, len(params), _MOST_PARAMS):
      self._client.log_batch(self.id, params=params[i : i + _MOST_PARAMS])

  def begin(self, stage: str, directory: pathlib.Path, start: int):
    """Nothing: a stage is known by its first metrics."""

  def log(self, stage: str, step: int, metrics: Mapping[str, float], rows: TableRows):
    """Logs the metrics, and samples as an artifact in the form of MLflow's tables."""
    self._log_metrics({f"{stage}/{name}": value for name, value in metrics.items()}, step)
    if rows:
      self._log_table(f"{stage}/samples/{step:08}", rows)

  def report(self, numbers: Mapping[str, float], tables: Mapping[str, TableRows]):
    """Logs numbers as metrics of step 0, as far as they are new, and tables as artifacts."""
    known = self._client.get_run(self.id).data.metrics
    new = {n: value for n, value in numbers.items() if known.get(allowed(n)) != value}
    self._log_metrics(new, 0)
    for name, rows in tables.items():
      self._log_table(name, rows)

  def close(self, status: Status):
    self._client.set_terminated(self.id, status=_STATUS[status])

  def _log_metrics(self, values: Mapping[str, float], step: int):
    now = int(time.time() * 1000)
    metrics = [self._entities.Metric(allowed(n), value, now, step) for n, value in values.items()]
    for i in range(0, len(metrics), _MOST_METRICS):
      self._client.log_batch(self.id, metrics=metrics[i : i + _MOST_METRICS])

  def _log_table(self, name: str, rows: TableRows):
    table = {"columns": [*rows[0]], "data": [[*row.values()] for row in rows]}
    self._client.log_dict(self.id, table, f"{allowed(name)}.json")


def flat(config: Mapping[str, Any], where: str = "") -> dict[str, str]:
  """The values of a nested config by dotted name, as texts that MLflow takes."""
  result = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      result |= flat(value, f"{where}{name}.")
    else:
      result[where + name] = str(value)[:_LONGEST_PARAM]
  return result


def allowed(name: str) -> str:
  """A name with only the characters that MLflow allows."""
  return re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII)
