"""Reads and writes Hugging Face folders, config.json and safetensors, one tensor at a time.

Called by the package's own `__init__`. The `safetensors` library reads the files, in slices. Writing is done here; for
the reason see `write_safetensors`. The format is eight bytes with the header's length, a JSON header, and the raw
tensors.
"""

import fnmatch
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors

from instructjax.core import foreign
from instructjax.core.errors import UserError, reason, writing
from instructjax.core.foreign import named, shown
from instructjax.core.structs import Params
from instructjax.models.interop import tensor_table, transfer
from instructjax.models.interop.hf_config import to_hf_config
from instructjax.models.interop.source import Source
from instructjax.models.interop.stored import Stored
from instructjax.models.transformer import Model

_DTYPES = ("F32", "F16", "BF16")
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"[\w.+-]{1,200}\.safetensors", re.ASCII)
# Weights of other kinds, by the names of their files -> what to do about them.
_CONVERT = "convert {} with save_pretrained(..., safe_serialization=True)"
_OTHERS = {
  _ADAPTER: "it is an adapter (LoRA) without adapter_model.safetensors, its weights",
  "*.gguf": "it has {}; give the path of that file",
  "pytorch_model*": _CONVERT,
  "*.bin": _CONVERT,
  "consolidated*": "{} is in the model's own format; convert it with transformers, which has a script",
  "*.pt": _CONVERT,
  "*.pth": _CONVERT,
  "*.ckpt": _CONVERT,
  "tf_model.h5": "{} is TensorFlow's; load it with from_tf=True in transformers 4 and save_pretrained()",
  "*.msgpack": "{} is Flax's; load it with from_flax=True in transformers 4 and save_pretrained()",
  "*.onnx": "{} is an ONNX graph without the weights' names; take the model's safetensors",
  "*-of-*.safetensors": "{} is one of several shards, and " + _INDEX + " is missing",
  "*.safetensors": "{} has another name; rename it if it holds the whole model",
}
_CONFIG_BYTES = 1 << 22  # of config.json; one has some thousand
_SHARD_BYTES = 5_000_000_000  # the limit of transformers 4, too
Dtype = Literal["float32", "bfloat16"]  # of an export
# How safetensors spells it, and the type itself.
_WRITTEN: Mapping[Dtype, tuple[str, np.dtype]] = {
  "float32": ("F32", np.dtype("<f4")),
  "bfloat16": ("BF16", np.dtype(jnp.bfloat16)),
}
_BLOCK = 1 << 20  # numbers converted at a time, which bounds the memory needed beside the result


def open_folder(path: str | pathlib.Path) -> Source:
  """Opens a folder as `save_pretrained` writes it; only headers are read.

  If there are a single file and an index, the single file is read, as in transformers.

  Raises:
    UserError: a file is missing or damaged, the index and the shards disagree, or a tensor has an unsupported dtype; or
      the folder holds weights of another kind, an adapter for example.
  """
  path = pathlib.Path(path)
  _require_weights(path)
  config = foreign.read_json(path / _CONFIG, _CONFIG_BYTES)
  notes = []
  if (path / _SINGLE).is_file():
    weight_map, files = None, [path / _SINGLE]
    if (path / _INDEX).is_file():
      notes = [
        f"{_SINGLE} is read, as in transformers, and {_INDEX} is not used; delete the stale one"
      ]
  else:
    weight_map = _weight_map(path / _INDEX)
    files = [path / name for name in sorted(set(weight_map.values()))]
    others = sorted({file.name for file in path.glob("*.safetensors")} - set(weight_map.values()))
    if others:
      notes = [f"{named(others[0])} is not read: {_INDEX} does not name it"]
  places = {}  # name -> (file, shape)
  for file in files:
    if not file.is_file():
      raise UserError(f"{path / _INDEX} names the shard {file.name}, which is not there")
    for name, shape in read_shapes(file).items():
      if weight_map is not None and weight_map.get(name) != file.name:
        raise UserError(f"{file} holds tensor {named(name)}, which {_INDEX} does not place there")
      places[name] = file, shape
  # The loop above found tensors that the index does not know; this one finds tensors that the shards lack.
  for name, file in (weight_map or {}).items():
    if name not in places:
      raise UserError(f"{path / file} lacks tensor {named(name)}, which {_INDEX} places there")
  index = [path / _INDEX] if weight_map is not None else []
  return Source(
    path=path,
    config=config,
    shapes={name: shape for name, (_, shape) in places.items()},
    read_rows=functools.partial(read_rows, places),
    files=(path / _CONFIG, *index, *files),
    notes=tuple(notes),
  )


