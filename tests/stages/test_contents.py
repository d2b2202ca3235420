"""What a run's files hold: sources, given weights, and the rankings that the run has collected."""

import hashlib
import os
import types

import pytest

from instructjax.core import results
from instructjax.core.errors import UserError
from instructjax.stages import contents
from instructjax.stages.contents import Contents
from instructjax.train import finished
from tests import finished_run, micro


def content_of(kind, workdir):
  """What a run of the demo finds in its workdir when it starts."""
  config = micro.config("ppo_ptx", {name: "demo:" for name in ("comparisons", "prompts")})
  return Contents(config, workdir).of(kind)


def collected(workdir, stage="collect"):
  """Puts down the files of a finished stage that collects."""
  folder = workdir / stage
  folder.mkdir()
  for split in contents.SPLITS:
    (folder / f"{split}.jsonl").write_text(split)
  digests = {split: hashlib.sha256(split.encode()).hexdigest() for split in contents.SPLITS}
  agreement = results.Agreement(1.0, 0.0, 0.0)
  result = results.Collected(results.LabelerGroups(agreement, agreement), digests)
  finished.write_done(folder, finished.Done(stage, {}, None, result, finished_run.MADE))
  return folder


@pytest.mark.parametrize(
  "edit",
  [
    lambda path: path.write_text("niart"),  # as long as before
    lambda path: path.write_text("tra"),
    lambda path: path.write_text("train\none more"),
  ],
)
def test_collected_comparisons_that_somebody_edited_are_refused(tmp_path, edit):
  path = collected(tmp_path) / "train.jsonl"
  content_of("comparisons", tmp_path)
  os.utime(path)  # touched only
  content_of("comparisons", tmp_path)
  edit(path)
  told = f"^{path} is not the file that stage collect wrote: put .* delete {tmp_path}/collect to"
  with pytest.raises(UserError, match=told):
    content_of("comparisons", tmp_path)


def test_each_round_of_comparisons_is_known_by_its_stage(tmp_path):
  for stage in ("collect", "collect_2"):
    collected(tmp_path, stage)
  (tmp_path / "collect_2" / "train.jsonl").write_text("niart")
  content_of("comparisons", tmp_path)
  with pytest.raises(UserError, match="collect_2/train.jsonl is not the file that stage collect_2"):
    content_of("collect_2", tmp_path)


def test_a_collection_that_was_deleted_is_not_there(tmp_path):
  """Then stage `collect` runs again: no reason to refuse what was made from it before."""
  with pytest.raises(contents.NotThere, match="collect is not finished"):
    content_of("comparisons", tmp_path)


def test_a_collected_file_that_is_gone(tmp_path):
  (collected(tmp_path) / "heldout.jsonl").unlink()
  with pytest.raises(UserError, match="cannot read .*heldout.jsonl: No such file.*collect anew"):
    content_of("comparisons", tmp_path)


def test_weights_by_all_their_files(tmp_path):
  files = tmp_path / "config.json", tmp_path / "model.safetensors"
  for path in files:
    path.write_bytes(bytes(1 << 22))
  given = types.SimpleNamespace(path=tmp_path, kind="hf", files=files)
  of_weights = lambda: Contents(micro.config("sft", {}), tmp_path).of_weights(given)
  before = of_weights()
  assert of_weights() == before and before.files == tuple(map(str, files))
  with open(files[1], "r+b") as file:  # far from both ends
    file.seek(1 << 21)
    file.write(b"1")
  assert of_weights().digests[0] == before.digests[0] != of_weights().digests[1]
  files[0].unlink()
  with pytest.raises(UserError, match="cannot read .*config.json: No such file"):
    of_weights()
