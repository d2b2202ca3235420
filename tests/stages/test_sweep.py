"""A sweep trains once what its fields do not touch, goes on where it was, and links only what is the same."""

import json
import shutil

import pytest

from instructjax.core import results
from instructjax.core.errors import StageStopped, UserError, Waiting
from instructjax.core.stages import STAGES
from instructjax.stages import lineage, pipeline, sweep, sweep_points
from instructjax.train import finished
from tests import finished_run, micro

SPECS = {
  kind: f"jsonl:{kind}" for kind in ("documents", "demonstrations", "comparisons", "prompts")
}


def points(*sweeps, seeds=None, stage="ppo_ptx"):
  base = micro.config_dict(stage, SPECS)
  base.evaluate.compare = ("ppo",)
  return sweep_points.points(sweeps, seeds, base.to_dict())


@pytest.mark.parametrize(
  ("field", "shared"),
  [
    ("ppo.beta=0,.05", {"pretrain", "sft", "rm", "sft_select", "ppo_init"}),
    (
      "ppo.gamma=0,1",
      {"pretrain", "sft", "rm", "sft_select", "ppo_init", "ppo"},
    ),  # PPO has gamma = 0
    ("rm.num_epochs=1,2", {"pretrain", "sft", "ppo_init"}),
    ("ppo_init.dropout=0,.2", {"pretrain", "sft", "rm", "sft_select"}),
    ("pretrain.num_steps=4,6", set()),
    ("execution.remat=none,full", set()),  # the same numbers but for rounding, and another time
    ("data.demonstrations=jsonl:a,jsonl:b", {"pretrain"}),
    ("evaluate.num_prompts=4,8", {"pretrain", "sft", "rm", "ppo_init", "ppo", "ppo_ptx"}),
  ],
)
def test_what_a_field_does_not_touch_is_shared(field, shared):
  first, second = sweep.plan(points(field))
  assert first == {}
  assert second.keys() - {finished.TOKENIZER} == shared


def test_points_of_other_seeds_share_nothing_but_a_given_tokenizer():
  assert sweep.plan(points(seeds="0,1"))[1] == {}
  base = micro.config_dict("ppo_ptx", SPECS)
  base.tokenizer.path = "somewhere"
  given = sweep_points.points([], "0,1", base.to_dict())
  assert sweep.plan(given)[1] == {finished.TOKENIZER: "seed_0"}


@pytest.fixture
def fake(monkeypatch):
  """Stages that do nothing but finish, with a fingerprint of their settings; returns what has been trained."""
  trained = []

  def run(config, workdir):
    for name in [finished.TOKENIZER, *lineage.plan(config)]:
      folder = workdir / name
      if finished.read_done(folder):
        continue
      if config.seed in run.waits:
        raise Waiting("rank 3 items")
      if (config.seed, name) in run.stops:
        raise StageStopped(f"{name}: loss is nan")
      trained.append((workdir.name, name))
      (folder / "checkpoints").mkdir(parents=True)
      (folder / "checkpoints" / "weights").write_text(name)
      (folder / "metrics.jsonl").write_text("{}\n")
      result = RESULTS[STAGES[name].result] if name in STAGES else results.Nothing()
      finished.write_done(folder, finished.Done(name, {}, 1, result, finished_run.MADE))
    (workdir / "report").mkdir(exist_ok=True)
    (workdir / "report" / "index.html").write_text("")

  run.stops, run.waits, run.trained = set(), set(), trained
  monkeypatch.setattr(pipeline, "run", run)
  monkeypatch.setattr(pipeline, "require_possible", lambda config, workdir: None)
  return run


RESULTS = {
  results.Nothing: results.Nothing(),
  results.Pretrained: results.Pretrained(1.0),
  results.Tuned: results.Tuned(()),
  results.Selected: results.Selected(()),
  results.RewardModel: finished_run.reward_model(),
  results.Evaluated: results.Evaluated({}),
}
BETAS = ("ppo.beta=0,.05",)


def test_shared_stages_are_trained_once_and_stay_when_a_point_is_deleted(fake, tmp_path, capsys):
  first, second = sweep.run(points(*BETAS), tmp_path)
  twice = [name for folder, name in fake.trained if folder == second.name]
  assert twice == ["ppo", "ppo_ptx", "evaluate"]
  told = capsys.readouterr().out
  assert (
    f"point 2/2 {second.name}: reuses pretrain, sft, rm, sft_select, ppo_init; runs ppo," in told
  )
  weights = [folder / "sft" / "checkpoints" / "weights" for folder in (first, second)]
  assert weights[0].stat().st_ino == weights[1].stat().st_ino
  # What may be written again is each point's own.
  logs = [folder / "sft" / "metrics.jsonl" for folder in (first, second)]
  assert logs[0].stat().st_ino != logs[1].stat().st_ino
  shutil.rmtree(first)
  assert weights[1].read_text() == "sft"
  # And what was deleted comes back, out of the other point.
  fake.trained.clear()
  sweep.run(points(*BETAS), tmp_path)
  assert [name for _, name in fake.trained] == ["ppo", "ppo_ptx", "evaluate"]


