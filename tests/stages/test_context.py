"""What makes two runs of a stage the same, and what a run may change where it goes on."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

from instructjax.core.errors import Preempted, UserError
from instructjax.parallel import distributed
from instructjax.stages import context, pipeline
from instructjax.train import metrics, saved_state
from tests import micro


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
  return micro.write_data(tmp_path_factory.mktemp("data"))


def run(specs, workdir, **changes):
  with micro.one_device():
    pipeline.run(micro.config("pretrain", specs, **changes), workdir)


@pytest.fixture(scope="module")
def whole(specs, tmp_path_factory):
  """Folder of a `pretrain` that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  run(specs, workdir)
  return workdir / "pretrain"


def interrupted(specs, workdir, monkeypatch):
  """Runs the first of four steps."""
  with monkeypatch.context() as patch:
    patch.setattr(distributed, "is_told_to_stop", lambda: True)
    patch.setattr(distributed, "require_going_on", lambda: None)  # asked before the first step
    with pytest.raises(Preempted, match="saved at step 1"):
      run(specs, workdir)


def losses(directory):
  return [record["loss"] for record in metrics.read_metrics(directory)]


@pytest.mark.parametrize("change", [{"remat": "full"}, {"layers": "scan"}])
def test_an_interrupted_run_goes_on_under_another_execution(
  specs, whole, tmp_path, monkeypatch, capsys, change
):
  interrupted(specs, tmp_path, monkeypatch)
  capsys.readouterr()
  run(specs, tmp_path, **{f"execution__{name}": value for name, value in change.items()})
  (name, value), was = *change.items(), {"remat": "none", "layers": "unroll"}
  told = f"pretrain goes on with execution.{name}={value} (was {was[name]}): results may differ by rounding only"
  assert [line for line in capsys.readouterr().out.splitlines() if "goes on" in line] == [told]
  np.testing.assert_allclose(losses(tmp_path / "pretrain"), losses(whole), rtol=1e-5)
  done = [
    json.loads((folder / "done.json").read_text()) for folder in (tmp_path / "pretrain", whole)
  ]
  assert done[0]["fingerprint"] == done[1]["fingerprint"]
  saved = saved_state.read_meta(tmp_path / "pretrain", 4)["changeable"]["rounding"]
  assert saved[f"execution.{name}"] == value


def test_bfloat16_may_come_in_between(specs, whole, tmp_path, monkeypatch, capsys):
  interrupted(specs, tmp_path, monkeypatch)
  run(specs, tmp_path, execution__dtype="bfloat16")
  told = "execution.dtype=bfloat16 (was float32): results may differ by rounding of bfloat16\n"
  assert told in capsys.readouterr().out
  got, expected = losses(tmp_path / "pretrain"), losses(whole)
  assert got[0] == expected[0] and got[1:] != expected[1:]
  np.testing.assert_allclose(got, expected, rtol=0.02)


def test_another_network_is_refused(specs, tmp_path, monkeypatch):
  interrupted(specs, tmp_path, monkeypatch)
  with pytest.raises(UserError, match="another config.model .d_mlp: 32 there, 48 here."):
    run(specs, tmp_path, model__d_mlp=48)


@pytest.fixture
def documents(specs, tmp_path):
  """A copy of the documents under a path of its own: (path, specs that name it)."""
  path = tmp_path / "data" / "documents.jsonl"
  path.parent.mkdir()
  shutil.copyfile(specs["documents"].removeprefix("jsonl:"), path)
  return path, specs | {"documents": f"jsonl:{path}"}


def replace_a_word(path):
  """Another content of the same size."""
  text = path.read_text()
  assert "joyful" in text
  path.write_text(text.replace("joyful", "yjoful", 1))


def test_other_documents_under_the_same_path_are_refused(documents, whole, tmp_path, monkeypatch):
  path, named = documents
  workdir = tmp_path / "run"
  interrupted(named, workdir, monkeypatch)
  kept = path.read_bytes()
  replace_a_word(path)
  # An unfinished stage, as its checkpoint says; the tokenizer was trained on these documents too.
  told = f"^cannot go on with {workdir}/{{}}: it was made with another content of {path} .sha256 "
  with pytest.raises(UserError, match=told.format("tokenizer")):
    run(named, workdir)
  shutil.copytree(whole.parent / "tokenizer", tmp_path / "tokenizer")
  given = {"tokenizer__path": str(tmp_path / "tokenizer")}
  with pytest.raises(UserError, match=told.format("pretrain")):
    run(named, workdir, **given)
  path.write_bytes(kept)  # and touched
  run(named, workdir)
  assert losses(workdir / "pretrain") == losses(whole)
  replace_a_word(path)  # a finished stage
  with pytest.raises(UserError, match=told.format("pretrain")):
    run(named, workdir, **given)
  assert losses(workdir / "pretrain") == losses(whole)