def found_instead(folder: pathlib.Path) -> str:
  """What a folder has in place of the files that are read, and what to do about it, as "; ..."; "" if nothing is known.

  Raises:
    UserError: the folder cannot be listed.
  """
  try:
    names = sorted(entry.name for entry in folder.iterdir())
  except OSError as error:
    raise UserError(f"{folder} cannot be read: {error.strerror}") from None
  for pattern, advice in _OTHERS.items():
    if found := fnmatch.filter(names, pattern):
      return f"; {advice.format(named(found[0]))}"
  return ""


def _require_weights(folder: pathlib.Path):
  """Raises UserError for an adapter, and for a folder without the files that are read."""
  if (folder / _ADAPTER).exists():
    raise UserError(
      f"{folder} is an adapter (LoRA), not a whole model: it has {_ADAPTER}, and no"
      " adapter_model.safetensors; delete that file if the weights beside it are merged already"
    )
  for name in (_CONFIG, _SINGLE):
    if not (folder / name).exists() and (name == _CONFIG or not (folder / _INDEX).exists()):
      more = f" and no {_INDEX}" if name == _SINGLE else ""
      raise UserError(f"{folder} has no {name}{more}{found_instead(folder)}")


def _weight_map(path: pathlib.Path) -> dict[str, str]:
  """Tensor -> name of its shard, from an index.

  Raises:
    UserError: the file is damaged, or a shard is not named as a file inside the folder.
  """
  block = foreign.Keys(foreign.read_json(path), str(path)).block("weight_map")
  if block is None:
    raise UserError(f"{path} lacks 'weight_map'")
  for name, file in block.raw.items():
    if not isinstance(file, str) or not _SHARD.fullmatch(file):
      raise UserError(
        f"{path}: weight_map gives {shown(name)} the shard {shown(file)}, which must be the name of a"
        " .safetensors file in the same folder"
      )
  return dict(block.raw)


def download(name: str) -> pathlib.Path:
  """Fetches ORG/NAME or ORG/NAME@REVISION from the Hugging Face hub into the hub's own cache.

  Returns:
    The folder of the snapshot.
  Raises:
    UserError: the `hub` extra is not installed, or the hub refuses or cannot be reached.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(
      f"hf://{name} needs the hub extra: pip install 'instructjax[hub]', or give a folder or GGUF file"
    ) from None
  repository, _, revision = name.partition("@")
  # Not *.bin: a repository often holds its weights a second time as pickles, which are not read.
  files = ["*.json", "*.safetensors", "*.model", "*.jinja"]
  try:
    folder = huggingface_hub.snapshot_download(
      repository, revision=revision or None, allow_patterns=files
    )
  except Exception as error:  # network, HTTP and validation errors have no common class
    raise UserError(f"hf://{name} cannot be fetched: {reason(error)}") from error
  return pathlib.Path(folder)


def _opened(path: pathlib.Path) -> safetensors.safe_open:
  """Opens a file with the library, as a context manager; UserError if its header does not fit its size."""
  foreign.require_file(path)
  try:
    return safetensors.safe_open(path, "numpy")
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise UserError(
      f"{path} is cut off or damaged, or not a safetensors file: {reason(error)}"
    ) from error


def _require_small_header(path: pathlib.Path):
  """Raises UserError for a header that would take long to parse: the library allows 100 MB."""
  foreign.require_file(path)
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
  if foreign.JSON_BYTES < size <= path.stat().st_size - 8:
    raise UserError(
      f"{path} has a header of {size} bytes, and at most {foreign.JSON_BYTES} are read"
    )


def read_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor.

  Raises:
    UserError: a tensor that a model needs has an unsupported dtype, or no numbers. Buffers may have any dtype: they are
      never read.
  """
  _require_small_header(path)
  with _opened(path) as file:
    headers = {name: file.get_slice(name) for name in file.keys()}
    shapes = {}
    for name, header in headers.items():
      dtype, shape = header.get_dtype(), tuple(header.get_shape())
      if not tensor_table.is_buffer(name):
        if dtype not in _DTYPES:
          raise UserError(
            f"{path}: tensor {named(name)} is {dtype}, and must be one of {', '.join(_DTYPES)}"
          )
        if not shape or 0 in shape:
          raise UserError(
            f"{path}: tensor {named(name)} of shape {shown(list(shape))} holds no weights"
          )
      shapes[name] = shape
    return shapes


def read_tensor(places: Mapping[str, tuple[pathlib.Path, tuple[int, ...]]], name: str):
  """A whole tensor, as `read_rows`."""
  return read_rows(places, name, 0, places[name][1][0])


