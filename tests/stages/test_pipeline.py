"""The whole pipeline at the smallest size: from files to the report, twice, interrupted, refused."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax._src import compilation_cache

import instructjax
from configs import base
from configs import weights as weights_settings
from instructjax.commands import weights_preset
from instructjax.core import results
from instructjax.core.config import from_config_dict
from instructjax.core.errors import StageStopped, UserError
from instructjax.core.provenance import Source
from instructjax.core.stages import STAGES
from instructjax.data import demo, sources
from instructjax.parallel import sharding
from instructjax.rl import scoring
from instructjax.serve import packaging
from instructjax.stages import (
  answers,
  best_of_n,
  collect,
  evaluate,
  pipeline,
  policies,
  ranking_accuracy,
  reward_functions,
  rm,
)
from instructjax.train import damaged, finished, metrics, profiling, supervised
from instructjax.train.tracking import Tracking, Worker
from tests import finished_run, micro

ROOT = pathlib.Path(__file__).parents[2]
TRAINED = ("pretrain", "sft", "rm", "ppo_init", "ppo", "ppo_ptx")
KILL_STEP = 3  # after the checkpoint of step 2


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
  """Stages run many times over here: what XLA made of a program is kept for the module."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
  return micro.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, specs):
  """The workdir of a finished run of `ppo_ptx` compared with `ppo`, step 2 of each stage traced.

  What it printed lies beside it, in a file of its name with `.txt`, and what its tracker was told with `.json`.
  """
  workdir = tmp_path_factory.mktemp("whole")
  calls = []
  sender = types.SimpleNamespace(
    **{
      name: lambda *args, name=name: calls.append((name, *args))
      for name in ("begin", "log", "report", "close")
    }
  )
  tracked = Tracking([Worker("fake", lambda tell: sender, is_final=True)])
  with micro.one_device(), open(workdir.with_suffix(".txt"), "w") as printed:
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
      patch.setattr(pipeline.tracking, "open_run", lambda config, workdir: tracked)
      pipeline.run(config(specs, profile__steps="2:3"), workdir)
  workdir.with_suffix(".json").write_text(json.dumps(calls, default=str))
  return workdir


def config(specs, stage="ppo_ptx", **changes):
  return micro.config(stage, specs, **({"evaluate__compare": ("ppo",)} | changes))


def copy_without(whole, folder, *stages):
  """A copy of the finished run that lacks these stages."""
  shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*stages, ".lock"))
  return folder


def context(config, workdir):
  with micro.one_device():
    return pipeline.make_context(config, workdir)


def run_stage(config, workdir, stage):
  ctx = context(config, workdir)
  with jax.set_mesh(ctx.mesh):
    pipeline.module(stage).run(ctx, stage)