def test_data_may_move(documents, whole, tmp_path, monkeypatch, capsys):
  path, named = documents
  workdir = tmp_path / "run"
  interrupted(named, workdir, monkeypatch)
  moved = path.rename(tmp_path / "elsewhere.jsonl")
  named = named | {"documents": f"jsonl:{moved}"}
  run(named, workdir)
  assert losses(workdir / "pretrain") == losses(whole)
  made = [(folder / "done.json").read_text() for folder in (workdir / "pretrain", whole)]
  assert json.loads(made[0])["fingerprint"] == json.loads(made[1])["fingerprint"]
  moved.unlink()  # what is finished needs no data any more
  run(named, workdir)


def test_what_may_change_is_in_no_fingerprint():
  plain = micro.config("ppo_ptx", {})
  other = dataclasses.replace(
    plain,
    model=dataclasses.replace(plain.model, weights="elsewhere"),
    ppo=dataclasses.replace(plain.ppo, max_kl=7.0, packed_rows=4, ptx_microbatches=2),
    rm=dataclasses.replace(plain.rm, row_length=60),
    rollout=dataclasses.replace(plain.rollout, slots=4),
    execution=dataclasses.replace(plain.execution, remat="full", dtype="bfloat16"),
  )
  for name in ("model", "ppo", "rm", "rollout", "execution"):
    before, after = getattr(plain, name), getattr(other, name)
    assert before != after
    assert context.canonical(before) == context.canonical(after)
  assert context.canonical(plain.model) == context.canonical(plain.model.network)
  changed = dataclasses.replace(plain.ppo, beta=0.7)
  assert context.canonical(changed) != context.canonical(plain.ppo)


def test_a_stage_is_of_the_date_of_its_chats():
  config = micro.config("pretrain", {})
  tokenizer = types.SimpleNamespace(fingerprint="f", chats=types.SimpleNamespace(clock=None))
  contents = types.SimpleNamespace(of=lambda kind: types.SimpleNamespace(fingerprint=kind))
  ctx = types.SimpleNamespace(
    config=config, tokenizer=tokenizer, given={}, contents=contents, done=lambda stage: None
  )
  without = context.fingerprint(ctx, "pretrain")
  tokenizer.chats.clock = "2026-03-01T12:00:00"
  dated = context.fingerprint(ctx, "pretrain")
  assert dated == without | {"date of chats": "2026-03-01T12:00:00"}


def test_rows_of_the_reward_model_count_where_dropout_is_drawn_by_row():
  tokenizer = types.SimpleNamespace(fingerprint="f", chats=types.SimpleNamespace(clock=None))
  contents = types.SimpleNamespace(of=lambda kind: types.SimpleNamespace(fingerprint=kind))
  parent = types.SimpleNamespace(identity="p")

  def made_with(**changes):
    ctx = types.SimpleNamespace(
      config=micro.config("rm", {"comparisons": "jsonl:a"}, **changes),
      tokenizer=tokenizer,
      given={},
      contents=contents,
      done=lambda stage: None,
      require_done=lambda stage: parent,
    )
    return context.fingerprint(ctx, "rm")

  apart, shared = dict(rm__row_length=0), dict(rm__row_length=64)
  assert made_with(**apart) == made_with(**shared)
  drops = dict(adapter__rank=2, adapter__dropout=0.1)
  apart, shared = (rows | drops for rows in (apart, shared))
  assert made_with(**apart) == made_with(**apart, rm__microbatches=2)  # the same rows
  assert made_with(**shared) != made_with(**apart)
  assert made_with(**shared) != made_with(**shared, rm__microbatches=2)
  assert made_with(**shared) != made_with(**shared, rm__share_prompts=True)
  apart, shared = (rows | {"adapter__dropout": 0.0} for rows in (apart, shared))
  assert made_with(**apart) == made_with(**shared)
