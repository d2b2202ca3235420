"""Parameters from an opened source's tensors, and tensors for a file from parameters.

`load_params` builds sharded parameters, `named_tensors` takes parameters apart for the writers; where
each number goes is tensor_table.py's to say. Called by the package's own `__init__`, huggingface.py
and gguf_export.py. Imports no stage and no data.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from instructjax.core.errors import UserError
from instructjax.core.structs import Params
from instructjax.models.interop import tensor_table
from instructjax.models.interop.hf_config import PAD_ROW, SCORE_BIAS
from instructjax.models.interop.source import Source
from instructjax.models.transformer import Model, param_shapes
from instructjax.parallel import stacking

# --- in -------------------------------------------------------------------------------------------


def load_params(source: Source, model: Model, shardings: Params) -> Params:
  """The model's parameters, each tensor read once and written straight into the local shards.

  Host memory: one tensor of the source, besides the shards of this process. The largest parameters
  come first, so that what a transfer needs besides is freed before the rest is there.

  Args:
    source: opened weights.
    model: of the architecture that `describe(source)` gives. With a smaller vocabulary than the
      tables have rows, the rest (padding that no text encodes to) is dropped.
    shardings: of every parameter.
  Returns:
    float32 parameters. A scalar head's bias is the config's instructjax_score_bias, or 0.
  Raises:
    UserError: a tensor is missing, left over, or of another shape. Nothing has been read then.
    ValueError: the table does not know this network, see `tensor_table.tensors`.
  """
  wanted = _match(source, model)
  _require_tied_copy_equal(source, model, wanted)
  by_param: dict[str, list] = {}
  for tensor in wanted:
    tensor = tensor if model.execution.layers == "scan" else tensor.alone()
    by_param.setdefault(tensor.param, []).append(tensor)
  tree = param_shapes(model)
  shapes, places = tensor_table.leaves(tree), tensor_table.leaves(shardings)
  params = {}
  for path in sorted(shapes, key=lambda name: -shapes[name].size):
    shape = shapes[path].shape
    if path == tensor_table.SCORE_BIAS_PATH:
      bias = np.asarray(source.config[SCORE_BIAS] if SCORE_BIAS in source.config else 0, np.float32)
      params[path] = jax.device_put(bias, places[path])
    else:
      params[path] = _assemble(source, by_param[path], shape, places[path])
  # In the order of the model's own parameters.
  return jax.tree.unflatten(jax.tree.structure(tree), [params[path] for path in shapes])


def _match(source: Source, model: Model) -> list[tensor_table.Tensor]:
  """The model's tensors under the names that the source has for them, all of them or an error."""
  wanted = tensor_table.tensors(model)
  prefix = wanted[0].name.partition(".")[0] + "."
  bare = not any(name.startswith(prefix) for name in source.shapes)
  if bare:  # saved from the trunk's own class
    wanted = tuple(dataclasses.replace(t, name=t.name.removeprefix(prefix)) for t in wanted)
  by_name = {tensor.name: tensor for tensor in wanted}
  missing = [name for name in by_name if name not in source.shapes]
  known = by_name.keys() | ({"lm_head.weight"} if tensor_table.is_tied(model) else set())
  extra = [name for name in source.shapes if name not in known and not tensor_table.is_buffer(name)]
  for names, what in ((missing, "lacks"), (extra, "has, and this model has no place for,")):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise UserError(
        f"{source.path} {what} tensor {names[0]}{more}; the config must fit the weights"
      )
  dropped = 0
  for name, tensor in by_name.items():
    shape, rows = tuple(source.shapes[name]), tensor.param.endswith("_VD")
    if shape[1:] != tensor.shape[1:] or (
      shape[0] < tensor.shape[0] if rows else shape != tensor.shape
    ):
      raise UserError(
        f"{source.path}: tensor {name} has shape {list(shape)}, and the model needs"
        f" {list(tensor.shape)}{' or more rows' if rows else ''}"
      )
    dropped = max(dropped, shape[0] - tensor.shape[0]) if rows else dropped
  if dropped > (PAD_ROW in source.config):
    logging.warning(
      "%s: %d rows of the embedding past the vocabulary dropped", source.path, dropped
    )
  return list(wanted)


def _require_tied_copy_equal(source: Source, model: Model, wanted: list[tensor_table.Tensor]):
  """Old files hold the tied head a second time: harmless if it is the embedding."""
  if not tensor_table.is_tied(model) or "lm_head.weight" not in source.shapes:
    return
  embedding = next(tensor.name for tensor in wanted if tensor.param == "embedding/token_VD")
  if not np.array_equal(source.read(embedding), source.read("lm_head.weight")):
    raise UserError(
      f"{source.path}: tensor lm_head.weight differs from {embedding}, and the config ties them; set"
      " tie_word_embeddings to false in config.json if the head is meant to differ"
    )


