"""compiled/: whose programs are run, and what becomes of half-written ones."""

import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache, compiler

from instructjax.parallel import compiled

_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def as_before():
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def _owned_by(monkeypatch, owner, *names):
  """As if these folders belonged to another user: only root can give them away."""
  stat = os.stat

  def other(path, **kwargs):
    found = stat(path, **kwargs)
    if pathlib.Path(path).name not in names:
      return found
    return os.stat_result([*found[:4], owner, *found[5:10]])

  monkeypatch.setattr(os, "stat", other)


def _keep(workdir, capsys):
  compiled.keep_programs(workdir)
  return jax.config.jax_compilation_cache_dir, capsys.readouterr().err


def test_a_workdir_of_ones_own_keeps_programs(tmp_path, capsys):
  assert _keep(tmp_path / "new" / "run", capsys) == (str(tmp_path / "new" / "run" / "compiled"), "")
  (tmp_path / "compiled").mkdir()
  assert _keep(tmp_path, capsys) == (str(tmp_path / "compiled"), "")


@pytest.mark.parametrize("name", ["run", "compiled"])
def test_programs_of_another_user_are_not_run(tmp_path, monkeypatch, capsys, name):
  workdir = tmp_path / "run"
  (workdir / "compiled").mkdir(parents=True)
  with monkeypatch.context() as patch:
    _owned_by(patch, os.geteuid() + 1, name)
    folder, told = _keep(workdir, capsys)
  assert folder is None
  assert told.count("\n") == 1 and f"{name} belongs to another user" in told
  assert list((workdir / "compiled").iterdir()) == []


@pytest.mark.parametrize(("mode", "is_used"), [(0o777, False), (0o775, True), (0o1777, True)])
def test_a_folder_that_every_user_may_write_to(tmp_path, capsys, mode, is_used):
  workdir = tmp_path / "run"
  workdir.mkdir()
  workdir.chmod(mode)
  folder, told = _keep(workdir, capsys)
  assert (folder is not None) == is_used
  assert ("every user may write to" in told) != is_used


@pytest.mark.parametrize("left", ["half", "empty", "junk"])
def test_half_written_programs_are_made_again_in_silence(tmp_path, capfd, left):
  make = lambda: jax.jit(lambda x: jnp.sin(x) * 3)  # a new one each time, as in a new process
  compiled.keep_programs(tmp_path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  expected = make()(jnp.float32(2.0))
  entries = list((tmp_path / "compiled").glob("*-cache"))
  whole = {path: path.read_bytes() for path in entries}
  assert whole
  for path, data in whole.items():
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "junk": bytes(200)}[left])
  jax.clear_caches()
  compilation_cache.reset_cache()
  with warnings.catch_warnings():
    compiled.keep_programs(tmp_path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert not list((tmp_path / "compiled").glob("*-cache"))
    assert make()(jnp.float32(2.0)) == expected
  assert set((tmp_path / "compiled").glob("*-cache")) >= set(whole)
  assert capfd.readouterr().err == ""


def test_what_a_gpus_autotuning_found_is_kept_too(tmp_path):
  """XLA is told where by JAX's compile options; on a CPU they have no effect."""
  compiled.keep_programs(tmp_path)
  options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
  flags = options.executable_build_options.debug_options
  folder = tmp_path / "compiled" / "xla_gpu_per_fusion_autotune_cache_dir"
  assert flags.xla_gpu_per_fusion_autotune_cache_dir == str(folder)
