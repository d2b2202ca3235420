"""Hugging Face folders: config.json and safetensors, read tensor by tensor and written so.

Called by the package's own `__init__`. The format (github.com/huggingface/safetensors: eight bytes of
header length, a JSON header, the raw tensors) is read and written here, not by its library, whose
NumPy side holds a whole shard in memory and knows no bfloat16.
"""

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from instructjax.core.errors import UserError, writing
from instructjax.core.structs import Params
from instructjax.models.interop import tensor_table
from instructjax.models.interop.hf_config import to_hf_config
from instructjax.models.interop.source import Source, fingerprint
from instructjax.models.transformer import Model

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000  # transformers 4's limit
_BLOCK = 1 << 22  # numbers converted at a time


def open_folder(path: str | pathlib.Path) -> Source:
  """Opens a folder as `save_pretrained` writes it; reads headers only.

  Raises:
    UserError: a file is missing, damaged, or names tensors that are not there.
  """
  path = pathlib.Path(path)
  config = _read_json(path / _CONFIG)
  if (path / _INDEX).is_file():
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
      raise UserError(f"{path / _INDEX} lacks 'weight_map'")
    files = [path / name for name in sorted(set(weight_map.values()))]
  elif (path / _SINGLE).is_file():
    weight_map, files = None, [path / _SINGLE]
  else:
    hint = "convert pytorch_model.bin with save_pretrained(..., safe_serialization=True)"
    old = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
    raise UserError(f"{path} has no {_SINGLE}{': ' + hint if old else ' and no ' + _INDEX}")
  entries = {}  # name -> (file, header entry, offset of the data)
  for file in files:
    if not file.is_file():
      raise UserError(f"{path / _INDEX} names the shard {file.name}, which is not there")
    header, start = _read_header(file)
    for name, entry in header.items():
      if weight_map is not None and weight_map.get(name) != file.name:
        raise UserError(f"{file} holds tensor {name}, which {_INDEX} does not place there")
      entries[name] = file, entry, start
  for name, file in (weight_map or {}).items():
    if name not in entries:
      raise UserError(f"{path / file} lacks tensor {name}, which {_INDEX} places there")
  index = [path / _INDEX] if weight_map is not None else []
  return Source(
    path=path,
    config=config,
    shapes={name: tuple(entry["shape"]) for name, (_, entry, _) in entries.items()},
    read=functools.partial(_read_tensor, entries),
    fingerprint=fingerprint([path / _CONFIG, *index, *files]),
  )


def download(name: str) -> pathlib.Path:
  """Fetches ORG/NAME or ORG/NAME@REVISION from the Hugging Face hub into the hub's own cache.

  Raises:
    UserError: the `hub` extra is not installed, or the hub does not give it.
  """
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(
      f"hf://{name} needs the hub extra: pip install 'instructjax[hub]', or give a folder or GGUF file"
    ) from None
  repository, _, revision = name.partition("@")
  files = ["*.json", "*.safetensors", "*.model", "*.jinja"]
  try:
    folder = huggingface_hub.snapshot_download(
      repository, revision=revision or None, allow_patterns=files
    )
  except Exception as error:  # network, HTTP and validation errors have no common class
    reason = str(error).strip().splitlines()[0]
    raise UserError(f"hf://{name} cannot be fetched: {reason}") from error
  return pathlib.Path(folder)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    result = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path.parent} has no {path.name}") from None
  except ValueError as error:
    raise UserError(f"{path} must be JSON: {error}") from None
  if not isinstance(result, dict):
    raise UserError(f"{path} must be a JSON object")
  return result


def _read_header(path: pathlib.Path) -> tuple[dict[str, dict], int]:
  """(tensors by name, where their data starts), checked against the size of the file."""
  size = path.stat().st_size
  with path.open("rb") as file:
    start = 8 + int.from_bytes(file.read(8), "little")
    if size < 8 or start > size:
      raise UserError(f"{path} is cut off: its header ends at byte {start}, the file at {size}")
    try:
      header = json.loads(file.read(start - 8))
      header.pop("__metadata__", None)
      end = start + max((_checked_end(path, *item) for item in header.items()), default=0)
    except UserError:
      raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise UserError(f"{path} is not a safetensors file: its header cannot be read") from error
  if end != size:
    raise UserError(
      f"{path} is cut off or damaged: its tensors end at byte {end}, the file at {size}"
    )
  return header, start


