"""Slices of a checkpoint's arrays, and that an export from them is that of whole parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models
from instructjax.core.errors import UserError
from instructjax.models.interop import stored as interop_stored
from instructjax.models.interop import tensor_table
from instructjax.train import checkpoint, streams
from tests import tiny


def save(folder, params):
  with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, {"params": params}, None, {}, {}, {})


@pytest.fixture
def cut(monkeypatch):
  """Arrays of more than 256 bytes are cut, into chunks of 1 MiB at most, for small ones to be cut as large ones are."""
  monkeypatch.setattr(checkpoint, "_CUT", 256)
  monkeypatch.setattr(checkpoint, "_CHUNK", 1 << 20)


def test_slices_of_arrays(tmp_path, cut):
  rng = np.random.default_rng(0)
  layers = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
  table = rng.normal(size=(7, 40)).astype(np.float32)
  vector = np.arange(3.0, dtype=np.float32)
  save(tmp_path, {"layers": {"w": jnp.asarray(layers)}, "v": vector, "table": table})
  arrays = streams.SavedArrays(tmp_path, 1)
  every = slice(None)
  found = arrays.read("params.layers.w", (1, every, slice(1, 3), every), (2, 0, 1))
  np.testing.assert_array_equal(found, layers[1, :, 1:3].transpose(2, 0, 1), strict=True)
  assert found.flags.c_contiguous
  assert not arrays._whole, "cut by layers: no other was read"
  np.testing.assert_array_equal(arrays.read("params.table", (every, slice(3, 9))), table[:, 3:9])
  np.testing.assert_array_equal(arrays.read("params.v", ()), vector)
  with pytest.raises(UserError, match="cannot read .*/checkpoints/1"):
    arrays.read("params.none", ())


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b", "a?b"])
def test_a_folder_may_have_any_name(tmp_path, name):
  save(tmp_path / name, {"w": jnp.arange(3.0)})
  found = streams.SavedArrays(tmp_path / name, 1).read("params.w", (slice(1, 3),))
  np.testing.assert_array_equal(found, [1.0, 2.0])


def test_a_chunk_of_many_layers_is_decoded_once(tmp_path):
  layers = np.arange(24.0, dtype=np.float32).reshape(3, 2, 4)
  save(tmp_path, {"layers": {"w": jnp.asarray(layers)}})
  arrays = streams.SavedArrays(tmp_path, 1)
  for layer in (2, 0):
    found = arrays.read("params.layers.w", (layer, slice(None), slice(1, 3)), (1, 0))
    np.testing.assert_array_equal(found, layers[layer, :, 1:3].T)
  assert list(arrays._whole) == ["params.layers.w"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
  save(tmp_path, {"layers": {"w": jnp.ones((2, 3))}})
  (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").write_bytes(b"{}")
  with pytest.raises(UserError, match="has another size than was saved"):
    streams.SavedArrays(tmp_path, 1)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_tensors_of_a_checkpoint_are_those_of_its_parameters(tmp_path, cut, family):
  model = tiny.make_model(tiny.FAMILIES[family], 19, "lm", layers="scan")
  params = models.init_params(model, jax.random.key(1))
  save(tmp_path, params)
  arrays = streams.SavedArrays(tmp_path, 1)
  whole = interop_stored.of_params(model, params)
  for tensor in tensor_table.tensors(model):
    np.testing.assert_array_equal(
      streams.tensor_of(arrays, "params", tensor), whole.read(tensor), strict=True
    )
