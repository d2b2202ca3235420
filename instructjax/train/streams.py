"""Weights one tensor at a time, for exports: nothing of the network's size comes into the host's memory.

Called by serve/packaging.py. Reads slices of a checkpoint's arrays with tensorstore, beside orbax, which restores whole
arrays only. Imports no stage.
"""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from jax.sharding import Mesh

from instructjax.models import interop, transformer
from instructjax.train import reading, saved_state
from instructjax.train.weights import Weights


class SavedArrays:
  """The arrays of a checkpoint, read in slices.

  Args:
    directory: folder of a stage.
    step: step of a checkpoint.
  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """

  def __init__(self, directory: pathlib.Path, step: int):
    self.path = saved_state.require_whole(directory, step)
    self._open: dict[str, Any] = {}
    self._whole: dict[str, np.ndarray] = {}

  def read(self, name: str, index: tuple, order: Sequence[int] | None = None) -> np.ndarray:
    """A slice of an array as float32, with its dimensions in another order.

    Args:
      name: as `params.layers.mlp.w_up_DF`.
      index: numbers and slices, for all dimensions.
      order: the transposition of what `index` leaves; None for none.
    Raises:
      UserError: the array is not there, or cannot be read.
    """

    def slice_of_it() -> np.ndarray:
      array = self._array(name)
      if not index:
        return np.asarray(array.read().result(), np.float32)
      chunk = array.chunk_layout.read_chunk.shape
      if isinstance(index[0], int) and chunk[0] > 1:
        # Small, or saved before large arrays were cut by layers: a chunk of many layers is decoded once, not for each.
        if name not in self._whole:
          self._whole[name] = np.asarray(array.read().result(), np.float32)
        found = self._whole[name][index]
        return found if order is None else np.ascontiguousarray(found.transpose(order))
      return _by_chunks(array, index, order)

    return reading.read(self.path, slice_of_it, advice=saved_state.NOT_DAMAGED)

  def _array(self, name: str) -> Any:
    if name not in self._open:
      folder = {"driver": "file", "path": f"{self.path}/state/"}  # in a URL, % and # mean something
      base = {"driver": "ocdbt", "base": folder, "path": f"{name}/"}
      self._open[name] = ts.open({"driver": "zarr", "kvstore": base}, open=True).result()
    return self._open[name]


def _by_chunks(array: Any, index: tuple, order: Sequence[int] | None) -> np.ndarray:
  """`array[index]`, one chunk after the other: tensorstore would have all of them in memory, encoded and decoded."""
  bounds = [
    (at, at + 1) if isinstance(at, int) else at.indices(size)[:2]
    for at, size in zip(index, array.shape, strict=True)
  ]
  cells = [
    [
      (max(start, cell), min(stop, cell + chunk))
      for cell in range(start // chunk * chunk, stop, chunk)
    ]
    for (start, stop), chunk in zip(bounds, array.chunk_layout.read_chunk.shape, strict=True)
  ]
  kept = [axis for axis, at in enumerate(index) if not isinstance(at, int)]
  order = range(len(kept)) if order is None else order
  result = np.empty([bounds[kept[axis]][1] - bounds[kept[axis]][0] for axis in order], np.float32)
  ours = result.transpose(np.argsort(order))
  for cell in itertools.product(*cells):
    found = array[tuple(slice(*one) for one in cell)].read().result()
    place = tuple(
      slice(cell[axis][0] - bounds[axis][0], cell[axis][1] - bounds[axis][0]) for axis in kept
    )
    ours[place] = found.reshape(ours[place].shape)
  return result


def stored(opened: Weights, mesh: Mesh, model: transformer.Model) -> interop.Stored:
  """Where the weights' tensors are, to be read one at a time; those of a reward model include its bias (C.2).

  Args:
    opened: the weights.
    mesh: for an adapter's own factors, which are small.
    model: a network of this architecture.
  Raises:
    UserError: the files cannot be read, or do not hold this model's parameters.
  """
  if opened.kind != "stage":
    return interop.stored_in(interop.open_weights(opened.path), model)
  if opened.adapter is not None:
    adapted, trained = opened.load_trained(mesh, model)
    base = opened.require_base()
    return interop.with_adapter(stored(base, mesh, model.clone(head=base.head)), adapted, trained)
  arrays, item = SavedArrays(opened.path, opened.require_step()), opened.item
  saved_state.require_shapes(arrays.path, {item: transformer.param_shapes(model)})
  read = functools.partial(tensor_of, arrays, item)
  if model.head != "scalar":
    return interop.Stored(read)
  bias = arrays.read(f"{item}.{interop.SCORE_BIAS_PATH.replace('/', '.')}", ())
  return interop.Stored(read, float(bias) - opened.shift)


def tensor_of(arrays: SavedArrays, item: str, tensor: interop.Tensor) -> np.ndarray:
  """A tensor in Hugging Face's layout from the weights `item` of a checkpoint; errors as `SavedArrays.read`."""
  layer = () if tensor.layer is None else (tensor.layer,)
  name = f"{item}.{tensor.param.replace('/', '.')}"
  found = arrays.read(name, (*layer, *tensor.part), np.argsort(tensor.order).tolist())
  return found.reshape(tensor.shape)