def _assemble(
  source: Source, parts: list[tensor_table.Tensor], shape: tuple[int, ...], place
) -> jax.Array:
  """One parameter on its devices: every tensor is read once and copied into all local shards."""
  buffers = {}
  for index in place.addressable_devices_indices_map(shape).values():
    key = _bounds(index, shape)
    if key not in buffers:
      buffers[key] = _empty([stop - start for start, stop in key])
  for part in parts:
    stack = () if part.layer is None else (slice(part.layer, part.layer + 1),)
    covered = _bounds((*stack, *part.part), shape)
    targets = [
      (buffer[inner], outer)
      for key, buffer in buffers.items()
      for inner, outer in [_overlap(key, covered)]
      if inner is not None
    ]
    if not targets:
      continue
    ours = part.to_ours(source.read(part.name))
    ours = ours if part.layer is None else ours[None]
    for target, outer in targets:
      target[...] = ours[outer]
    del ours  # before the next one is read
  return jax.make_array_from_callback(shape, place, lambda index: buffers[_bounds(index, shape)])


def _empty(shape: list[int]) -> np.ndarray:
  """float32 at a multiple of 64 bytes: so placed, the CPU backend takes it over without a copy."""
  size = math.prod(shape)
  raw = np.empty(size + 16, np.float32)
  skip = -raw.ctypes.data % 64 // 4
  return raw[skip : skip + size].reshape(shape)


def _bounds(index, shape) -> tuple[tuple[int, int], ...]:
  """(start, stop) of each dimension; a hashable index."""
  return tuple(piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True))


def _overlap(shard, part):
  """What a shard and a part have in common: the index into the shard, the index into the part."""
  both = [(max(s[0], p[0]), min(s[1], p[1])) for s, p in zip(shard, part)]
  if any(start >= stop for start, stop in both):
    return None, None
  within = lambda outer: tuple(
    slice(start - o[0], stop - o[0]) for (start, stop), o in zip(both, outer)
  )
  return within(shard), within(part)


# --- out ------------------------------------------------------------------------------------------


def named_tensors(
  model: Model, params: Params
) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
  """Every tensor for export as (name, shape, make): `make()` brings one layer's tensor to the host.

  A scalar head is exported so that `transformers` gives the same scores: one more row of the
  embedding is the pad token it looks for, and LayerNorm's bias takes up the score's (see
  `folded_bias`; RMSNorm has none).

  Raises:
    ValueError: the table does not know this network (see `tensor_table.tensors`), or `params` are another's.
  """
  _require_params_of(model, params)
  flat, is_scalar = tensor_table.leaves(params), model.head == "scalar"
  is_list = isinstance(params["layers"], list)

  def make(tensor: tensor_table.Tensor) -> np.ndarray:
    tensor = tensor.alone() if is_list else tensor
    array = flat[tensor.param]
    if tensor.layer is not None:
      # A traced index: one compilation for all layers.
      array = jax.lax.dynamic_index_in_dim(array, np.int32(tensor.layer), keepdims=False)
    array = np.asarray(array, np.float32)
    if is_scalar and tensor.param == "embedding/token_VD":
      return np.pad(array, ((0, 1), (0, 0)))
    if is_scalar and tensor.param == "final_norm/bias_D":
      return array + folded_bias(flat["head/w_D"], flat[tensor_table.SCORE_BIAS_PATH])
    return tensor.to_theirs(array)

  def entry(tensor: tensor_table.Tensor):
    rows = tensor.shape[0] + (is_scalar and tensor.param == "embedding/token_VD")
    return tensor.name, (rows, *tensor.shape[1:]), functools.partial(make, tensor)

  return [entry(tensor) for tensor in tensor_table.tensors(model)]


def _require_params_of(model: Model, params: Params):
  is_list = isinstance(params["layers"], list)
  change = stacking.unstacked_shapes if is_list else stacking.stacked_shapes
  wanted, given = (
    tensor_table.leaves(stacking.relay(param_shapes(model), change)),
    tensor_table.leaves(params),
  )
  for path in (*wanted, *given):
    ours, theirs = (tree[path].shape if path in tree else "absent" for tree in (wanted, given))
    if ours != theirs:
      raise ValueError(f"export: parameter {path} is {theirs}, and the network has it {ours}")


def folded_bias(w_D, bias) -> np.ndarray:
  """What LayerNorm's bias must grow by for w . (LN + it) to be w . LN + bias; zeros for no bias."""
  w_D, bias = np.asarray(w_D, np.float64), float(bias)
  return (bias * w_D / max(float(w_D @ w_D), np.finfo(np.float32).tiny)).astype(np.float32)
