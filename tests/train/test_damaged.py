"""Damaged checkpoints and half copies: named, put aside, and what the advice leads to."""

import os
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core.errors import UserError
from instructjax.train import saved_state
from instructjax.train.checkpoint import Checkpoints
from instructjax.train.damaged import saved_steps

FINGERPRINT = {"config": "c" * 64}


def _state():
  return {
    "params": {"w_DF": jnp.arange(32.0).reshape(8, 4), "bias": jnp.zeros(4)},
    "step": jnp.int32(0),
  }


def _save(directory, steps, *, metrics=None, **kwargs):
  with Checkpoints(directory, keep=10, **kwargs) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(), {}, (metrics or {}).get(step, {}), FINGERPRINT, {})


def _files(path):
  return sorted(file for file in path.rglob("*") if file.is_file())


def _flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_named_and_the_run_goes_on_from_the_step_before(
  tmp_path, capfd
):
  whole = tmp_path / "whole"
  _save(whole, [1, 2])
  rng = np.random.default_rng(0)
  names = [path.relative_to(whole) for path in _files(whole / "checkpoints" / "2")]
  assert {path.name for path in names} >= {"manifest.json", "_METADATA", "_CHECKPOINT_METADATA"}
  for number, name in enumerate(names):
    stage = tmp_path / f"stage{number}"
    shutil.copytree(whole, stage)
    _flip(stage / name, rng)
    capfd.readouterr()
    with pytest.raises(UserError, match=f"^{stage / name} has other bytes than were saved. If it"):
      saved_state.load_params(stage, _state()["params"], step=2)
    with Checkpoints(stage, keep=2) as checkpoints:
      assert checkpoints.latest_step() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
      f"checkpoint 2 is put aside as 2.damaged: {stage / name} has other bytes than were saved;"
      " going on from step 1"
    )
    (aside,) = (stage / "checkpoints").glob("2.*")
    assert len(_files(aside)) == len(names)  # nothing of it is deleted


@pytest.mark.parametrize("how", ["missing", "cut off", "empty"])
def test_a_checkpoint_that_is_half_there_is_never_taken_for_whole(tmp_path, capfd, how):
  whole = tmp_path / "whole"
  _save(whole, [1, 2])
  names = [path.relative_to(whole) for path in _files(whole / "checkpoints" / "2")]
  for number, name in enumerate(names):
    stage = tmp_path / f"stage{number}"
    shutil.copytree(whole, stage)
    if how == "missing":
      (stage / name).unlink()
    else:
      os.truncate(stage / name, (stage / name).stat().st_size // 2 if how == "cut off" else 0)
    assert saved_steps(stage) == [1]
    with pytest.raises(UserError, match=f"^{stage / name} (is missing|has )"):
      saved_state.load_params(stage, _state()["params"], step=2)
    capfd.readouterr()
    with Checkpoints(stage, keep=2) as checkpoints:
      assert checkpoints.latest_step() == 1
    (line,) = capfd.readouterr().err.splitlines()
    # Of a manifest that is cut off nothing can be believed, so it counts as damaged.
    aside = "damaged" if name.name == "manifest.json" and how != "missing" else "incomplete"
    assert line.startswith(f"checkpoint 2 is put aside as 2.{aside}: {stage / name} ")


def test_a_second_damaged_checkpoint_of_a_step_is_kept_too(tmp_path):
  for _ in range(2):
    _save(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
  with Checkpoints(tmp_path, keep=2):
    pass
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"1", "2.incomplete", "2.incomplete2"}


@pytest.mark.parametrize("has_done", [False, True])
@pytest.mark.parametrize("steps", [[1], [1, 2], [1, 2, 3]])
def test_the_advice_works_when_it_is_followed_to_the_letter(tmp_path, steps, has_done):
  stage = tmp_path / "my run" / "sft"  # with a space, which a shell must not split
  _save(stage, steps)
  done = stage / "done.json"
  if has_done:
    done.write_text("{}")
  damaged = steps[len(steps) // 2]
  _flip(stage / "checkpoints" / str(damaged) / "meta" / "metadata", np.random.default_rng(0))
  with pytest.raises(UserError, match="has other bytes than were saved") as error:
    saved_state.load_params(stage, _state()["params"], step=damaged)
  command = str(error.value).split("`")[1]
  subprocess.run(command, shell=True, check=True)
  left = [step for step in steps if step < damaged]
  assert (
    str(error.value)
    .split("this stage ")[1]
    .startswith(f"goes on from step {left[-1]} " if left else "starts at its beginning ")
  )
  assert not done.exists()
  with Checkpoints(stage, keep=2) as checkpoints:
    assert checkpoints.latest_step() == (left[-1] if left else None)
    checkpoints.save(damaged, _state(), {}, {}, FINGERPRINT, {})
  saved_state.load_params(stage, _state()["params"], step=damaged)


def test_a_damaged_checkpoint_with_none_before_it_is_refused_and_stays(tmp_path):
  whole = tmp_path / "whole"
  _save(whole, [5])
  for number, path in enumerate(_files(whole / "checkpoints" / "5")):
    stage = tmp_path / f"stage{number}"
    shutil.copytree(whole, stage)
    path = stage / path.relative_to(whole)
    _flip(path, np.random.default_rng(number))
    message = f"^{path} has other bytes than were saved, and there is no checkpoint before it. If"
    with pytest.raises(UserError, match=message) as error:
      with Checkpoints(stage, keep=2):
        pass
    assert (stage / "checkpoints" / "5").is_dir() and "\n" not in str(error.value)
    subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
    with Checkpoints(stage, keep=2) as checkpoints:
      assert checkpoints.latest_step() is None


def test_an_older_checkpoint_whose_metadata_are_damaged_is_refused_where_it_may_be_the_best(
  tmp_path,
):
  _save(tmp_path, [1, 2, 3], metrics={2: {"loss": 0.1}}, best_metric="loss")
  path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
  _flip(path, np.random.default_rng(0))
  with pytest.raises(UserError, match=f"^{path} has other bytes than were saved. If") as error:
    with Checkpoints(tmp_path, keep=2, best_metric="loss"):
      pass
  subprocess.run(str(error.value).split("`")[1], shell=True, check=True)
  with Checkpoints(tmp_path, keep=2, best_metric="loss") as checkpoints:
    assert checkpoints.latest_step() == 1
