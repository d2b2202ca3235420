"""Imports and exports a random Llama with several processes on this machine: bytes that each reads, and its memory.

  python -m benchmarks.weights_at_scale --gigabytes=2 --processes=4 --fsdp=4

It writes a Hugging Face folder, float32, of about so many gigabytes. A local pod imports it onto a mesh of fsdp and
tensor, and saves it as a checkpoint. One process exports that checkpoint, float32 and bfloat16, and compares what it
wrote with the folder. Prints one JSON line a process:
  - asked: bytes of tensors that the process asked of the files, as they are stored;
  - from_disk: bytes that the kernel fetched from the disk for it, with its read-ahead; the page cache is emptied of the
    files before each part;
  - peak: the most memory that it took above what it had before, beside `result`, that of its shards, and `largest`, the
    largest tensor's in float32.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from configs import models as presets
from instructjax.core.config import MeshConfig, from_config_dict
from instructjax.models import execution, interop, transformer
from instructjax.models.interop import tensor_table
from instructjax.parallel import distributed, memory, sharding
from instructjax.train import checkpoint, streams

WIDTHS = dict(
  d_model=1536, num_heads=12, num_kv_heads=4, head_dim=128, d_mlp=4096, tie_embeddings=False
)
A_LAYER = 25_168_896  # numbers


def network(gigabytes: float, vocab: int):
  """A Llama of the shape above, with as many layers as fit beside its two tables."""
  base = from_config_dict(presets.get("ppo", "smollm2_135m")).model.network
  layers = max(round((gigabytes * 1e9 / 4 - 2 * vocab * 1536) / A_LAYER), 1)
  return dataclasses.replace(base, num_layers=layers, **WIDTHS)


def model_on(mesh, cfg, vocab: int):
  """The network on a mesh, its layers scanned as on accelerators."""
  how = dataclasses.replace(execution.for_inference("cpu"), layers="scan")
  return execution.model_on(mesh, cfg, how, vocab, "lm")


def random_tensor(tensor: tensor_table.Tensor) -> np.ndarray:
  """Numbers that depend on the tensor's name alone."""
  seed = sum(tensor.name.encode())
  return np.random.default_rng(seed).standard_normal(tensor.shape, dtype=np.float32)


def forget(folder: pathlib.Path):
  """Takes a folder's files out of the page cache."""
  for path in folder.rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_disk() -> int:
  """Bytes that the kernel has fetched from the disk for this process."""
  lines = pathlib.Path("/proc/self/io").read_text().splitlines()
  return int(dict(line.split(": ") for line in lines)["read_bytes"])


class Peak:
  """Measures a part of the program: seconds, memory above what was there before, and bytes from the disk."""

  def __enter__(self):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's own peak
    self._began, self._disk, self._before = time.monotonic(), from_disk(), self._kib("VmRSS")
    return self

  def __exit__(self, *_):
    self.result = {
      "seconds": round(time.monotonic() - self._began, 1),
      "peak": (self._kib("VmHWM") - self._before) * 1024,
      "from_disk": from_disk() - self._disk,
    }

  def _kib(self, name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


def import_and_save(folder: pathlib.Path, axes: dict[str, int]):
  """One process of the pod: loads its shards, says what that took, and saves them."""
  distributed.join(distributed.find())
  import jax

  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, **axes))
  source = interop.open_weights(folder / "hf")
  found = interop.describe(source)
  model = model_on(mesh, found.cfg, found.vocab_size)
  asked = 0

  def read_rows(name: str, first: int, last: int) -> np.ndarray:
    nonlocal asked
    asked += 4 * (last - first) * int(np.prod(source.shapes[name][1:]))
    return source.read_rows(name, first, last)

  counted = dataclasses.replace(source, read_rows=read_rows)
  places, shapes = transformer.param_shardings(mesh, model)
  jax.block_until_ready(jax.jit(lambda: 0)())
  distributed.meet("all there")
  with Peak() as took:
    params = jax.block_until_ready(interop.load_params(counted, model, places))
  own = sum(
    shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
  )
  largest = 4 * max(int(np.prod(shape)) for shape in source.shapes.values())
  line = {"import": jax.process_index(), "asked": asked, "result": own, "largest": largest}
  print(json.dumps(line | took.result), flush=True)
  with checkpoint.Checkpoints(folder / "stage", keep=1) as checkpoints:
    checkpoints.save(1, {"params": params}, None, {}, {}, {})
  distributed.end(0)


def export(folder: pathlib.Path, dtype: interop.Dtype):
  """Exports the checkpoint in this process, says what that took, and compares it with the folder."""
  source = interop.open_weights(folder / "hf")
  found = interop.describe(source)
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1))
  model = model_on(mesh, found.cfg, found.vocab_size)
  out = folder / dtype
  memory.return_freed_memory()  # as the command does
  with Peak() as took:
    arrays = streams.SavedArrays(folder / "stage", 1)
    stored = interop.Stored(lambda tensor: streams.tensor_of(arrays, "params", tensor))
    interop.write_folder(out, model, stored, {}, shard_bytes=500_000_000, dtype=dtype)
  written = interop.open_weights(out)
  for name in source.shapes:
    theirs = source.read(name)
    if dtype == "bfloat16":
      import ml_dtypes

      theirs = theirs.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(written.read(name), theirs, err_msg=name)
  size = sum(path.stat().st_size for path in out.iterdir())
  largest = 4 * max(int(np.prod(shape)) for shape in source.shapes.values())
  files = len(list(out.glob("*.safetensors")))
  line = {"export": dtype, "bytes": size, "files": files, "largest": largest}
  print(json.dumps(line | took.result | {"times_largest": round(took.result["peak"] / largest, 2)}))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gigabytes", type=float, default=2.0)
  parser.add_argument("--vocab", type=int, default=32768)
  parser.add_argument("--processes", type=int, default=4)
  parser.add_argument("--fsdp", type=int, default=4)
  parser.add_argument("--tensor", type=int, default=1)
  parser.add_argument("--folder", help="where the files lie meanwhile; a temporary one by default")
  parser.add_argument("--part", choices=["import", "float32", "bfloat16"], help="for its own use")
  flags = parser.parse_args()
  axes = {"fsdp": flags.fsdp, "tensor": flags.tensor}
  if flags.part == "import":
    return import_and_save(pathlib.Path(flags.folder), axes)
  if flags.part:
    return export(pathlib.Path(flags.folder), flags.part)
  folder = pathlib.Path(tempfile.mkdtemp(dir=flags.folder))
  try:
    mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1))
    model = model_on(mesh, network(flags.gigabytes, flags.vocab), flags.vocab)
    interop.write_folder(folder / "hf", model, interop.Stored(random_tensor), {})
    total = sum(path.stat().st_size for path in (folder / "hf").iterdir())
    print(json.dumps({"folder": total, "processes": flags.processes, **axes}), flush=True)
    own = [sys.executable, "-m", "benchmarks.weights_at_scale", f"--folder={folder}"]
    own += [f"--{name}={value}" for name, value in axes.items()]
    pod = [sys.executable, "-m", "launch.local_pod", f"--processes={flags.processes}", "--"]
    parts = ([*pod, *own, "--part=import"], [*own, "--part=float32"], [*own, "--part=bfloat16"])
    for command in parts:
      forget(folder)
      subprocess.run(command, check=True)
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  main()
