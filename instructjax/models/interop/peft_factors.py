"""Which of peft's tensors holds which factor of an adapter, and in which order of dimensions.

In `peft`, a Linear (or GPT-2's Conv1D) with a matrix of `in` inputs and `out` outputs has lora_A of [rank, in] and
lora_B of [out, rank]. The dimensions that the matrix joins are taken apart as tensor_table.py says. Called by the
package's own modules. Reads no file.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from instructjax.core.structs import Params
from instructjax.models import adapters
from instructjax.models.interop import tensor_table
from instructjax.models.transformer import Model


@dataclasses.dataclass(frozen=True)
class Factor:
  """One tensor of an adapter file and its place in an adapter tree.

  Attributes:
    name: as `model.layers.0.self_attn.q_proj.lora_A.weight`, without peft's own prefix.
    shape: of their tensor.
    path: of our stack of the factor, from the layers on: block, part, leaf.
    layer: index into the stack.
    unfold: their shape with joined dimensions taken apart.
    order: the transposition that takes the unfolded tensor to our order.
    ours: the shape of our factor, in one layer.
  """

  name: str
  shape: tuple[int, int]
  path: tuple[str, str, str]
  layer: int
  unfold: tuple[int, ...]
  order: tuple[int, ...]
  ours: tuple[int, ...]

  def to_ours(self, tensor: np.ndarray) -> np.ndarray:
    """One layer of our factor, from their tensor."""
    return tensor.reshape(self.unfold).transpose(self.order).reshape(self.ours)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Their tensor, from one layer of our factor."""
    apart = np.reshape(array, [self.unfold[axis] for axis in self.order])
    return apart.transpose(np.argsort(self.order)).reshape(self.shape)


def module_of(name: str) -> str:
  """The name by which peft's target_modules finds the module of a tensor: `q_proj` of `...self_attn.q_proj.weight`."""
  return name.removesuffix(".weight").rpartition(".")[2]


def factors(model: Model) -> tuple[Factor, ...]:
  """Every tensor of the model's adapter, A and B of each matrix in turn."""
  rank = model.require_adapter().rank
  found = []
  for tensor in tensor_table.listed(model.network, model.vocab_size, model.head):
    part = _part_of(model, tensor)
    if part is None:
      continue
    # Our dimensions of one layer's weight, as indices into the unfolded tensor of theirs.
    inputs, outputs = tensor.order[: part.inputs], tensor.order[part.inputs :]
    stem, size = tensor.name.removesuffix(".weight"), tensor.unfold
    for letter, ours in (("a", inputs), ("b", outputs)):
      theirs = sorted(ours)
      sizes, joined = tuple(size[axis] for axis in theirs), math.prod(size[axis] for axis in theirs)
      order = tuple(theirs.index(axis) for axis in ours)
      kept = tuple(
        size[axis]
        for axis, where in zip(ours, tensor.part[_span(part, letter)])
        if not (part.squeezed and where != slice(None))
      )
      leaf = f"w_{letter}_{part.dims[letter == 'b']}"
      path = (part.block, part.name, leaf)
      if letter == "a":  # [rank, inputs] -> [inputs, rank]
        shape, unfold = (rank, joined), (rank, *sizes)
        order, mine = (*(axis + 1 for axis in order), 0), (*kept, rank)
      else:  # [outputs, rank] -> [rank, outputs]
        shape, unfold = (joined, rank), (*sizes, rank)
        order, mine = (len(sizes), *order), (rank, *kept)
      name = f"{stem}.lora_{letter.upper()}.weight"
      found.append(Factor(name, shape, path, tensor.layer or 0, unfold, order, mine))
  return tuple(found)


def _span(part: adapters.Part, letter: str) -> slice:
  """The dimensions of a weight that belong to A, its inputs, or to B, its outputs."""
  return slice(0, part.inputs) if letter == "a" else slice(part.inputs, None)


def _part_of(model: Model, tensor: tensor_table.Tensor) -> adapters.Part | None:
  """The adapted part whose numbers a tensor holds; None if it is not adapted."""
  for part in adapters.adapted(model):
    if tensor.param != f"layers/{part.block}/{part.weight}":
      continue
    if part.where is None or tensor.part[part.where[0]] == slice(*part.where[1:]):
      return part
  return None


def to_params(model: Model, read: Callable[[Factor], np.ndarray]) -> Params:
  """The layers of an adapter tree from its tensors; float32 on the host.

  Args:
    model: with the adapter.
    read: gives a factor's tensor.
  """
  stacks: dict = {}
  for factor in factors(model):
    block, part, leaf = factor.path
    layers = stacks.setdefault(block, {}).setdefault(part, {}).setdefault(leaf, [])
    layers.append(factor.to_ours(np.asarray(read(factor), np.float32)))
  return jax.tree.map(np.stack, stacks, is_leaf=lambda node: isinstance(node, list))


def from_params(model: Model, trained: Params) -> list[tuple[Factor, np.ndarray]]:
  """The tensors of an adapter tree in peft's layout, float32 on the host."""

  def one(factor: Factor) -> np.ndarray:
    block, part, leaf = factor.path
    return factor.to_theirs(
      np.asarray(trained["layers"][block][part][leaf][factor.layer], np.float32)
    )

  return [(factor, one(factor)) for factor in factors(model)]
