"""What stands for `auto` on each kind of device."""

import dataclasses
import types

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from instructjax import models
from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError
from instructjax.models import execution
from instructjax.parallel import sharding
from tests import tiny

AUTO = dataclasses.replace(tiny.EXECUTION, layers="auto", attention="auto", decode_layout="auto")


@pytest.mark.parametrize(
  "platform, layers, attention",
  [("cpu", "unroll", "plain"), ("gpu", "scan", "plain"), ("tpu", "scan", "splash")],
)
def test_auto_by_platform(platform, layers, attention):
  chosen = models.resolve_execution(AUTO, platform)
  assert (chosen.layers, chosen.attention) == (layers, attention)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_what_is_not_auto_is_kept(platform):
  for asked in (dict(layers="scan", attention="plain"), dict(layers="unroll", attention="splash")):
    execution = dataclasses.replace(AUTO, **asked)
    assert models.resolve_execution(execution, platform) == execution


@pytest.mark.parametrize("platform, dtype", [("cpu", "float32"), ("gpu", "bfloat16")])
def test_inference_keeps_nothing_for_a_gradient(platform, dtype):
  execution = models.for_inference(platform)
  assert (execution.dtype, execution.remat) == (dtype, "none")
  assert (execution.layers, execution.attention) == (
    models.resolve_execution(AUTO, platform).layers,
    "plain",
  )


def test_the_mesh_decides_not_the_machine():
  """Of a mesh of TPUs, described on a host that has none."""
  device = AbstractDevice("TPU v5", None, platform="tpu")
  there = AbstractMesh((1, 1, 2, 1), sharding.MESH_AXES, abstract_device=device)
  here = sharding.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  describe = lambda mesh: models.model_on(mesh, tiny.GPT2, AUTO, 19, "lm").execution
  assert dataclasses.astuple(describe(there))[1:3] == ("scan", "splash")
  assert dataclasses.astuple(describe(here))[1:3] == ("unroll", "plain")
  assert describe(None) == describe(here)
  assert "auto" not in dataclasses.astuple(describe(there)) + dataclasses.astuple(describe(here))


def gpu(capability: str, kind="NVIDIA H100"):
  return types.SimpleNamespace(compute_capability=capability, device_kind=kind)


@pytest.mark.parametrize(
  "capability, head_dim, dtype, message",
  [
    ("9.0", 256, "bfloat16", ""),
    ("12.0", 64, "bfloat16", ""),
    ("8.0", 128, "bfloat16", ""),
    ("8.0", 136, "bfloat16", "a multiple of 8 and at most 128 on NVIDIA H100, not 136"),
    ("9.0", 264, "bfloat16", "at most 256"),
    ("9.0", 20, "bfloat16", "a multiple of 8"),
    ("9.0", 64, "float32", "needs config.execution.dtype='bfloat16', not 'float32'"),
    ("7.5", 64, "bfloat16", "of Ampere or later, not gpu (NVIDIA H100)"),
    ("gfx942", 64, "bfloat16", "of Ampere or later, not gpu (NVIDIA H100)"),
  ],
)
def test_what_cudnn_takes(capability, head_dim, dtype, message):
  network = dataclasses.replace(tiny.GPT2, head_dim=head_dim)
  check = lambda: execution._require_cudnn("gpu", gpu(capability), network, dtype)
  if not message:
    return check()
  with pytest.raises(UserError) as told:
    check()
  assert message in str(told.value) and "'plain'" in str(told.value)


def test_cudnn_is_refused_on_other_devices():
  device = AbstractDevice("TPU v5", None, platform="tpu")
  there = AbstractMesh((1, 1, 2, 1), sharding.MESH_AXES, abstract_device=device)
  asked = dataclasses.replace(AUTO, attention="cudnn")
  for mesh, platform in ((there, "tpu"), (None, "cpu")):
    with pytest.raises(
      UserError, match=f"needs NVIDIA GPUs of Ampere or later, not {platform}; use"
    ):
      models.model_on(mesh, tiny.GPT2, asked, 19, "lm")
