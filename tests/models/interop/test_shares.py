"""Which rows a process reads of a tensor, and that the shards hold the same numbers whoever reads them."""

import dataclasses

import jax
import numpy as np
import pytest

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.models.interop import shares, tensor_table, transfer
from instructjax.parallel import sharding
from tests import tiny

FAMILIES = ["gpt2", "llama", "gpt_neox"]


@pytest.fixture
def asked(monkeypatch):
  """(name, first row, last row) of every exchange's reading, with every tensor that is large enough exchanged.

  The eight devices stand in for as many processes: each asks for its own rows.
  """
  monkeypatch.setattr(shares, "is_scattered", lambda part, shape, place: len(part.unfold) > 1)
  return []


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exchanged_shards_are_those_of_the_file(family, layers, asked, make_source, request):
  cfg = tiny.FAMILIES[family] if family in tiny.FAMILIES else request.getfixturevalue(family)
  model = tiny.make_model(cfg, 19, "lm", layers=layers)
  params = models.init_params(model, jax.random.key(0))
  source, tensors, _ = make_source(model, params)

  def read_rows(name, first, last):
    asked.append((name, first, last))
    return source.read_rows(name, first, last)

  mesh = sharding.make_mesh(MeshConfig(slice=1, data=2, fsdp=2, tensor=2))
  places, _ = models.param_shardings(mesh, model)
  loaded = transfer.load_params(dataclasses.replace(source, read_rows=read_rows), model, places)
  assert jax.tree.map(lambda x: x.sharding, loaded) == places
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  # Each row of a matrix was read once, by whichever device.
  for name in {name for name, _, _ in asked if tensors[name].ndim > 1}:
    rows = sorted((first, last) for other, first, last in asked if other == name)
    assert [first for first, _ in rows] == [0, *(last for _, last in rows[:-1])], name
    assert rows[-1][1] == len(tensors[name]) and len(rows) > 1, name


class Far:
  """A sharding over other processes' devices, too: this process has the first half of one dimension."""

  is_fully_addressable = False

  def __init__(self, axis):
    self.axis = axis

  def shard_shape(self, shape):
    return tuple(size // 2 if axis == self.axis else size for axis, size in enumerate(shape))


def tensor_of(cfg, name, **changes):
  model = tiny.make_model(dataclasses.replace(cfg, **changes), 19, "lm")
  return next(t for t in tensor_table.tensors(model) if t.name.endswith(name))


@pytest.mark.parametrize(
  "name, rows, axis, unit",
  [
    # d_model 16, 4 heads of 4 in 2 groups, d_mlp 24. [GRK, D] -> DGRK: a group is 8 rows, and half of them one group.
    ("0.self_attn.q_proj.weight", (0, 8), 1, 8),
    ("0.self_attn.k_proj.weight", (0, 4), 1, 4),
    ("0.mlp.gate_proj.weight", (0, 12), 2, 1),  # [F, D] -> D1F
    ("0.mlp.down_proj.weight", (0, 8), 1, 1),  # [D, F] -> FD: split over fsdp, along D
    ("embed_tokens.weight", (0, 19), None, 1),  # [V, D] -> VD: split along D, that is by columns
  ],
)
def test_rows_of_a_half_by_hand(llama, name, rows, axis, unit):
  part = tensor_of(llama, name)
  sizes = [part.unfold[i] for i in part.order]
  split = axis if axis is not None else 1
  outer = tuple(slice(0, size // 2 if i == split else size) for i, size in enumerate(sizes))
  first, last, own, step = shares._rows_of(part, [outer])
  assert (first, last) == rows
  assert axis is None or (own, step) == (axis, unit)


def test_only_columns_are_exchanged(llama, monkeypatch):
  monkeypatch.setattr(shares, "_SMALL", 0)
  part = tensor_of(llama, "0.self_attn.q_proj.weight")
  shape = (3, 16, 2, 4, 4)  # of the stack w_qkv_DGQK
  assert shares.is_scattered(part, shape, Far(1)), "along D, its columns"
  assert not shares.is_scattered(part, shape, Far(2)), "along G, runs of its rows"
  assert not shares.is_scattered(part, shape, Far(None)), "not split at all: every process needs it"
  monkeypatch.setattr(shares, "_SMALL", 1 << 20)
  assert not shares.is_scattered(part, shape, Far(1)), "small"
