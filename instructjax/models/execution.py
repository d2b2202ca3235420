"""Resolves the `auto` settings of an ExecutionConfig for the devices of a mesh.

Called wherever a Model is made for devices: by the stages' context, opened weights, the planner and the benchmarks. No
other module chooses by the platform how layers are computed, or which attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from instructjax.core.config import AdapterConfig, ExecutionConfig, NetworkConfig
from instructjax.core.errors import UserError
from instructjax.core.stages import Head
from instructjax.models import cudnn, transformer
from instructjax.parallel import constraints, sharding


def resolve_execution(execution: ExecutionConfig, platform: str) -> ExecutionConfig:
  """Replaces `layers='auto'` and `attention='auto'` by what suits a platform.

  `decode_layout` may stay 'auto'. It also depends on the network's size, so `model_on` chooses it.

  Args:
    execution: with or without `auto`.
    platform: 'cpu', 'gpu' or 'tpu'.
  """
  # A scan compiles one layer for all. On a CPU it then copies each layer's weights out of the stack, which doubles the
  # time of a decode step (docs/performance.md, "How cost grows"). The splash kernel is Pallas code for TPUs; elsewhere
  # it is only interpreted.
  layers, attention = execution.layers, execution.attention
  if layers == "auto":
    layers = "unroll" if platform == "cpu" else "scan"
  if attention == "auto":
    attention = "splash" if platform == "tpu" else "plain"
  return dataclasses.replace(execution, layers=layers, attention=attention)


def why_no_trees(execution: ExecutionConfig) -> str:
  """Why attention does not take rows that hold trees (`structs.Trees`); '' if it does."""
  if execution.attention == "splash":
    return "splash attention takes segments only; execution.attention=plain would take trees"
  return ""


def for_inference(platform: str) -> ExecutionConfig:
  """The execution for opened weights, which are never trained.

  The dtype is float32 on a CPU, where bfloat16 is slower, and bfloat16 elsewhere.
  """
  # remat='none': without a gradient nothing is kept, so nothing could be recomputed.
  dtype = "float32" if platform == "cpu" else "bfloat16"
  auto = ExecutionConfig(
    dtype=dtype, layers="auto", attention="auto", remat="none", decode_layout="auto"
  )
  return resolve_execution(auto, platform)


def model_on(
  mesh: Mesh | AbstractMesh | None,
  network: NetworkConfig,
  execution: ExecutionConfig,
  vocab_size: int,
  head: Head,
  adapter: AdapterConfig | None = None,
) -> transformer.Model:
  """Describes a network as it runs on `mesh`, with every `auto` resolved.

  Args:
    mesh: the devices; None for one device, the process's default.
    network, vocab_size, head, adapter: as for `make_model`.
    execution: with or without `auto`.
  Raises:
    UserError: `decode_layout='auto'`, but the memory of such devices is not known; or `attention='cudnn'`, which the
      devices or the network do not allow.
    ValueError: see `make_model`.
  """
  execution = resolve_execution(execution, sharding.platform_of(mesh))
  if execution.attention == "cudnn":
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    _require_cudnn(sharding.platform_of(mesh), device, network, execution.dtype)
  if execution.decode_layout != "auto":
    return transformer.make_model(network, execution, vocab_size, head, adapter)
  # 'tensor' sends least in each decode step, so it is preferred. '2d' is for copies of the weights that would fill too
  # much of a device's memory. On CPUs and without a mesh there is no bound to keep.
  execution = dataclasses.replace(execution, decode_layout="tensor")
  model = transformer.make_model(network, execution, vocab_size, head, adapter)
  memory = None if mesh is None else constraints.device_memory(mesh)
  if mesh is None or memory is None:
    return model
  axes, shapes = transformer.param_axes(model), transformer.param_shapes(model)
  itemsize = jnp.dtype(execution.dtype).itemsize
  layout = constraints.decode_layout(axes, shapes, itemsize, mesh, memory)
  return dataclasses.replace(model, execution=dataclasses.replace(execution, decode_layout=layout))


def _require_cudnn(platform: str, device, network: NetworkConfig, dtype: str):
  """Checks that cuDNN's attention takes this network on these devices.

  Source of the limits: `check_is_flash_attention` in JAX's cudnn/fused_attention_stablehlo.py.

  Raises:
    UserError: it does not.
  """
  where = "config.execution.attention='cudnn'"
  mend = "use 'auto' or 'plain'"
  # Of an AMD GPU, the capability is a name such as gfx942.
  capability = getattr(device, "compute_capability", "") if platform == "gpu" else ""
  numbers = capability.split(".")
  if not all(number.isdecimal() for number in numbers) or int(numbers[0]) < 8:
    kind = f"{platform} ({device.device_kind})" if platform == "gpu" else platform
    raise UserError(f"{where} needs NVIDIA GPUs of Ampere or later, not {kind}; {mend}")
  if dtype != "bfloat16":
    raise UserError(f"{where} needs config.execution.dtype='bfloat16', not {dtype!r}; or {mend}")
  most = cudnn.MAX_HEAD_DIM if int(numbers[0]) >= 9 else cudnn.MAX_HEAD_DIM // 2
  if network.head_dim > most or network.head_dim % cudnn.HEAD_DIM_STEP:
    raise UserError(
      f"{where} needs a head_dim that is a multiple of {cudnn.HEAD_DIM_STEP} and at most {most} on"
      f" {device.device_kind}, not {network.head_dim}; {mend}"
    )
