"""Sources of in-memory tensors, and the folders that `transformers` answers were recorded for."""

import json
import pathlib
import zlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.models.interop import transfer
from instructjax.models.interop.hf_config import to_hf_config
from instructjax.models.interop.source import Source
from instructjax.parallel import sharding

GOLDEN_FOLDER = pathlib.Path(__file__).parents[2] / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "huggingface_logits.json").read_text())


def golden_weight(name: str, shape) -> np.ndarray:
  """The weights under which the golden numbers were recorded."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  is_norm = name.endswith(".weight") and len(shape) == 1
  return rng.normal(float(is_norm), 0.3, shape).astype(np.float32)


@pytest.fixture(params=GOLDEN["cases"])
def golden(request) -> dict:
  """One recorded model: config, shapes, logits of a right- and a left-padded batch."""
  return GOLDEN["cases"][request.param]


@pytest.fixture
def golden_folder(golden, tmp_path) -> pathlib.Path:
  """That model as `save_pretrained` writes it."""
  return write(tmp_path / "model", golden)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """A small Llama's folder, to be damaged."""
  return write(tmp_path / "model", GOLDEN["cases"]["llama3_untied"])


def made(shape, array) -> np.ndarray:
  """A tensor with the rows that its writer fills up with zeros."""
  return np.pad(array, ((0, shape[0] - len(array)), *((0, 0),) * (array.ndim - 1)))


def write(path: pathlib.Path, case: dict) -> pathlib.Path:
  path.mkdir()
  (path / "config.json").write_text(json.dumps(case["config"]))
  tensors = {name: golden_weight(name, shape) for name, shape in case["shapes"].items()}
  safetensors.numpy.save_file(tensors, path / "model.safetensors", {"format": "pt"})
  return path


@pytest.fixture(scope="session")
def one_device():
  """one_device(model): shardings of every parameter on a mesh of one device."""
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  return lambda model: models.param_shardings(mesh, model)[0]


@pytest.fixture
def make_source():
  """make_source(model, params) -> (Source, its tensors, names read so far)."""

  def one(model, params):
    named = transfer.named_tensors(model, params)
    tensors = {name: made(shape, make()) for name, shape, make in named}
    names_read = []

    def read_rows(name, start, stop):
      names_read.append(name)
      return tensors[name][start:stop].copy()

    source = Source(
      path=pathlib.Path("weights"),
      config=to_hf_config(model.network, model.vocab_size, model.head),
      shapes={name: array.shape for name, array in tensors.items()},
      read_rows=read_rows,
      files=(),
      notes=(),
    )
    return source, tensors, names_read

  return one
