"""The SFT benchmark: what counts as the same work, and the bound."""

import pathlib

import jax
import numpy as np
import pytest

from benchmarks import sft_step
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.parallel import sharding

OURS = {"parameters": 124439808, "tokens": 2048, "first_loss": 10.98}


@pytest.fixture(autouse=True)
def mesh_of_its_own():
  """The benchmarks set one for their whole process."""
  with jax.set_mesh(sharding.make_mesh(MeshConfig(1, -1, 1, 1))):
    yield


def check(**changes):
  sft_step.check_same_work({"a": {"description": OURS}, "b": {"description": OURS | changes}})


def test_same_work():
  check()
  check(first_loss=10.9)  # other random weights


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("parameters", OURS["parameters"] + 1),
    ("tokens", 2040),
    ("first_loss", 10.86),
    ("first_loss", 11.1),
    ("first_loss", float("nan")),
  ],
)
def test_other_work_is_refused(name, value):
  with pytest.raises(UserError, match=f"^b does other work than a: {name} "):
    check(**{name: value})


def test_a_peer_without_its_environment_is_refused(monkeypatch):
  monkeypatch.setitem(sft_step.PYTHON, "trl", pathlib.Path("nowhere/bin/python"))
  with pytest.raises(
    UserError, match="^--peer=trl needs nowhere/bin/python; run benchmarks/peers/"
  ):
    sft_step.commands(["execution.remat=none"], ["trl"], "tokens.npy")


def test_bound_by_hand():
  # 12 layers: 12 * 768 ** 2 weights in products, 13 * 768 in biases and norms; 2 * 768 in the last norm; a token's
  # logits 768 * 50257. Attention a layer and token: 2 * 256 * 768, the causal half of scores and mixing.
  layers = 12 * (12 * 768**2 + 13 * 768) + 2 * 768
  forward = 2048 * (2 * layers + 12 * 2 * 256 * 768) + 2040 * 2 * 768 * 50257
  seconds = 3 * forward / 1e9 + 124439808 * 6 * 4 / 1e8  # weight and two moments, read and written
  np.testing.assert_allclose(sft_step.bound_seconds(1e9, 1e8), seconds, rtol=1e-12)