def test_a_finished_sweep_runs_nothing_and_a_longer_one_only_what_is_new(fake, tmp_path, capsys):
  sweep.run(points(*BETAS), tmp_path)
  fake.trained.clear()
  sweep.run(points(*BETAS), tmp_path)
  assert fake.trained == []
  assert capsys.readouterr().out.count("finished already") == 2
  sweep.run(points("ppo.beta=.2"), tmp_path)
  assert fake.trained == [("ppo.beta_0.2", name) for name in ("ppo", "ppo_ptx", "evaluate")]


def test_a_stage_of_other_settings_is_not_linked(fake, tmp_path):
  first, _ = sweep.run(points(*BETAS), tmp_path)
  record = first / sweep_points.RECORD
  made = json.loads(record.read_text())
  assert made["values"] == {"ppo.beta": 0}
  made["keys"]["sft"] = "other"
  record.write_text(json.dumps(made))
  other = tmp_path / "ppo.beta_0.05"
  shutil.rmtree(other)
  fake.trained.clear()
  sweep.run(points("ppo.beta=.05"), tmp_path)
  assert ("ppo.beta_0.05", "sft") in fake.trained
  assert ("ppo.beta_0.05", "pretrain") not in fake.trained


def test_a_file_system_without_hard_links_gets_copies(fake, tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError("no links here")

  monkeypatch.setattr(sweep.os, "link", refuse)
  first, second = sweep.run(points(*BETAS), tmp_path)
  weights = [folder / "sft" / "checkpoints" / "weights" for folder in (first, second)]
  assert weights[1].read_text() == "sft"
  assert weights[0].stat().st_ino != weights[1].stat().st_ino


def test_what_was_left_of_a_killed_copy_is_no_stage(fake, tmp_path):
  first, second = sweep.run(points(*BETAS), tmp_path)
  shutil.rmtree(second)
  half = second / sweep._SCRATCH
  half.mkdir(parents=True)
  (half / "half").write_text("")
  sweep.run(points(*BETAS), tmp_path)
  assert not list(second.rglob("half")) and finished.read_done(second / "sft")


def test_a_point_that_diverges_does_not_stop_the_others(fake, tmp_path, capsys):
  fake.stops.add((1, "sft"))
  with pytest.raises(UserError, match="1 of 3 points were stopped .*: seed_1$"):
    sweep.run(points(seeds="0,1,2"), tmp_path)
  assert "point 2/3 seed_1: sft: loss is nan" in capsys.readouterr().out
  assert finished.read_done(tmp_path / "seed_2" / "ppo_ptx")


def test_a_point_that_waits_for_people_does_not_keep_the_others_from_asking(fake, tmp_path, capsys):
  fake.waits.add(0)
  with pytest.raises(Waiting, match="1 of 2 points wait for people, see above: seed_0$"):
    sweep.run(points(seeds="0,1"), tmp_path)
  assert "seed_0: rank 3 items" in capsys.readouterr().out
  assert ("seed_1", "evaluate") in fake.trained


def test_nothing_is_trained_if_one_point_cannot_run(fake, tmp_path, monkeypatch):
  def require(config, workdir):
    if config.ppo.beta:
      raise UserError("it does not fit")

  monkeypatch.setattr(pipeline, "require_possible", require)
  with pytest.raises(UserError, match="point ppo.beta_0.05: it does not fit"):
    sweep.run(points(*BETAS), tmp_path)
  assert fake.trained == []


def test_the_folder_of_a_run_is_no_sweep(fake, tmp_path):
  (tmp_path / "tokenizer").mkdir()
  with pytest.raises(UserError, match="holds a run, not a sweep"):
    sweep.run(points(*BETAS), tmp_path)


def test_a_real_sweep_has_the_fingerprints_that_the_pipeline_asks_for(tmp_path, capsys):
  base = micro.config_dict("sft", micro.write_data(tmp_path / "data"))
  listed = sweep_points.points(["sft.dropout=0,.1"], None, base.to_dict())
  with micro.one_device():
    first, second = sweep.run(listed, tmp_path / "sweep")
  dones = [finished.read_done(folder / "pretrain") for folder in (first, second)]
  assert dones[0] == dones[1]
  assert (first / "sft" / "metrics.jsonl").read_text() != (
    second / "sft" / "metrics.jsonl"
  ).read_text()
  assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("pretrain 4/4")][
    1:
  ] == []