def read_rows(
  places: Mapping[str, tuple[pathlib.Path, tuple[int, ...]]], name: str, start: int, stop: int
) -> np.ndarray:
  """Rows of a tensor as float32, converted a few at a time, so that no second copy of them is ever in memory.

  Args:
    places: tensor -> its file and shape.
    name: the tensor.
    start, stop: the first row and the one after the last.
  Raises:
    UserError: the file was cut off or replaced since it was opened.
  """
  path, shape = places[name]
  result = np.empty((stop - start, *shape[1:]), np.float32)
  step = max(_BLOCK // math.prod(shape[1:]), 1)
  # Opened again for each tensor, which takes less than a millisecond. If the file was cut off meanwhile, opening it
  # fails; reading past its end through an old memory map would kill the process (SIGBUS).
  with _opened(path) as file:
    if name not in file.keys() or tuple(file.get_slice(name).get_shape()) != shape:
      raise UserError(f"{path} was replaced while it was read; run again")
    tensor = file.get_slice(name)
    for first in range(start, stop, step):
      last = min(first + step, stop)
      result[first - start : last - start] = tensor[first:last]
  return result


# --- out ------------------------------------------------------------------------------------------


def write_folder(
  path: str | pathlib.Path,
  model: Model,
  params: Params | Stored,
  extra_config: Mapping[str, Any],
  shard_bytes: int = _SHARD_BYTES,
  dtype: Dtype = "float32",
):
  """Writes config.json and safetensors that `transformers` loads, with one tensor at a time in memory.

  The folder is complete or absent: everything is written beside `path` and renamed at the end.

  Args:
    path: a folder that does not exist or is empty.
    model: one with an 'lm' head loads with AutoModelForCausalLM, one with a 'scalar' head with
      AutoModelForSequenceClassification. A Llama-like reward model loses its bias, for which its architecture has no
      place: add the config's instructjax_score_bias to the scores.
    params: of the model, or where they are stored.
    extra_config: more keys of config.json (ids of special tokens).
    shard_bytes: size limit of a safetensors file. A tensor is never split, so a larger one gets a file of its own.
    dtype: of the numbers in the files; bfloat16 is rounded to nearest.
  Raises:
    UserError: the folder is not empty, no architecture of Hugging Face matches the model, or writing fails.
    ValueError: tensor_table.py does not know this network, or `params` are those of another.
  """
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} is there already; nothing is overwritten, give another folder")
  # transformers' score heads have no bias. LayerNorm's own bias takes it up (`transfer.folded_bias`); RMSNorm has none.
  tensors = transfer.named_tensors(model, params)
  bias = 0.0
  if model.head == "scalar" and model.network.norm != "layernorm":
    bias = params.score_bias if isinstance(params, Stored) else float(params["head"]["bias"])
  config = to_hf_config(model.network, model.vocab_size, model.head, bias)
  config |= {"torch_dtype": dtype, **extra_config}
  scratch = path.with_name(f".{path.name}.writing")
  with writing(path):
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
  try:
    with writing(path):
      (scratch / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
      _write_tensors(scratch, tensors, shard_bytes, dtype)
      os.replace(scratch, path)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _write_tensors(folder: pathlib.Path, tensors: list, shard_bytes: int, dtype: Dtype):
  """Writes one file, or shards with an index, named as `save_pretrained` names them."""
  shards = list(_split(tensors, shard_bytes, _WRITTEN[dtype][1].itemsize))
  if len(shards) == 1:
    return write_safetensors(folder / _SINGLE, tensors, dtype)
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    write_safetensors(folder / file, shard, dtype)
    weight_map |= {name: file for name, _, _ in shard}
  total = sum(_WRITTEN[dtype][1].itemsize * math.prod(shape) for _, shape, _ in tensors)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: list, shard_bytes: int, itemsize: int) -> Iterator[list]:
  """The tensors in order, in lists of at most `shard_bytes` each, or of one larger tensor."""
  shard, size = [], 0
  for tensor in tensors:
    more = itemsize * math.prod(tensor[1])
    if shard and size + more > shard_bytes:
      yield shard
      shard, size = [], 0
    shard, size = [*shard, tensor], size + more
  yield shard


def write_safetensors(path: pathlib.Path, tensors: list, dtype: Dtype = "float32"):
  """Writes a safetensors file with one tensor at a time in memory, and a few converted numbers of it.

  The library's writer takes all arrays of a file at once. For 1 GiB in tensors of 16 MiB it held 1,024 MiB (safetensors
  0.8), this function 16 MiB, in the same time.

  Args:
    path: the file.
    tensors: (name, shape, make) of each, as of `transfer.named_tensors`. Rows that `make()` leaves out are zeros.
    dtype: of the numbers in the file.
  """
  spelled, kind = _WRITTEN[dtype]
  header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, shape, _ in tensors:
    start, end = end, end + kind.itemsize * math.prod(shape)
    header[name] = {"dtype": spelled, "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8 bytes
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for _, shape, make in tensors:
      flat = np.ascontiguousarray(make()).reshape(-1)
      for first in range(0, flat.size, _BLOCK):
        block = flat[first : first + _BLOCK].astype(kind)
        file.write(block.view(np.uint8).data)
      file.write(bytes(kind.itemsize * (math.prod(shape) - flat.size)))
      del flat  # before the next one is read
