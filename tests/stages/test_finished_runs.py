"""Reads what a finished run has left; what is no finished run is refused in a line."""

import json

import pytest

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.report import comparison_groups
from instructjax.stages import finished_runs
from instructjax.train import finished
from tests import finished_run

FINDING = {
  "id": "kl_bounded",
  "claim": "c",
  "rule": "r",
  "measured": {"ppo": 2.0},
  "interval": [[1, 3]],
  "holds": True,
}


def write(folder, seed=0, beta=0.02):
  """A run of one reward model and PPO, with an abandoned stage beside it."""
  parts = {
    "rm": ({}, finished_run.reward_model()),
    "ppo": ({"config.ppo": json.dumps({"beta": beta}), "parent:rm": "x"}, results.Nothing()),
    "ppo_ptx": ({"config.ppo": "{}"}, results.Nothing()),
    "evaluate": ({"parent:ppo": "x"}, results.Evaluated({})),
  }
  for stage, (fingerprint, result) in parts.items():
    made_with = {**fingerprint, "config.seed": str(seed)}
    finished.write_done(
      folder / stage, finished.Done(stage, made_with, 1, result, finished_run.MADE)
    )
  (folder / "ppo" / "metrics.jsonl").write_text('{"step": 1, "kl": 0.5, "reward": 1.0}\n')
  (folder / "evaluate" / "results.json").write_text(
    json.dumps({"policies": {"ppo": {"kl": 2.0}}, "best_of_n": []})
  )
  (folder / "report").mkdir()
  (folder / "report" / "findings.json").write_text(json.dumps([FINDING]))
  return folder


def test_a_run_is_what_was_judged(tmp_path):
  (run,) = finished_runs.read_all([write(tmp_path / "demo", seed=3)])
  assert (run.name, run.seed) == ("demo", 3)
  assert run.settings == {("ppo", "ppo.beta"): "0.02"}
  assert list(run.made) == ["rm", "ppo", "evaluate"]  # ppo_ptx is left from another command
  assert run.curves == {"ppo": [{"step": 1, "kl": 0.5, "reward": 1.0}]}
  assert run.reward_std == 1.0 and run.policies == {"ppo": {"kl": 2.0}}
  assert run.findings == [FINDING]


def test_names_tell_runs_apart(tmp_path):
  folders = [write(tmp_path / beta / "demo", beta=float(beta)) for beta in ("0.1", "0.2")]
  listed = finished_runs.read_all(folders)
  assert [run.name for run in listed] == ["0.1/demo", "0.2/demo"]
  assert [group.label for group in comparison_groups.groups(listed)] == [
    "ppo.beta=0.1",
    "ppo.beta=0.2",
  ]


def test_what_a_sweep_changes_by_rounding_only_tells_its_points_apart(tmp_path):
  folders = [write(tmp_path / remat) for remat in ("none", "full")]
  for folder in folders:
    values = {"seed": 0, "execution.remat": folder.name, "ppo.beta": 0.02}
    (folder / "point.json").write_text(json.dumps({"values": values, "keys": {}}))
  found = comparison_groups.groups(finished_runs.read_all(folders))
  assert [group.label for group in found] == ["execution.remat=none", "execution.remat=full"]


def test_what_is_no_finished_run_is_refused(tmp_path):
  with pytest.raises(UserError, match="is no folder: give the --workdir of a finished run"):
    finished_runs.read_all([tmp_path / "none"])
  with pytest.raises(UserError, match="is no finished run: it has no evaluate/done.json"):
    finished_runs.read_all([tmp_path])
  folder = write(tmp_path / "demo")
  with pytest.raises(UserError, match="is given twice"):
    finished_runs.read_all([folder, tmp_path / "." / "demo"])
  findings = folder / "report" / "findings.json"
  for text, message in (
    ("[", "findings.json must be JSON"),
    ('[{"id": 1}]', "not as this version writes it"),
    ("7", "not as this version writes it"),
  ):
    findings.write_text(text)
    with pytest.raises(UserError, match=message) as error:
      finished_runs.read_all([folder])
    assert "\n" not in str(error.value)
  findings.unlink()
  with pytest.raises(UserError, match="findings.json"):
    finished_runs.read_all([folder])