def last_checkpoint(directory):
  """Everything in the newest checkpoint: bytes of the state by name, position in the data, meta."""
  step = damaged.saved_steps(directory)[-1]
  folder = (directory / "checkpoints" / str(step)).absolute()
  with ocp.PyTreeCheckpointer() as checkpointer:
    saved = checkpointer.metadata(folder / "state").item_metadata.tree
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=device), saved)
    state = checkpointer.restore(folder / "state", restore_args=args)
  is_key = lambda leaf: jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  plain = lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
  arrays = {
    jax.tree_util.keystr(path): plain(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  files = [(folder / part / "metadata").read_text() for part in ("data", "meta")]
  return {name: array.tobytes() for name, array in arrays.items()}, [json.loads(f) for f in files]


def records(directory):
  """metrics.jsonl without what a clock says."""
  return [
    {k: v for k, v in r.items() if not k.startswith(metrics.MEASURED)}
    for r in metrics.read_metrics(directory)
  ]


def files_of(folder):
  return {
    str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
    for path in folder.rglob("*")
    if path.is_file()
  }


# --- the whole run --------------------------------------------------------------------------------


def test_from_files_to_the_report(whole):
  found = json.loads((whole / "report" / "findings.json").read_text())
  assert {"rl_over_sft", "alignment_tax", "reward_model"} <= {row["id"] for row in found}
  page = (whole / "report" / "index.html").read_text()
  assert "PPO-ptx" in page and "</html>" in page
  lines = (whole / "evaluate" / "answers.jsonl").read_text().splitlines()
  answers = [json.loads(line) for line in lines]
  assert len(answers) == 8
  assert set(answers[0]["answers"]) == {"base", "sft", "ppo_init", "ppo", "ppo_ptx"}
  for stage in TRAINED:
    done = finished.read_done(whole / stage)
    assert done.step in damaged.saved_steps(whole / stage), stage


def test_trackers_get_every_step_every_result_and_the_findings(whole):
  calls = json.loads(whole.with_suffix(".json").read_text())
  trained = ["pretrain", "sft", "rm", "ppo_init", "ppo", "ppo_ptx"]
  logged = [call[1:] for call in calls if call[0] == "log"]
  assert [stage for stage, *_ in logged] == [
    stage for stage in trained for _ in metrics.read_metrics(whole / stage)
  ]
  for stage in trained:
    lines = [{"step": step, **line} for name, step, line, _ in logged if name == stage]
    assert lines == metrics.read_metrics(whole / stage)
  for stage, _, _, rows in logged:
    assert [set(row) for row in rows] == [
      {"prompt", "answer", "score", "kl"} for _ in rows
    ] and bool(rows) == (stage in ("ppo", "ppo_ptx"))
  numbers, tables = {}, {}
  for _, some, more in (call for call in calls if call[0] == "report"):
    numbers |= some
    tables |= more
  rm = json.loads((whole / "rm/done.json").read_text())["result"]
  assert numbers["rm/validation/accuracy"] == rm["validation"]["accuracy"]
  summary = json.loads((whole / "evaluate/results.json").read_text())["policies"]
  assert numbers["evaluate/summary/ppo_ptx/reward"] == summary["ppo_ptx"]["reward"]
  found = json.loads((whole / "report/findings.json").read_text())
  for finding in found:
    # Whether it holds is no number if it cannot be told.
    assert numbers.get(f"evaluate/findings/{finding['id']}/holds") == finding["holds"]
  assert [row["finding"] for row in tables["evaluate/findings"]] == [row["id"] for row in found]
  answers = [
    json.loads(line) for line in (whole / "evaluate/answers.jsonl").read_text().splitlines()
  ]
  assert tables["evaluate/answers"] == [{"prompt": r["prompt"], **r["answers"]} for r in answers]
  assert calls[-1] == ["close", "finished"]


def test_every_stage_says_where_it_comes_from(whole, specs):
  for stage in (*TRAINED, "evaluate"):
    made = finished.read_done(whole / stage).provenance
    assert set(made.sources) == set(STAGES[stage].reads), stage
    for kind, source in made.sources.items():
      content = pathlib.Path(specs[kind].removeprefix("jsonl:")).read_bytes()
      assert source == Source(specs[kind], f"sha256:{hashlib.sha256(content).hexdigest()}")
    assert made.version == instructjax.__version__ and made.hardware.num_processes == 1
    assert 0 < made.seconds < 600
  page = (whole / "report" / "index.html").read_text()
  for stage in TRAINED:
    assert f"<td>{stage}</td><td>{finished.read_done(whole / stage).provenance.date}</td>" in page
  for spec in specs.values():  # comparisons too, which evaluation does not read
    assert spec in page


def test_the_end_says_where_the_time_went(whole):
  """By stage, and for the steps traced by phase: those of the stage, and no others."""
  printed = whole.with_suffix(".txt").read_text()
  for stage in (*TRAINED, "evaluate"):
    assert re.search(rf"^│ {stage} +│ +\d", printed, re.MULTILINE), stage
  supervised = {"gradient", "optimizer"}
  for stage in TRAINED:
    assert f"{stage}: mean of steps 2 to 2 on " in printed
    summary = json.loads((whole / stage / "profile" / "summary.json").read_text())
    phases = {*profiling.PHASES} - supervised if stage.startswith("ppo") else supervised
    phases -= {"update/ptx"} if stage == "ppo" else set()
    phases = supervised if stage == "ppo_init" else phases
    assert {*summary["phases"]} - {profiling.OTHER, profiling.IDLE} == phases, stage
    assert summary["tokens_per_second"] > 0 < summary["model_flops_per_second"]


def test_a_stage_without_the_steps_to_trace_says_so(specs, tmp_path, capsys):
  with micro.one_device():
    pipeline.run(config(specs, "pretrain", profile__steps="5:7"), tmp_path)
  assert (
    "pretrain: it took none of the steps 5:7, so that none was traced" in capsys.readouterr().out
  )
  assert not (tmp_path / "pretrain" / "profile").exists()


def test_again_does_nothing_twice(whole, specs):
  before, released = files_of(whole), []
  release = mock.patch.object(pipeline.memory, "release_freed_memory", lambda: released.append(1))
  with micro.one_device(), release:
    pipeline.run(config(specs), whole)
  assert files_of(whole) == before
  assert not released  # which costs seconds where there is nothing to release


def test_stages_of_other_versions_are_named_in_one_line(whole, specs, tmp_path, capsys):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  mine = f'"jax": "{jax.__version__}"'
  finished_run.change_done(tmp_path / "sft", mine, mine.replace(jax.__version__, "0.9.1"))
  with micro.one_device():
    pipeline.run(config(specs, stage="sft"), tmp_path)
  told = [line for line in capsys.readouterr().out.splitlines() if "other versions" in line]
  assert told == [
    f"sft: finished under other versions than this run's jax {jax.__version__} (was 0.9.1); used as they are"
  ]


def test_other_policies_and_settings_are_judged_anew(whole, specs, tmp_path):
  """An evaluation trains nothing, so that a sibling of the target needs no other workdir."""
  workdir = copy_without(whole, tmp_path / "run", "ppo", "report")
  with micro.one_device():
    pipeline.run(config(specs, evaluate__compare=(), evaluate__num_prompts=4), workdir)
  summary = finished.read_done(workdir / "evaluate").result.summary
  needs_no_training = {"echo", "random_line", "demonstrations"}
  assert summary.keys() == {"base", "sft", "ppo_init", "ppo_ptx"} | needs_no_training
  assert len((workdir / "evaluate" / "answers.jsonl").read_text().splitlines()) == 4
  assert (workdir / "report" / "index.html").is_file()


def test_checkpoints_of_a_run_are_measured_on_the_test_prompts(whole, specs, tmp_path, capsys):
  """`ppo` is trained anew and keeps them. `ppo_ptx` was trained without: one of its steps is there by chance."""
  workdir = copy_without(whole, tmp_path / "run", "ppo", "evaluate", "report")
  cfg = config(specs, evaluate__checkpoints=3, checkpoint__keep=1)
  with micro.one_device():
    pipeline.run(cfg, workdir)
  assert damaged.saved_steps(workdir / "ppo") == [1, 2, 3, 4]
  assert last_checkpoint(workdir / "ppo")[0] == last_checkpoint(whole / "ppo")[0]
  assert files_of(workdir / "ppo_ptx") == files_of(whole / "ppo_ptx")
  told = [line for line in capsys.readouterr().out.splitlines() if "not kept" in line]
  assert len(told) == 1 and told[0].endswith(": ppo_ptx: 1, 3")
  # What is measured without checkpoints is measured as ever.
  for name in ("answers.jsonl", "scores.jsonl"):
    assert (workdir / "evaluate" / name).read_bytes() == (whole / "evaluate" / name).read_bytes()
  assert not (whole / "evaluate" / "checkpoints.jsonl").exists()
  lines = (workdir / "evaluate" / "checkpoints.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  by_step = {}
  for row in rows:
    by_step.setdefault((row["policy"], row["step"]), []).append(row)
  assert [*by_step] == [("ppo", 1), ("ppo", 2), ("ppo", 3), ("ppo_ptx", 2)]
  equal = json.loads((workdir / "evaluate" / "results.json").read_text())["equal_kl"]
  assert equal["curves"] == "checkpoints"
  assert [point["step"] for point in equal["methods"]["ppo"]["checkpoints"]] == [1, 2, 3]
  kl = np.mean([row["scores"]["kl"] for row in by_step["ppo", 2]])
  assert equal["methods"]["ppo"]["checkpoints"][1]["kl"] == pytest.approx(kl)
  # They are of the averaged weights of their step, as those of the end are.
  ctx = context(cfg, workdir)
  with jax.set_mesh(ctx.mesh):
    params = policies.load_step(ctx, "ppo", 2, "ema_params")
    prompts = [row["prompt"] for row in by_step["ppo", 2]]
    tokens, key = (
      [ctx.tokenizer.encode(prompt) for prompt in prompts],
      ctx.key("evaluate/step_2/ppo"),
    )
    sampled = answers.sample(ctx, ctx.model("policy"), params, tokens, key, temperature=1.0)
    assert [row["answer"] for row in by_step["ppo", 2]] == sampled.text
    kls = [
      answers.logprob(ctx, ctx.model("policy"), weights, sampled, 1.0)
      for weights in (params, policies.load(ctx, "ppo_init"))
    ]
  # A checkpoint's KL is that of its own answers.
  np.testing.assert_allclose(kl, np.mean(kls[0] - kls[1]), rtol=1e-5)


def test_a_report_that_was_deleted_is_made_again(whole, specs, tmp_path):
  workdir = copy_without(whole, tmp_path / "run", "report")
  run_stage(config(specs), workdir, "evaluate")
  found = [(folder / "report" / "findings.json").read_bytes() for folder in (workdir, whole)]
  assert found[0] == found[1] and (workdir / "report" / "index.html").is_file()


def test_without_an_average_the_policy_itself_is_judged(whole, specs, tmp_path):
  workdir = copy_without(whole, tmp_path / "run", "ppo", "ppo_ptx", "evaluate", "report")
  changed = config(specs, ppo__ema_decay=0.0)
  assert changed.evaluate.weights == "ema"
  with micro.one_device():
    pipeline.run(changed, workdir)
  got, expected = (last_checkpoint(folder / "ppo")[0] for folder in (workdir, whole))
  assert got.keys() == {name for name in expected if not name.startswith("['ema_params']")}
  assert "ppo" in finished.read_done(workdir / "evaluate").result.summary


def test_the_sft_epoch_is_chosen_by_reward(whole):
  chosen = finished.read_done(whole / "sft_select")
  epochs = chosen.result.epochs
  assert len(epochs) == 2
  assert chosen.step == max(epochs, key=lambda e: e.reward).step
  assert finished.read_done(whole / "sft").step == min(epochs, key=lambda e: e.validation_loss).step


def test_the_base_is_the_step_with_the_lowest_held_out_loss(specs, tmp_path):
  """Text learnt by heart: it is not the last. What starts from the base starts from that step."""
  scripted = iter([3.0, 1.0, 1.0, 2.0])
  cfg = config(specs, "pretrain", pretrain__evaluate_every=1, checkpoint__keep=1)
  with (
    micro.one_device(),
    mock.patch.object(supervised, "make_lm_evaluation", lambda *_: lambda *_: next(scripted)),
  ):
    pipeline.run(cfg, tmp_path)
  done = finished.read_done(tmp_path / "pretrain")
  assert (done.step, done.result.validation_loss) == (2, 1.0)
  assert damaged.saved_steps(tmp_path / "pretrain") == [2, 4]
  ctx = context(cfg, tmp_path)
  base, best, last = (
    jax.tree.leaves(params)
    for params in (
      policies.load(ctx, "base"),
      *(policies.load_step(ctx, "pretrain", s) for s in (2, 4)),
    )
  )
  assert all(np.array_equal(a, b) for a, b in zip(base, best, strict=True))
  assert not any(np.array_equal(a, b) for a, b in zip(base, last, strict=True))


def test_demonstrations_score_zero_on_average(whole, specs):
  ctx = context(config(specs), whole)
  with jax.set_mesh(ctx.mesh):
    assert rm.demonstration_mean(ctx, policies.load_reward(ctx)) == pytest.approx(0, abs=1e-5)


# --- interrupted ----------------------------------------------------------------------------------


class Interrupted(Exception):
  pass


@contextlib.contextmanager
def interrupted_at(step):
  """Fails as the numbers of this step are about to be written."""
  write = metrics.MetricsWriter.write

  def one(self, number, *args, **kwargs):
    if number == step:
      raise Interrupted
    write(self, number, *args, **kwargs)

  with mock.patch.object(metrics.MetricsWriter, "write", one), pytest.raises(Interrupted):
    yield


def assert_same_stage(directory, expected):
  state, files = last_checkpoint(directory)
  whole_state, whole_files = last_checkpoint(expected)
  assert state.keys() == whole_state.keys() and len(state) > 8
  assert [name for name in state if state[name] != whole_state[name]] == []
  assert files == whole_files
  assert records(directory) == records(expected)
  # Where it comes from is of its own run: date and seconds differ.
  done, whole_done = (finished.require_done(folder) for folder in (directory, expected))
  assert done == dataclasses.replace(whole_done, provenance=done.provenance)


@pytest.mark.parametrize("stage", TRAINED)
def test_an_interrupted_stage_goes_on_bit_for_bit(whole, specs, tmp_path, stage):
  workdir = copy_without(whole, tmp_path / "run", stage)
  with interrupted_at(KILL_STEP):
    run_stage(config(specs), workdir, stage)
  assert finished.read_done(workdir / stage) is None
  assert damaged.saved_steps(workdir / stage) == [2]
  run_stage(config(specs), workdir, stage)
  assert_same_stage(workdir / stage, whole / stage)


def killed_stage(config_path, workdir, stage):
  """Entry of the subprocess below: dies by SIGKILL when a checkpoint is on disk."""
  specs = json.loads(pathlib.Path(config_path).read_text())
  write, workdir = metrics.MetricsWriter.write, pathlib.Path(workdir)

  def one(self, step, *args, **kwargs):
    while step == KILL_STEP and not damaged.saved_steps(workdir / stage):
      time.sleep(0.01)
    if step == KILL_STEP:
      os.kill(os.getpid(), signal.SIGKILL)
    write(self, step, *args, **kwargs)

  with mock.patch.object(metrics.MetricsWriter, "write", one):
    run_stage(config(specs), workdir, stage)


def test_a_killed_process_goes_on_bit_for_bit(whole, specs, tmp_path):
  workdir = copy_without(whole, tmp_path / "run", "ppo_ptx")
  (tmp_path / "specs.json").write_text(json.dumps(specs))
  arguments = [str(tmp_path / "specs.json"), str(workdir), "ppo_ptx"]
  code = f"from tests.stages import test_pipeline; test_pipeline.killed_stage(*{arguments!r})"
  cache = {
    name.upper(): str(getattr(jax.config, name))
    for name in (
      "jax_compilation_cache_dir",
      "jax_persistent_cache_min_compile_time_secs",
      "jax_persistent_cache_min_entry_size_bytes",
    )
  }
  child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | cache)
  assert child.returncode == -signal.SIGKILL
  assert damaged.saved_steps(workdir / "ppo_ptx") == [2]
  run_stage(config(specs), workdir, "ppo_ptx")
  assert_same_stage(workdir / "ppo_ptx", whole / "ppo_ptx")


def test_a_limit_stops_the_stage_and_lifting_it_goes_on(whole, specs, tmp_path):
  workdir = copy_without(whole, tmp_path / "run", "ppo")
  # Chunks of pretraining rows and the checkpoints that stay, which may change as well.
  limited = config(
    specs,
    ppo__max_kl=1.0,
    ppo__ptx_microbatches=2,
    checkpoint__every_steps=1,
    evaluate__checkpoints=3,
  )
  message = r"ppo stopped at step 2: kl is .*, above its limit 1\. .*step 1, is kept.*ppo.max_kl"
  with pytest.raises(StageStopped, match=message):
    run_stage(limited, workdir, "ppo")
  assert damaged.saved_steps(workdir / "ppo") == [1]
  run_stage(config(specs), workdir, "ppo")
  assert_same_stage(workdir / "ppo", whole / "ppo")


OWN_REWARD = """
def brevity(prompts, answers, iteration):
  return [{value} if iteration == 3 else -len(answer) / 10 for answer in answers]
"""


def test_a_mended_reward_function_goes_on_as_if_it_had_been_right(
  whole, specs, tmp_path, monkeypatch, capsys
):
  """With every kind of reward model beside it: the run's own, given again, is its own equal."""
  module, rm = tmp_path / "own_reward.py", str(whole / "rm")
  monkeypatch.syspath_prepend(tmp_path)
  changes = dict(
    ppo__rewards=("rm", "0.1*python:own_reward:brevity", "ensemble:worst", f"0*model:{rm}"),
    ppo__ensemble=(rm,),
  )

  def run(workdir, value):
    module.write_text(OWN_REWARD.format(value=value))
    monkeypatch.delitem(sys.modules, "own_reward", raising=False)
    reward_functions.load.cache_clear()
    importlib.invalidate_caches()
    run_stage(config(specs, **changes), workdir, "ppo")
    return workdir / "ppo"

  right, mended = (copy_without(whole, tmp_path / name, "ppo") for name in ("right", "mended"))
  with pytest.raises(UserError, match="python:own_reward:brevity, in iteration 3, returned None"):
    run(mended, "None")
  assert damaged.saved_steps(mended / "ppo") == [2]
  assert run(mended, "-1.5000") and "python:own_reward:brevity changed" in capsys.readouterr().out
  expected = run(right, "-1.5000")
  assert records(mended / "ppo") == records(expected)
  assert last_checkpoint(mended / "ppo")[0] == last_checkpoint(expected)[0]
  for record in records(expected):
    assert record["rewards/ensemble"] == pytest.approx(record["reward"], abs=1e-6)
    assert record["rewards/model"] == pytest.approx(record["reward"], abs=0.2)  # spelled anew
  with pytest.raises(UserError, match="was made with another reward python:own_reward:brevity"):
    run(mended, "-2")


def test_a_full_disk_is_told_and_loses_nothing(whole, specs, tmp_path):
  workdir = copy_without(whole, tmp_path / "run", "sft")
  usage, calls = shutil.disk_usage, []

  def full_at_the_second_save(path):  # the stage asks once before its first step
    calls.append(path)
    return usage(path)._replace(free=0 if len(calls) == 3 else usage(path).free)

  with mock.patch.object(shutil, "disk_usage", full_at_the_second_save):
    with pytest.raises(UserError, match=r"cannot write .*sft/checkpoints/\d+: .*MiB left"):
      run_stage(config(specs), workdir, "sft")
  assert damaged.saved_steps(workdir / "sft")
  run_stage(config(specs), workdir, "sft")
  assert_same_stage(workdir / "sft", whole / "sft")


# --- the plan -------------------------------------------------------------------------------------

BIGGER = {"reward_model__d_mlp": 48}


def test_a_larger_base_is_judged_where_there_is_one(whole, specs):
  shared, apart = (context(config(specs, **changes), whole) for changes in ({}, BIGGER))
  assert "reward_base" not in evaluate.judged_policies(shared)
  assert "reward_base" in evaluate.judged_policies(apart)


def test_the_reward_model_starts_from_what_the_config_says(whole, specs, tmp_path):
  """The trunk is that of the base or of the SFT epoch with the best loss; the head is fresh.

  Not of the epoch that a reward model chose: trained anew, it would start from its own choice.
  """
  workdir = copy_without(whole, tmp_path / "run", "sft_select")
  done = finished.read_done(whole / "sft")
  other = min({epoch.step for epoch in done.result.epochs} - {done.step})
  selected = finished.Done("sft_select", {}, other, results.Selected(()))
  finished.write_done(workdir / "sft_select", selected)
  for start, source in (("base", "pretrain"), ("sft", "sft")):
    ctx = context(config(specs, rm__start_from=start), workdir)
    with jax.set_mesh(ctx.mesh):
      params = rm.initial_params(ctx, ctx.key("rm"))
      expected = policies.load_step(ctx, source, finished.read_done(workdir / source).step)
    trunk = {name: params[name] for name in expected}
    jax.tree.map(np.testing.assert_array_equal, trunk, expected)
    assert "head" in params and float(params["head"]["bias"]) == 0.0


def test_cross_validation_leaves_out_whole_labelers(whole, specs):
  ctx = context(config(specs, rm__cross_validation_folds=3), whole)
  folds = rm.fold_labelers(ctx, "rm")
  assert sorted(name for fold in folds for name in fold) == sorted(micro.LABELERS)
  trained, judged = [], []
  names = lambda rows: {row.labeler for row in rows}
  train = lambda ctx, stage, name, rows, key: (trained.append((stage, name, names(rows))), "params")
  judge = lambda ctx, params, rows: (
    judged.append(names(rows)) or types.SimpleNamespace(accuracy=len(judged))
  )
  with mock.patch.object(rm, "train", train), mock.patch.object(rm, "judge", judge):
    found = rm.cross_validate(ctx, "rm")
  assert trained == [
    ("rm", f"rm/fold_{i}", set(micro.LABELERS) - fold) for i, fold in enumerate(folds)
  ]
  assert judged == [part for fold in folds for part in (fold, set(micro.LABELERS) - fold)]
  assert found == tuple(results.Fold(heldout=2 * i + 1, train=2 * i + 2) for i in range(3))


def test_rankings_are_scored_alike_in_any_rows_on_one_device_and_eight(whole, specs):
  """Five rankings divide over no mesh of eight."""
  scores = []
  for length in (0, 64):
    one = context(config(specs, rm__row_length=length), whole)
    eight = dataclasses.replace(one, mesh=sharding.make_mesh(one.config.mesh))
    assert eight.mesh.size == 8
    for ctx in (one, eight):
      with jax.set_mesh(ctx.mesh):
        records = ctx.data.records("comparisons", "validation")[:5]
        rankings = ranking_accuracy.tokenized(ctx, records)
        score = ranking_accuracy.score_rankings(ctx, policies.load_reward(ctx), rankings)
        assert [len(x) for x in score] == [len(item.ranks) for item in rankings]
        scores.append(np.concatenate(score))
  tokens = [item.prompt + response for item in rankings for response in item.responses]
  token_NL, is_token_NL = answers.pad_left(tokens, 60, one.tokenizer.pad_id)
  alone = scoring.sequence_score(
    one.model("reward"), policies.load_reward(one), token_NL, is_token_NL
  )
  assert len(alone) >= 10 and np.std(alone) > 1e-3
  for score in scores:
    np.testing.assert_allclose(score, alone, rtol=1e-5, atol=1e-6)


# --- weights given --------------------------------------------------------------------------------


def test_a_run_from_given_weights_trains_no_base(whole, specs, tmp_path):
  """The same weights, found elsewhere, give the same SFT model; the given folder is not touched."""
  given = str(whole / "pretrain")
  tokenizer = str(whole / "tokenizer" / "tokenizer.model")
  before = files_of(whole)
  with micro.one_device():
    pipeline.run(
      config(specs, stage="sft", model__weights=given, tokenizer__path=tokenizer), tmp_path
    )
  assert files_of(whole) == before
  assert {path.name for path in tmp_path.iterdir()} == {"cache", "sft", "tokenizer"}
  assert last_checkpoint(tmp_path / "sft")[0] == last_checkpoint(whole / "sft")[0]

  again = config(specs, stage="sft", tokenizer__path=tokenizer)
  with micro.one_device(), pytest.raises(ValueError, match="with another parent:pretrain"):
    shutil.copytree(whole / "pretrain", tmp_path / "pretrain")
    pipeline.run(again, tmp_path)


def test_given_weights_may_move(whole, specs, tmp_path):
  """What lies elsewhere since is known by its content; other weights there are refused (above)."""
  given = tmp_path / "given"
  shutil.copytree(whole / "pretrain", given / "pretrain")
  shutil.copytree(whole / "tokenizer", given / "tokenizer")
  run = lambda given: pipeline.run(
    config(specs, stage="sft", model__weights=str(given / "pretrain")), tmp_path / "run"
  )
  with micro.one_device():
    run(given)
    made = files_of(tmp_path / "run" / "sft")
    given.rename(tmp_path / "moved")
    run(tmp_path / "moved")
  assert files_of(tmp_path / "run" / "sft") == made


def test_rl_from_a_given_policy_and_a_given_reward_model(whole, specs, tmp_path):
  """In one command, without comparisons and demonstrations: the same PPO-ptx as where they were trained."""
  given = {
    f"{block}__weights": str(whole / stage)
    for block, stage in (("sft", "sft"), ("ppo_init", "ppo_init"), ("reward_model", "rm"))
  }
  bare = specs | {"comparisons": "", "demonstrations": ""}
  run = lambda **changes: pipeline.run(
    config(bare, evaluate__compare=(), **given | changes), tmp_path / "run"
  )
  printed = io.StringIO()
  with micro.one_device(), contextlib.redirect_stdout(printed):
    run()
  assert "is not measured" in printed.getvalue() and "keep the zero point" in printed.getvalue()
  made = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
  assert made == {"cache", "evaluate", "ppo_ptx", "report", "rm", "tokenizer"}
  same = [last_checkpoint(folder / "ppo_ptx")[0] for folder in (tmp_path / "run", whole)]
  assert same[0] == same[1]
  policies_judged = finished.read_done(tmp_path / "run" / "evaluate").result.summary
  assert set(policies_judged) == {"sft", "ppo_init", "ppo_ptx", "echo"}
  # It goes on where it was, and not with another reward model.
  before = files_of(tmp_path / "run" / "ppo_ptx")
  with micro.one_device():
    run()
    assert files_of(tmp_path / "run" / "ppo_ptx") == before
    other = copy_without(whole, tmp_path / "other", "ppo", "ppo_ptx", "evaluate", "report")
    finished_run.change_done(other / "rm", '"config.seed": "0"', '"config.seed": "1"')
    with pytest.raises(UserError, match="with another weights:rm"):
      run(reward_model__weights=str(other / "rm"))


def test_preset_weights_from_a_folder_of_hugging_face(whole, specs, tmp_path):
  """The policy's base, exported: no shape is typed, and the trained stages are the same bit for bit."""
  packaging.write_huggingface(str(whole / "pretrain"), tmp_path / "base")
  values = micro.config_dict("ppo_ptx", specs)
  untouched = base.base("ppo_ptx")
  for block in ("model", "reward_model", "tokenizer"):
    values[block] = untouched[block]
  values.model.weights = str(tmp_path / "base")
  values.evaluate.compare = ()
  weights_preset.fill_in(values, untouched, {}, weights_settings)
  assert values.model.d_model == 16 and values.tokenizer.vocab_size == micro.VOCAB_SIZE
  with micro.one_device():
    pipeline.run(from_config_dict(values), tmp_path / "run")
  for stage in ("sft", "rm", "ppo_init", "ppo_ptx"):
    ours, theirs = (last_checkpoint(folder / stage)[0] for folder in (tmp_path / "run", whole))
    assert ours == theirs, stage


def other_documents(specs, folder):
  """The documents less the first ten: enough for another tokenizer."""
  lines = pathlib.Path(specs["documents"].removeprefix("jsonl:")).read_text().splitlines()
  (folder / "other.jsonl").write_text("\n".join(lines[10:]))
  return f"jsonl:{folder}/other.jsonl"


def test_given_weights_that_do_not_fit_are_refused(whole, specs, tmp_path):
  given, own = str(whole / "pretrain"), str(whole / "tokenizer" / "tokenizer.model")

  def refused(match, **changes):
    changes = {"tokenizer__path": own, "model__weights": given} | changes
    with micro.one_device(), pytest.raises(ValueError, match=match) as error:
      pipeline.run(config(specs, stage=changes.pop("stage", "sft"), **changes), tmp_path)
    assert "\n" not in str(error.value)
    # Not even a tokenizer, to which the workdir would then belong.
    assert {path.name for path in tmp_path.iterdir()} <= {"other", "other.jsonl"}

  refused(r"has d_mlp=32, and config.model has d_mlp=40; they must be equal", model__d_mlp=40)
  refused(
    r"config.model.weights: /nowhere must be .* and it is not there", model__weights="/nowhere"
  )
  selected = str(whole / "sft_select")
  refused(r"must be the folder of a finished stage that trains", model__weights=selected)
  refused(r"config.stage='pretrain' .*config.model.weights", stage="pretrain")
  context(config(specs, data__documents=other_documents(specs, tmp_path)), tmp_path / "other")
  other = str(tmp_path / "other" / "tokenizer" / "tokenizer.model")
  refused(r"another tokenizer; set config.tokenizer.path=.*whole", tokenizer__path=other)


# --- refused before anything is trained -----------------------------------------------------------


def refuse(config, workdir, match, *, one_device=True):
  devices = micro.one_device() if one_device else contextlib.nullcontext()
  with devices, pytest.raises((ValueError, UserError), match=match) as error:
    pipeline.run(config, workdir)
  assert "\n" not in str(error.value)


def assert_untrained(workdir):
  assert {path.name for path in workdir.iterdir()} <= {"cache", "tokenizer"}


@pytest.mark.parametrize("kind", ["documents", "demonstrations", "comparisons", "prompts"])
def test_bad_data_is_refused_before_training(specs, tmp_path, kind):
  path = tmp_path / "bad.jsonl"
  bad, workdir = specs | {kind: f"jsonl:{path}"}, tmp_path / "run"
  workdir.mkdir()
  refuse(config(bad), workdir, rf"{path} cannot be read: No such file")
  path.write_text("\n")
  refuse(config(bad), workdir, rf"data.{kind}='jsonl:{path}' holds no records")
  lines = pathlib.Path(specs[kind].removeprefix("jsonl:")).read_text().splitlines()
  path.write_text("\n".join([*lines[:2], '{"broken', *lines[2:]]))
  refuse(config(bad), workdir, rf"{path}:3: not JSON")
  assert_untrained(workdir)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"data__max_prompt_length": 2}, "s: every record is too long: .*max_prompt_length"),
    (
      {"mesh__data": 3},
      "mesh: .*mesh.data=3.* must multiply to the number of devices, got 8",
    ),
    (
      {"mesh__tensor": 4},
      "parameter policy/.*heads=2 must be divisible by mesh axis tensor=4. Nearest mesh that fits:"
      " --config.mesh.slice=1 --config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=2",
    ),
    (
      {"sft__batch_size": 12},
      r"config.sft.batch_size=12 must be divisible by mesh slice \* data \* fsdp = 8. Set"
      " --config.sft.batch_size to a multiple, or the mesh to --config.mesh.slice=1"
      " --config.mesh.data=4 --config.mesh.fsdp=1 --config.mesh.tensor=2",
    ),
    ({"ppo__batch_size": 4}, r"config.ppo.batch_size=4 must be divisible by mesh"),
    (
      {"sft__microbatches": 2},
      r"config.sft.batch_size / microbatches = 4 rows must be divisible by mesh slice \* data \* fsdp = 8, else each"
      " device computes all of them. Set the mesh to --config.mesh.slice=1 --config.mesh.data=4 --config.mesh.fsdp=1"
      " --config.mesh.tensor=2, or set fewer --config.sft.microbatches",
    ),
    (
      {"ppo__batch_size": 16, "ppo__microbatches": 2},
      "config.ppo.batch_size / num_minibatches / microbatches = 4 rows must be divisible by mesh",
    ),
    (
      {"ppo__batch_size": 8, "ppo__num_minibatches": 2},
      "config.ppo.batch_size / num_minibatches = 4 rows must be divisible by mesh .* or set fewer"
      " --config.ppo.num_minibatches, which changes the recipe",
    ),
    ({"ppo__packed_rows": 4}, r"packed_rows=4 must be divisible by mesh slice \* data \* fsdp = 8"),
    ({"tokenizer__path": "/no.model"}, "^/no.model cannot be read: No such file"),
    ({"rollout__slots": 4}, r"rollout.slots=4 must be divisible by mesh slice \* data \* fsdp = 8"),
    ({"data__comparisons": "demo:"}, "data.prompts='jsonl:.*'; give comparisons of your own"),
    ({"rm__cross_validation_folds": 5}, "folds=5 must leave each fold a labeler .*name 4 labelers"),
    (
      {"pretrain__optim__warmup_steps": 4},
      "stage pretrain: config.pretrain.optim.warmup_steps=4 must be below the 4 updates of the stage",
    ),
    (
      {"sft__optim__warmup_steps": 99},
      r"stage sft: config.sft.optim.warmup_steps=99 must be below the \d+ updates of the stage",
    ),
    (
      {"ppo__value_optim__warmup_steps": 8},
      "stage ppo: config.ppo.value_optim.warmup_steps=8 must be below the 8 updates of the stage",
    ),
    (
      {"ppo__value_optim__warmup_steps": 4, "evaluate__overoptimization": True},
      "stage ppo_beta0: config.ppo.value_optim.warmup_steps=4 must be below the 4 updates",
    ),
  ],
)
def test_what_would_fail_later_is_refused_at_once(specs, tmp_path, changes, match):
  about_devices = "must be divisible" in match or "number of devices" in match
  refuse(config(specs, **changes), tmp_path, match, one_device=not about_devices)
  assert_untrained(tmp_path)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"pretrain__num_steps": 5}, "another config.pretrain .num_steps: 4 there, 5 here"),
    ({"model__rope_base": 5.0}, "another config.model .rope_base: 10000.0 there, 5.0 here"),
    ({"seed": 1}, "tokenizer: .*another config.seed .0 there, 1 here"),
    ({"sft__dropout": 0.2}, "sft: .*another config.sft .dropout: 0.1 there, 0.2 here"),
    ({"rm__ties": "half"}, "rm: .*another config.rm .ties: drop there, half here"),
    ({"ppo__beta": 0.7}, "ppo: .*another config.ppo .beta: 0.2 there, 0.7 here"),
    ({"tokenizer__vocab_size": 50}, "tokenizer: .*vocab_size: 56 there, 50 here"),
  ],
)
def test_finished_stages_of_another_config_are_refused(whole, specs, changes, match):
  before = files_of(whole)
  refuse(config(specs, **changes), whole, match + ".*Use another --workdir")
  assert files_of(whole) == before


