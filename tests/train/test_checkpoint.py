"""What is saved, kept, restored and refused; full disks and damaged files."""

import functools
import gc
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from instructjax.core.errors import UserError
from instructjax.core.structs import TrainState
from instructjax.train import checkpoint, manifest, saved_state
from instructjax.train.checkpoint import Checkpoints
from instructjax.train.damaged import saved_steps

FINGERPRINT = {"config": "c" * 64, "tokenizer": "t" * 64}


def _state(seed=0, width=8):
  key = jax.random.key(seed)
  params = {"w_DF": jax.random.normal(key, (width, 4)), "bias": jnp.zeros((4,))}
  return TrainState(
    step=jnp.int32(0), params=params, opt_state=optax.adam(1e-3).init(params), key=key
  )


def _save(directory, steps, state=None, *, keep=10, metrics=None, **kwargs):
  with Checkpoints(directory, keep=keep, **kwargs) as checkpoints:
    for step in steps:
      values = (metrics or {}).get(step, {})
      checkpoints.save(step, state or _state(), {"row": step}, values, FINGERPRINT, {})


def _host(tree):
  as_data = lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf
  return jax.tree.map(lambda leaf: np.array(as_data(leaf)), tree)


def _is_key(leaf):
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  jax.tree.map(np.testing.assert_array_equal, _host(left), _host(right))


def test_only_stacks_of_layers_are_cut_by_layers(monkeypatch):
  """So that a reader of one layer decodes no other. Small arrays are not cut."""
  monkeypatch.setattr(checkpoint, "_CUT", 8)
  wide = np.zeros((2, 4), np.float32)
  found = checkpoint._chunks({"layers": {"w": wide, "b": wide[0, :2]}, "table": wide})
  axes = jax.tree.map(lambda args: args.shard_axes, found)
  assert axes == {"layers": {"w": (0,), "b": ()}, "table": ()}


def test_what_a_checkpoint_took_is_told_once(tmp_path):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.written() == {}
    checkpoints.save(3, _state(), {}, {}, FINGERPRINT, {})
    checkpoints.wait()
    told = checkpoints.written()
    assert checkpoints.written() == {}
  folder = tmp_path / "checkpoints" / "3"
  files = [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME]
  assert told.keys() == {"checkpoint/seconds", "checkpoint/bytes"}
  assert told["checkpoint/bytes"] == sum(path.stat().st_size for path in files)
  assert 0 <= told["checkpoint/seconds"] < 60


def test_everything_comes_back(tmp_path):
  state = _state(seed=3)
  expected = _host(state)
  _save(tmp_path, [7], state)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.latest_step() == 7
    fresh = _state(seed=4)
    restored, position = checkpoints.restore(7, fresh, FINGERPRINT)
  assert position == {"row": 7}
  assert restored.key.dtype == state.key.dtype
  jax.tree.map(np.testing.assert_array_equal, expected, _host(restored))
  assert fresh.params["w_DF"].is_deleted()  # no second copy is held while restoring


def test_donating_the_state_right_after_save_is_safe(tmp_path):
  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    return jax.tree.map(lambda x: x * 1.5 + 1, state)

  state = {f"w{i}": jnp.full((400, 400), float(i)) for i in range(8)}
  expected = {}
  with Checkpoints(tmp_path, keep=10) as checkpoints:
    for number in range(1, 5):
      state = step(state)
      expected[number] = float(state["w3"][0, 0])
      checkpoints.save(number, state, {}, {}, FINGERPRINT, {})
      for _ in range(3):
        state = step(state)
  for number, value in expected.items():
    w = saved_state.load_params(
      tmp_path, jax.ShapeDtypeStruct((400, 400), "float32"), number, name="w3"
    )
    np.testing.assert_array_equal(w, np.full((400, 400), value, np.float32))


def test_keeps_newest_named_and_best(tmp_path):
  metrics = {step: {"validation/loss": abs(step - 3)} for step in (1, 2, 3, 4, 6)}
  options = dict(keep=2, keep_steps=(1,), best_metric="validation/loss")
  _save(tmp_path, [1, 2, 3, 4, 5], metrics=metrics, **options)
  assert saved_steps(tmp_path) == [1, 3, 4, 5]
  _save(tmp_path, [6, 7], metrics=metrics, **options)  # the best is known after a restart
  assert saved_steps(tmp_path) == [1, 3, 6, 7]
  assert saved_state.best_step(tmp_path, "validation/loss") == (3, 0)
  with pytest.raises(UserError, match="validation/accuracy"):
    saved_state.best_step(tmp_path, "validation/accuracy")


