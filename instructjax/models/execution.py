"""How a network is run on the devices of a mesh: what stands for `auto` in an ExecutionConfig.

Called wherever a Model is made for devices: by the stages' context, opened weights, the planner and the benchmarks.
Nobody else asks which platform it is to choose how layers or attention are computed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from instructjax.core.config import ExecutionConfig, NetworkConfig
from instructjax.core.stages import Head
from instructjax.models import transformer
from instructjax.parallel import constraints


def resolve_execution(execution: ExecutionConfig, platform: str) -> ExecutionConfig:
  """`layers` and `attention` as they are on a platform: 'cpu', 'gpu' or 'tpu'.

  `decode_layout` may stay 'auto': it depends on the network too, and `model_on` chooses it.
  """
  layers, attention = execution.layers, execution.attention
  if layers == "auto":
    layers = "unroll" if platform == "cpu" else "scan"
  if attention == "auto":
    attention = "splash" if platform == "tpu" else "plain"
  return dataclasses.replace(execution, layers=layers, attention=attention)


def for_inference(platform: str) -> ExecutionConfig:
  """How opened weights are run: bfloat16 wherever it is not slower, nothing kept for a gradient."""
  dtype = "float32" if platform == "cpu" else "bfloat16"
  auto = ExecutionConfig(
    dtype=dtype, layers="auto", attention="auto", remat="none", decode_layout="auto"
  )
  return resolve_execution(auto, platform)


def platform_of(mesh: Mesh | AbstractMesh | None) -> str:
  """Platform of a mesh's devices, which need not be here; without a mesh, or a kind of devices, the process's own."""
  device = None if mesh is None else mesh.abstract_mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def model_on(
  mesh: Mesh | AbstractMesh | None,
  network: NetworkConfig,
  execution: ExecutionConfig,
  vocab_size: int,
  head: Head,
) -> transformer.Model:
  """The description of a network as it runs on `mesh`, with no `auto` left.

  Args:
    mesh: where to; None is one device, the process's default.
    network, vocab_size, head: as in `make_model`.
    execution: `auto` or not.
  Raises:
    UserError: `decode_layout='auto'`, and nobody knows the memory of such devices.
  """
  execution = resolve_execution(execution, platform_of(mesh))
  if execution.decode_layout != "auto":
    return transformer.make_model(network, execution, vocab_size, head)
  # One device splits nothing; there and where the copy fits, it is split over `tensor` only.
  execution = dataclasses.replace(execution, decode_layout="tensor")
  model = transformer.make_model(network, execution, vocab_size, head)
  memory = None if mesh is None else constraints.device_memory(mesh)
  if mesh is None or memory is None:
    return model
  axes, shapes = transformer.param_axes(model), transformer.param_shapes(model)
  itemsize = jnp.dtype(execution.dtype).itemsize
  layout = constraints.decode_layout(axes, shapes, itemsize, mesh, memory)
  return dataclasses.replace(model, execution=dataclasses.replace(execution, decode_layout=layout))