def test_rankings_edited_under_a_finished_stage_are_refused(whole, specs, tmp_path):
  path = tmp_path / "comparisons.jsonl"
  rows = [
    json.loads(line) for line in pathlib.Path(specs["comparisons"][6:]).read_text().split("\n")[:-1]
  ]
  edited = config(specs, data__comparisons=f"jsonl:{path}")
  micro.write_lines(path, rows)
  with micro.one_device():
    pipeline.run(edited, whole)  # a copy of the file does no harm
  before = files_of(whole)
  edits = {
    "ranks reversed": [row | {"ranks": row["ranks"][::-1]} for row in rows],
    "half of the rows": rows[::2],
    "one more row": [*rows, rows[0]],
  }
  for rankings in edits.values():
    micro.write_lines(path, rankings)
    refuse(edited, whole, f"/rm: it was made with another content of {path} .sha256 .*Put back")
  del before[str(memory := pathlib.Path("cache", "checksums.json"))]
  assert {name: file for name, file in files_of(whole).items() if name != str(memory)} == before


def test_another_tokenizer_is_refused(whole, specs, tmp_path):
  other = config(specs, data__documents=other_documents(specs, tmp_path))
  context(other, tmp_path)
  path = str(tmp_path / "tokenizer" / "tokenizer.model")
  refuse(config(specs, tokenizer__path=path), whole, "made with another tokenizer than")
  wrong_size = config(specs, tokenizer__path=path, tokenizer__vocab_size=50)
  refuse(wrong_size, tmp_path, f"vocab_size=50 must be the 56 pieces of {path}")


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["collect", "evaluate"])
def test_only_the_first_process_writes(whole, specs, tmp_path, stage):
  workdir = copy_without(whole, tmp_path / "run", "evaluate", "report")
  before = files_of(workdir)
  with contextlib.ExitStack() as patches:
    patch = lambda *args: patches.enter_context(mock.patch.object(*args))
    patch(collect, "_sampled", lambda *_: [])
    patch(evaluate, "_results", lambda *_: (None, {}))
    patch(jax, "process_index", lambda: 1)
    # The labelers of `demo:` would want its prompts.
    patch(collect, "check_settings", lambda *_: None)
    patch(collect.judging, "require_simulation", lambda *_: demo)
    run_stage(config(specs, data__comparisons="demo:"), workdir, stage)
  assert files_of(workdir) == before