def test_another_run_is_refused_by_name_and_hash(tmp_path):
  _save(tmp_path, [1])
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    with pytest.raises(ValueError, match=r"another tokenizer \(tttttttt, this run has ffffffff\)"):
      checkpoints.restore(1, _state(), FINGERPRINT | {"tokenizer": "f" * 64})
    with pytest.raises(ValueError, match=r"another reference \(none, this run has 12345678\)"):
      checkpoints.restore(1, _state(), FINGERPRINT | {"reference": "123456789"})
    checkpoints.restore(1, _state(), FINGERPRINT)


def test_a_position_of_another_form_is_refused(tmp_path):
  _save(tmp_path, [1])
  data = tmp_path / "checkpoints" / "1" / "data" / "metadata"
  assert json.loads(data.read_text()).keys() == {"position"}
  data.write_text(json.dumps({"processes": [{"row": 7}, {"row": 7}]}))
  manifest.write(tmp_path / "checkpoints" / "1")  # no damage, but another version's
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    with pytest.raises(UserError, match="cannot read .*checkpoints/1: 'position'"):
      checkpoints.restore(1, _state(), FINGERPRINT)


def test_half_written_checkpoints_are_passed_over(tmp_path):
  _save(tmp_path, [4])
  folder = tmp_path / "checkpoints"
  (folder / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  (folder / "8.orbax-checkpoint-tmp" / "state" / "d").write_bytes(b"x" * 100)
  (folder / "6" / "state").mkdir(parents=True)
  assert saved_steps(tmp_path) == [4]
  with Checkpoints(tmp_path, keep=5) as checkpoints:
    assert checkpoints.latest_step() == 4
    # 10 GB of a large model, say, which nobody would read again.
    assert not (folder / "8.orbax-checkpoint-tmp").exists()
    for step in (6, 8):
      checkpoints.save(step, _state(), {}, {}, FINGERPRINT, {})
  assert saved_steps(tmp_path) == [4, 6, 8]
  assert (folder / "6.incomplete" / "state").is_dir()  # not ours to delete


def test_a_full_disk_is_found_before_writing(tmp_path, monkeypatch):
  _save(tmp_path, [1])
  usage = shutil.disk_usage(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    path = tmp_path / "checkpoints" / "2"
    with pytest.raises(
      UserError, match=f"cannot write {path}: it needs .* MiB and the disk has 0.0 MiB left"
    ):
      _save(tmp_path, [2])
  assert saved_steps(tmp_path) == [1]
  _save(tmp_path, [2])
  assert saved_steps(tmp_path) == [1, 2]


def test_a_disk_that_fills_while_writing_loses_nothing(tmp_path):
  big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32))}
  expected = np.array(big["w"])
  _save(tmp_path, [1], big, keep=1)
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limit[1]))  # no file may grow beyond 2 MB
  try:
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/checkpoints/2: .*File too large"):
      _save(tmp_path, [2], big, keep=1)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert saved_steps(tmp_path) == [1]
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    restored, _ = checkpoints.restore(checkpoints.latest_step(), big, FINGERPRINT)
  np.testing.assert_array_equal(restored["w"], expected)


def test_what_cannot_be_read_although_it_is_undamaged_is_one_line(tmp_path, capfd):
  rng = np.random.default_rng(0)
  # One array: of many, orbax 0.12 leaves the other reads hanging, which complain at any later time.
  make = lambda: {"w": jnp.asarray(rng.normal(size=(100, 100)))}
  _save(tmp_path, [1], make())
  for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
    if path.is_file() and path.stat().st_size > 10_000:
      os.truncate(path, 5000)
  manifest.write(tmp_path / "checkpoints" / "1")
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    with pytest.raises(
      UserError, match="cannot read .*/checkpoints/1: .*other versions of the lib"
    ):
      checkpoints.restore(1, make(), FINGERPRINT)
  with pytest.raises(UserError, match="cannot read .*/checkpoints/1: .*other versions of the lib"):
    saved_state.load_state_item(tmp_path, make())
  gc.collect()  # what was left hanging would complain now
  assert capfd.readouterr().err == ""


def test_saving_and_loading_say_nothing(tmp_path, capfd, caplog):
  level = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.INFO)  # as under absl.app.run
  try:
    _save(tmp_path, [1, 2], keep=1)
    saved_state.load_params(tmp_path, _state().params)
    assert absl_logging.get_verbosity() == absl_logging.INFO
  finally:
    absl_logging.set_verbosity(level)
  assert capfd.readouterr() == ("", "")
  assert caplog.records == []