def _checked_end(path: pathlib.Path, name: str, entry: Mapping) -> int:
  """Where a tensor's data end, if they fit its shape and dtype."""
  (first, last), dtype = entry["data_offsets"], entry["dtype"]
  if dtype in _DTYPES:
    if last - first != _DTYPES[dtype].itemsize * math.prod(entry["shape"]):
      raise UserError(f"{path}: tensor {name} has {last - first} bytes for shape {entry['shape']}")
  elif not tensor_table.is_buffer(name):
    raise UserError(f"{path}: tensor {name} is {dtype}, and must be one of {', '.join(_DTYPES)}")
  return last


def _read_tensor(entries: Mapping, name: str) -> np.ndarray:
  """float32, converted block by block: no second copy of the tensor is ever held."""
  path, entry, start = entries[name]
  result = np.empty(math.prod(entry["shape"]), np.float32)
  with path.open("rb") as file:
    file.seek(start + entry["data_offsets"][0])
    for first in range(0, result.size, _BLOCK):
      block = result[first : first + _BLOCK]
      block[:] = np.fromfile(file, _DTYPES[entry["dtype"]], block.size)
  return result.reshape(entry["shape"])


# --- out ------------------------------------------------------------------------------------------


def write_folder(
  path: str | pathlib.Path,
  model: Model,
  params: Params,
  extra_config: Mapping[str, Any],
  shard_bytes: int = _SHARD_BYTES,
):
  """Writes config.json and float32 safetensors that `transformers` loads.

  Complete or absent: everything is written beside `path` and renamed.

  Args:
    path: a folder that does not exist or is empty.
    model: an 'lm' head loads with AutoModelForCausalLM, a 'scalar' one with
      AutoModelForSequenceClassification. Of a Llama-like model with a scalar head the score is that
      of the file plus the config's instructjax_score_bias, which its architecture has no place for.
    params: of the model.
    extra_config: more keys of config.json (ids of special tokens).
    shard_bytes: largest safetensors file; one tensor is never split.
  Raises:
    UserError: the folder has something in it, or no architecture is this model.
    UserError: the disk does not take it.
  """
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} is there already; nothing is overwritten, give another folder")
  bias, folds = 0.0, model.network.norm == "layernorm"
  if model.head == "scalar" and not folds:
    bias = float(params["head"]["bias"])
  config = to_hf_config(model.network, model.vocab_size, model.head, bias) | dict(extra_config)
  scratch = path.with_name(f".{path.name}.writing")
  with writing(path):
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
  try:
    with writing(path):
      (scratch / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
      _write_tensors(scratch, list(tensor_table.named_tensors(model, params)), shard_bytes)
      os.replace(scratch, path)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _write_tensors(folder: pathlib.Path, tensors: list, shard_bytes: int):
  shards = list(_split(tensors, shard_bytes))
  if len(shards) == 1:
    return _write_safetensors(folder / _SINGLE, tensors)
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    _write_safetensors(folder / file, shard)
    weight_map |= {name: file for name, _, _ in shard}
  total = sum(4 * math.prod(shape) for _, shape, _ in tensors)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: list, shard_bytes: int) -> Iterator[list]:
  shard, size = [], 0
  for tensor in tensors:
    more = 4 * math.prod(tensor[1])
    if shard and size + more > shard_bytes:
      yield shard
      shard, size = [], 0
    shard, size = [*shard, tensor], size + more
  yield shard


def _write_safetensors(path: pathlib.Path, tensors: list):
  """One tensor at a time in memory."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape, _ in tensors:
    start, end = end, end + 4 * math.prod(shape)
    header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the data is aligned
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for _, _, make in tensors:
      file.write(np.ascontiguousarray(make(), "<f4").data)
