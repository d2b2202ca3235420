"""Moves numbers between our parameters and Hugging Face's tensors.

`load_params` builds sharded parameters from an opened source. `named_tensors` takes parameters apart for the writers.
tensor_table.py says where each number goes. Called by the package's own `__init__`, huggingface.py and gguf_export.py.
Imports no stage and no data.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

from instructjax.core.errors import UserError
from instructjax.core.foreign import Keys, named, shown
from instructjax.core.structs import Params
from instructjax.models.interop import shares, tensor_table
from instructjax.models.interop.hf_config import PAD_ROW, SCORE_BIAS, Description
from instructjax.models.interop.source import Source
from instructjax.models.interop.stored import Stored, of_params
from instructjax.models.transformer import Model, param_shapes
from instructjax.parallel import stacking

_COMPARED = 1 << 24  # numbers compared at a time

# --- in -------------------------------------------------------------------------------------------


def load_params(source: Source, model: Model, shardings: Params) -> Params:
  """Loads a model's parameters onto its devices.

  Each process reads the rows that its shards hold, or an equal share where these are no rows (see shares.py). They are
  copied straight into its shards: beside these, one tensor at a time is in host memory. All processes must call it.

  Args:
    source: opened weights.
    model: a model of the network that `describe(source)` returns. Its vocabulary may be smaller than the file's table;
      the rows that are left over (padding that no text encodes to) are dropped.
    shardings: NamedSharding of every parameter.
  Returns:
    float32 parameters. A scalar head's bias is the config's instructjax_score_bias, or 0.
  Raises:
    UserError: a tensor is missing, left over or of another shape (found before any is read), a second copy of a tied
      head differs from the embedding, or a file is cut off.
    ValueError: the table does not know this network; see `tensor_table.tensors`.
  """
  copy = tensor_table.lm_head(model.network) if tensor_table.is_tied(model) else None
  wanted = _match(source, tensor_table.tensors(model), copy)
  _warn_of_dropped_rows(source, wanted)
  _require_tied_copy_equal(source, model, wanted)
  by_param: dict[str, list] = {}
  for tensor in wanted:
    tensor = tensor if model.execution.layers == "scan" else tensor.alone()
    by_param.setdefault(tensor.param, []).append(tensor)
  tree = param_shapes(model)
  shapes, places = tensor_table.leaves(tree), tensor_table.leaves(shardings)
  params = {}
  # Largest first: what a transfer needs for a moment beside its result is then freed before most of the rest is there.
  for path in sorted(shapes, key=lambda name: -shapes[name].size):
    shape = shapes[path].shape
    if path == tensor_table.SCORE_BIAS_PATH:
      bias = np.asarray(Keys(source.config, str(source.path)).number(SCORE_BIAS, 0.0), np.float32)
      params[path] = jax.device_put(bias, places[path])
    else:
      params[path] = _assemble(source, by_param[path], shape, places[path])
  # In the order of the model's own parameters.
  return jax.tree.unflatten(jax.tree.structure(tree), [params[path] for path in shapes])


def require_fit(source: Source, found: Description):
  """Compares a network with the tensors of its file, before anything of the network's size is made.

  Raises:
    UserError: the number of layers differs, or a tensor is missing, left over, or of another shape.
  """
  layers = len(tensor_table.layers_in(source.shapes))
  if layers != found.cfg.num_layers:
    raise UserError(
      f"{source.path} has tensors of {layers} layers, and its config says {found.cfg.num_layers}; the"
      " config must fit the weights"
    )
  wanted = tensor_table.listed(found.cfg, found.vocab_size, found.head)
  is_tied = found.head == "lm" and found.cfg.tie_embeddings
  _match(source, wanted, tensor_table.lm_head(found.cfg) if is_tied else None)


def _match(
  source: Source, wanted: Sequence[tensor_table.Tensor], copy: str | None
) -> list[tensor_table.Tensor]:
  """The model's tensors, under the names that the source has for them.

  Args:
    source: opened weights.
    wanted: the model's tensors.
    copy: a tensor that may be there besides: a tied head's. None if the head is not tied.
  Raises:
    UserError: a tensor is missing, left over, or of another shape.
  """
  prefix = wanted[0].name.partition(".")[0] + "."
  bare = not any(name.startswith(prefix) for name in source.shapes)
  # A file saved from the trunk's own class (GPT2Model, say) has names without the prefix.
  if bare:
    wanted = tuple(dataclasses.replace(t, name=t.name.removeprefix(prefix)) for t in wanted)
  by_name = {tensor.name: tensor for tensor in wanted}
  missing = [name for name in by_name if name not in source.shapes]
  known = by_name.keys() | {copy}
  extra = [name for name in source.shapes if name not in known and not tensor_table.is_buffer(name)]
  for names, what in ((missing, "lacks"), (extra, "has, and this model has no place for,")):
    if names:
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise UserError(
        f"{source.path} {what} tensor {named(names[0])}{more}; the config must fit the weights"
      )
  for name, tensor in by_name.items():
    shape, rows = tuple(source.shapes[name]), tensor.param.endswith("_VD")
    if shape[1:] != tensor.shape[1:] or (
      shape[0] < tensor.shape[0] if rows else shape != tensor.shape
    ):
      raise UserError(
        f"{source.path}: tensor {named(name)} has shape {shown(list(shape))}, and the model needs"
        f" {list(tensor.shape)}{' or more rows' if rows else ''}"
      )
  return list(wanted)


def _warn_of_dropped_rows(source: Source, wanted: Sequence[tensor_table.Tensor]):
  rows = [tensor for tensor in wanted if tensor.param.endswith("_VD")]
  dropped = max(source.shapes[tensor.name][0] - tensor.shape[0] for tensor in rows)
  # The one pad row that our own export adds is dropped without a word.
  if dropped > (PAD_ROW in source.config):
    logging.warning(
      "%s: %d rows of the embedding past the vocabulary dropped", source.path, dropped
    )


def _require_tied_copy_equal(source: Source, model: Model, wanted: list[tensor_table.Tensor]):
  """Some old files hold a tied head a second time, which is harmless if it equals the embedding.

  Raises:
    UserError: it differs.
  """
  head = tensor_table.lm_head(model.network)
  if not tensor_table.is_tied(model) or head not in source.shapes:
    return
  embedding = next(tensor.name for tensor in wanted if tensor.param == "embedding/token_VD")
  shape = source.shapes[embedding]
  is_equal = shape == source.shapes[head]
  # A few rows at a time, and of several processes each its share: who finds a difference ends all of them.
  step = max(_COMPARED // math.prod(shape[1:]), 1)
  for first in range(step * jax.process_index(), shape[0], step * jax.process_count()):
    last = min(first + step, shape[0])
    is_equal = is_equal and np.array_equal(
      source.read_rows(embedding, first, last), source.read_rows(head, first, last)
    )
  if not is_equal:
    raise UserError(
      f"{source.path}: tensor {head} differs from {embedding}, and the config ties them; set"
      " tie_word_embeddings to false in config.json if the head is meant to differ"
    )


def _assemble(
  source: Source, parts: list[tensor_table.Tensor], shape: tuple[int, ...], place
) -> jax.Array:
  """Builds one parameter on its devices from the tensors that fill it.

  Args:
    source: opened weights.
    parts: the tensors: one for each layer of a stack, or for each part of a fused parameter.
    shape: of the whole parameter.
    place: its sharding.
  """
  # Devices that hold the same shard share a buffer, so a replicated parameter is in host memory once.
  buffers = {}
  for index in place.addressable_devices_indices_map(shape).values():
    key = shares.bounds(index, shape)
    if key not in buffers:
      buffers[key] = _empty([stop - start for start, stop in key])
  for part in parts:
    shares.bring(source.read_rows, part, buffers, shape, place)
  return jax.make_array_from_callback(
    shape, place, lambda index: buffers[shares.bounds(index, shape)]
  )


def _empty(shape: list[int]) -> np.ndarray:
  """An uninitialised float32 array that begins at a multiple of 64 bytes.

  JAX's CPU backend takes over such an array without copying it.
  """
  size = math.prod(shape)
  raw = np.empty(size + 16, np.float32)
  skip = -raw.ctypes.data % 64 // 4
  return raw[skip : skip + size].reshape(shape)


# --- out ------------------------------------------------------------------------------------------


def named_tensors(
  model: Model, params: Params | Stored
) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
  """Every tensor of an export as (name, shape, make), where `make()` brings it to the host.

  A model with a scalar head is exported so that `transformers` computes the same scores. The embedding gets one more
  row, for the pad token that `transformers` looks for: `make()` leaves it out, and it is zero. The head's bias goes
  into LayerNorm's bias (see `folded_bias`). RMSNorm has no bias; there the caller puts it into the config.

  Args:
    model: the network.
    params: its parameters, or where they are stored.
  Raises:
    ValueError: the table does not know this network (see `tensor_table.tensors`), or `params` are those of another.
  """
  tensors, is_scalar = tensor_table.tensors(model), model.head == "scalar"
  stored = params if isinstance(params, Stored) else _in_memory(model, params)
  head = next((tensor for tensor in tensors if tensor.param == "head/w_D"), None)

  def make(tensor: tensor_table.Tensor) -> np.ndarray:
    array = stored.read(tensor)
    if is_scalar and head and tensor.param == "final_norm/bias_D":
      return array + folded_bias(stored.read(head)[0], stored.score_bias)
    return array

  def entry(tensor: tensor_table.Tensor):
    rows = tensor.shape[0] + (is_scalar and tensor.param == "embedding/token_VD")
    return tensor.name, (rows, *tensor.shape[1:]), functools.partial(make, tensor)

  return [entry(tensor) for tensor in tensors]


def _in_memory(model: Model, params: Params) -> Stored:
  """Parameters as `Stored`; ValueError if they are those of another network."""
  _require_params_of(model, params)
  return of_params(model, params)


def stored_in(source: Source, model: Model) -> Stored:
  """The tensors of opened weights, as they lie in the file.

  Args:
    source: opened weights.
    model: of the network that `describe(source)` returns; as for `load_params`, its vocabulary may be smaller.
  Raises:
    UserError: as `load_params`.
  """
  copy = tensor_table.lm_head(model.network) if tensor_table.is_tied(model) else None
  listed = tensor_table.tensors(model)
  wanted = _match(source, listed, copy)
  _warn_of_dropped_rows(source, wanted)
  _require_tied_copy_equal(source, model, wanted)
  names = {tensor.name: found.name for tensor, found in zip(listed, wanted, strict=True)}
  bias = Keys(source.config, str(source.path)).number(SCORE_BIAS, 0.0)
  read = lambda tensor: source.read_rows(names[tensor.name], 0, tensor.shape[0])
  return Stored(read, bias if model.head == "scalar" else 0.0)


def _require_params_of(model: Model, params: Params):
  """Raises ValueError if parameters do not have the paths and shapes of the model's."""
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
  """The vector to add to LayerNorm's bias in place of a score head's bias: w . (y + vector) = w . y + bias."""
  # The shortest such vector is bias * w / |w|^2. The bound on the denominator is for a head of zeros.
  w_D, bias = np.asarray(w_D, np.float64), float(bias)
  return (bias * w_D / max(float(w_D @ w_D), np.finfo(np.float32).tiny)).astype(np.float32)
