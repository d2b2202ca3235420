"""Where an export takes a network's numbers from, one tensor of Hugging Face's at a time.

Parameters in memory, an opened file, or an adapter on one of these; train/streams.py adds the checkpoint of a stage.
Called by transfer.py, by the package's own `__init__` and by train/streams.py.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from instructjax.core.structs import Params
from instructjax.models.interop import peft_factors, tensor_table
from instructjax.models.transformer import Model

_ROWS = 1 << 22  # numbers of a product that are computed at a time


@dataclasses.dataclass(frozen=True)
class Stored:
  """A network's tensors, wherever they are.

  Attributes:
    read: gives a tensor in Hugging Face's layout, float32 on the host; nothing else of it stays in host memory.
    score_bias: of a scalar head, the bias, for which Hugging Face has no tensor; 0 for a language model.
  """

  read: Callable[[tensor_table.Tensor], np.ndarray]
  score_bias: float = 0.0


def of_params(model: Model, params: Params) -> Stored:
  """Parameters in the memory of a host or of devices."""
  flat = tensor_table.leaves(params)
  is_list = isinstance(params["layers"], list)

  def read(tensor: tensor_table.Tensor) -> np.ndarray:
    tensor = tensor.alone() if is_list else tensor
    array = flat[tensor.param]
    if tensor.layer is not None:
      # The index is an array, not a Python number, so one compiled program serves all layers.
      array = jax.lax.dynamic_index_in_dim(array, np.int32(tensor.layer), keepdims=False)
    return tensor.to_theirs(np.asarray(array, np.float32))

  is_scalar = model.head == "scalar"
  return Stored(read, float(flat[tensor_table.SCORE_BIAS_PATH]) if is_scalar else 0.0)


def with_adapter(base: Stored, model: Model, trained: Params) -> Stored:
  """An adapter merged into its base, W + alpha / rank * A B, tensor by tensor as they are read.

  Args:
    base: of the whole network, with any head.
    model: with the adapter.
    trained: the adapter tree, with its head if that is scalar.
  """
  cfg = model.require_adapter()
  factors = {one.name: array for one, array in peft_factors.from_params(model, trained)}
  flips = model.network.position == "learned"  # GPT-2's matrices are [in, out]
  head = trained.get("head") if model.head == "scalar" else None

  def read(tensor: tensor_table.Tensor) -> np.ndarray:
    if head is not None and tensor.param == "head/w_D":
      return np.asarray(head["w_D"], np.float32).reshape(tensor.shape)
    weight, name = base.read(tensor), tensor.name.removesuffix(".weight")
    if f"{name}.lora_A.weight" not in factors:
      return weight
    a, b = (factors[f"{name}.lora_{letter}.weight"] for letter in "AB")
    scaled = b * np.float32(cfg.alpha / cfg.rank)
    left, right = (a.T, scaled.T) if flips else (scaled, a)
    weight = np.array(weight)  # what a base gives may be read-only
    step = max(_ROWS // weight.shape[1], 1)
    for first in range(
      0, len(weight), step
    ):  # so that the product is not in memory beside the weight
      rows = slice(first, first + step)
      weight[rows] += left[rows] @ right
    return weight

  return Stored(read, float(head["bias"]) if head is not None else 0.0)