# --- from the default preset's text ---------------------------------------------------------------


DEMO = {kind: "demo:" for kind in ("documents", "demonstrations", "comparisons", "prompts")}


@contextlib.contextmanager
def few_records():
  load = demo.load
  few = lambda kind, split, seed: load(kind, split, seed)[: 40 if split == "train" else 8]
  with mock.patch.object(demo, "load", few):
    yield


def test_a_few_shot_prompt_without_room_is_refused_at_once(tmp_path):
  narrow = micro.config("ppo_ptx", DEMO, reward_model__max_length=100)
  with few_records():
    refuse(
      narrow, tmp_path, r"reward_model.max_length=100 must hold the few-shot prompt of \d{3} tok"
    )
  assert_untrained(tmp_path)


def test_from_the_demo_to_the_report(tmp_path):
  """The demo's own road: comparisons are collected, and judged by its gold score."""
  with few_records(), micro.one_device():
    pipeline.run(micro.config("ppo_ptx", DEMO, evaluate__best_of_n=2), tmp_path)
  agreement = finished.read_done(tmp_path / "collect").result.agreement
  # Of eight prompts with answers of an untrained model, so that labelers mostly read noise.
  assert 0 <= agreement.train.agreement <= 1 and 0 <= agreement.heldout.agreement <= 1
  for split, count in (("train", 16), ("validation", 8), ("heldout", 8)):
    spec = f"jsonl:{tmp_path}/collect/{split}.jsonl"
    rankings = sources.load(
      spec, "comparisons", "all", seed=0, validation_fraction=0.1, on_bad_record="raise"
    )
    assert len(rankings) == count
    assert all(2 <= len(ranking.responses) <= 3 and ranking.labeler for ranking in rankings)
  assert finished.read_done(tmp_path / "rm").result.heldout_labelers.pairs > 0
  summary = finished.read_done(tmp_path / "evaluate").result.summary
  assert {"few_shot", "ppo_ptx"} <= summary.keys()
  assert "gold" in summary["ppo_ptx"]
  assert (tmp_path / "report" / "index.html").is_file()


def test_a_finished_run_names_what_was_asked_for():
  """Other policies may come after it, only to be compared with it."""
  stages = ["pretrain", "sft", "rm", "ppo", "ppo_ptx", "ppo_beta0", "evaluate"]
  talk = lambda *asked: pipeline.next_steps(stages, *asked, pathlib.Path("run"))[1]
  assert (
    talk("ppo_ptx")
    == "  to talk to it: instructjax generate --checkpoint=run/ppo_ptx --interactive"
  )
  assert "run/ppo_beta0 " in talk("evaluate")
  (report,) = pipeline.next_steps(["rm", "evaluate"], "rm", pathlib.Path("run"))
  assert "run/report/index.html" in report
  chosen, *_ = pipeline.next_steps(["sft", "rm", "best_of_n"], "best_of_n", pathlib.Path("run"))
  assert chosen.endswith(" --config.data.demonstrations=jsonl:run/best_of_n/answers.jsonl")


def test_the_best_of_n_answers_is_the_one_that_the_reward_model_scores_highest(
  whole, specs, tmp_path, monkeypatch
):
  """With real networks: what `ppo` sampled is scored one answer at a time, and the best picked by hand."""
  cfg = config(
    specs, "best_of_n", best_of_n__policy="ppo", best_of_n__n=4, best_of_n__num_prompts=6
  )
  monkeypatch.setattr(best_of_n, "_PROMPTS", 4)  # two parts
  sampled, sample = [], answers.sample

  def spy(*args, **kwargs):
    found = sample(*args, **kwargs)
    sampled.extend(zip(found.text, found.ended_N.tolist()))
    return found

  monkeypatch.setattr(answers, "sample", spy)
  workdir = copy_without(whole, tmp_path / "run", "evaluate", "report")
  run_stage(cfg, workdir, "best_of_n")
  ctx = context(cfg, workdir)
  with jax.set_mesh(ctx.mesh):
    params = policies.load_reward(ctx)
    scores = jax.jit(functools.partial(scoring.sequence_score, ctx.model("reward"), params))

    def score(prompt: str, answer: str, ended: bool) -> float:
      # Spelt anew, a cut-off answer may need more pieces than it was sampled in; the stage cuts it again.
      ids = (ctx.tokenizer.encode(answer) + [ctx.tokenizer.eos_id] * ended)[:24]
      ids = ctx.tokenizer.encode(prompt) + ids
      token_BL = np.full((1, 60), ctx.tokenizer.pad_id, np.int32)
      token_BL[0, : len(ids)] = ids
      return float(scores(token_BL, np.arange(60)[None] < len(ids))[0])

    prompts = [prompt for _, prompt in best_of_n._prompts(ctx, "best_of_n")]
    assert len(sampled) == 4 * len(prompts) == 24
    expected = []
    for i, prompt in enumerate(prompts):
      group = sampled[4 * i : 4 * i + 4]
      found = [score(prompt, *one) for one in group]
      usable = [j for j, (text, ended) in enumerate(group) if text and ended]
      if usable:
        best = max(usable, key=lambda j: found[j])
        expected.append((prompt, group[best][0], found[best], found))
  rows = [
    json.loads(line)
    for line in (workdir / "best_of_n/answers.jsonl").read_text().split("\n")
    if line
  ]
  assert len(rows) == len(expected) > 2
  # There is a choice, and it is not always the first answer that may be chosen.
  assert any(row["score"] > min(row["scores"]) for row in rows)
  for row, (prompt, answer, best, found) in zip(rows, expected):
    assert (row["prompt"], row["response"]) == (prompt, answer)
    np.testing.assert_allclose([row["score"], *row["scores"]], [best, *found], rtol=1e-4, atol=1e-5)
