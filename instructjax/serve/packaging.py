"""Writes exports for other programs: weights, tokenizer, settings for generation, and the model card.

Called by commands/export.py. Imports no stage.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Generator

import jax
from jax.sharding import Mesh

from instructjax.core.config import MeshConfig
from instructjax.core.errors import UserError, writing
from instructjax.models import execution, interop, transformer
from instructjax.parallel import sharding
from instructjax.serve import card, tokenizer_export
from instructjax.train import streams, weight_places, weights


def write_huggingface(
  checkpoint: str,
  out: pathlib.Path,
  *,
  which: weights.Which = "ema",
  base: str = "",
  dtype: interop.Dtype = "float32",
):
  """Writes a folder that `transformers` loads, with one tensor at a time in memory. If anything fails, none is left.

  A language model loads with AutoModelForCausalLM, a reward or value model with AutoModelForSequenceClassification.

  Args:
    checkpoint: path for `weights.locate`.
    out: the new folder.
    which: which weights of an RL stage: the averaged policy, the last one, or the value network.
    base: of an adapter, where its base lies now; it is merged into it. '' for the place that is known.
    dtype: of the numbers in the files.
  Raises:
    UserError: `out` exists, the checkpoint cannot be opened or read, Hugging Face has no architecture for its network,
      or `out` cannot be written.
  """
  _require_new(out)
  opened = weights.locate(checkpoint, which, base)
  mesh, model = _network(opened)
  stored = streams.stored(opened, mesh, model)
  is_scalar = opened.head == "scalar"
  # A classifier in transformers finds the last token of a text by its pad token; ours has none, so it gets a new id.
  pad_id = model.vocab_size if is_scalar else None
  with _whole(out) as scratch:
    ids = tokenizer_export.write_files(
      opened.tokenizer, scratch, max_length=opened.network.max_length, pad_id=pad_id
    )
    # Into a folder of its own, because `write_folder` takes only an empty one and the tokenizer lies here already.
    interop.write_folder(scratch / "weights", model, stored, ids, dtype=dtype)
    for path in (scratch / "weights").iterdir():
      path.rename(scratch / path.name)
    (scratch / "weights").rmdir()
    if not is_scalar:
      given = {name: value for name, value in ids.items() if value is not None}
      stops = opened.tokenizer.stop_ids
      given |= {"eos_token_id": list(stops)} if len(stops) > 1 else {}
      _write(scratch / "generation_config.json", json.dumps(given, indent=2) + "\n")
    score_bias = json.loads((scratch / "config.json").read_text()).get(interop.SCORE_BIAS, 0.0)
    about = card.Export(out.name, "hf", which, dtype, _num_parameters(model), score_bias)
    _write(scratch / "README.md", card.text(opened, about))
    with writing(out):
      os.replace(scratch, out)


def write_peft(checkpoint: str, out: pathlib.Path, *, which: weights.Which = "ema", base: str = ""):
  """Writes a folder that `peft` loads onto the base: a stage's adapter alone.

  `peft` takes Hugging Face folders only. Another base, a GGUF file or a stage of a run, is exported with it, as the
  folder `base` inside the new one.

  Args:
    checkpoint: path for `weights.locate`, of a stage that trained an adapter.
    out: the new folder.
    which: as for `write_huggingface`.
    base: where the base lies now; '' for the place that is known.
  Raises:
    UserError: as for `write_huggingface`; or the stage trained all weights.
  """
  _require_new(out)
  opened = weights.locate(checkpoint, which, base)
  if opened.adapter is None:
    raise UserError(f"{checkpoint} is no adapter: it has all weights; use --format=hf")
  name, found = opened.adapter.base, opened.require_base()
  is_whole = found.kind == "hf" and not found.is_adapter
  if not is_whole:
    name = str(out.absolute() / "base")
  elif name.startswith(weight_places.HUB) and found.path == weights.locate(name).path:
    name = name.removeprefix(weight_places.HUB)
  else:
    name = str(found.path)
  mesh, model = _network(opened)
  adapted, trained = opened.load_trained(mesh, model)
  with _whole(out) as scratch:
    tokenizer_export.write_files(
      opened.tokenizer, scratch, max_length=opened.network.max_length, pad_id=None
    )
    interop.write_adapter(scratch, adapted, trained, name)
    if not is_whole:
      write_huggingface(str(found.path), scratch / "base")
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trained))
    about = card.Export(out.name, "peft", which, "float32", numbers)
    _write(scratch / "README.md", card.text(opened, about))
    with writing(out):
      os.replace(scratch, out)


def write_gguf(
  checkpoint: str,
  out: pathlib.Path,
  kind: interop.GgufType,
  *,
  which: weights.Which = "ema",
  base: str = "",
):
  """Writes FILE.gguf, which llama.cpp loads, and its card FILE.md.

  Args:
    checkpoint: path for `weights.locate`, of a language model.
    out: the new file.
    kind: type of the numbers in matrices.
    which: which weights of an RL stage: the averaged policy or the last one.
    base: as for `write_huggingface`.
  Raises:
    UserError: a file exists, the checkpoint cannot be opened or read, it is a reward or value model, llama.cpp cannot
      express its network or tokenizer, or the files cannot be written.
  """
  beside = out.with_suffix(".md")
  _require_new(out, beside)
  opened = weights.locate(checkpoint, which, base)
  if opened.head == "scalar":
    raise UserError(
      f"{checkpoint} is a reward or value model, and GGUF has no place for its head; use --format=hf"
    )
  metadata = tokenizer_export.gguf_metadata(opened.tokenizer)
  mesh, model = _network(opened)
  stored = streams.stored(opened, mesh, model)
  about = card.Export(out.name, "gguf", which, kind.upper(), _num_parameters(model))
  with _whole(out) as scratch:
    interop.write_file(scratch / out.name, model, stored, metadata, kind, name=out.stem)
    _write(scratch / beside.name, card.text(opened, about))
    with writing(out):
      # The weights last, so that no weights lie there without their card.
      os.replace(scratch / beside.name, beside)
      os.replace(scratch / out.name, out)


def _require_new(*paths: pathlib.Path):
  for path in paths:
    if path.exists():
      raise UserError(f"{path} is there already, and nothing is overwritten; give another --out")


def _network(opened: weights.Weights) -> tuple[Mesh, transformer.Model]:
  """A mesh in host memory, and the network on it."""
  opened.require_rows()
  # The smaller of two sizes. Files may have more embeddings than the tokenizer has ids, and in an exported reward model
  # the tokenizer has one id more than the model: the pad.
  vocab_size = min(opened.tokenizer.vocab_size, opened.vocab_size)
  devices = jax.local_devices(backend="cpu")[:1]
  mesh = sharding.make_mesh(MeshConfig(slice=1, data=1, fsdp=1, tensor=1), devices)
  model = execution.model_on(
    mesh, opened.network, execution.for_inference("cpu"), vocab_size, opened.head
  )
  return mesh, model


def _num_parameters(model: transformer.Model) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(transformer.param_shapes(model)))


@contextlib.contextmanager
def _whole(out: pathlib.Path) -> Generator[pathlib.Path, None, None]:
  """Makes a folder beside `out` to write in, and removes it in the end.

  Complete files are moved out of it. They lie on the same file system, so that the move is a rename, which cannot stop
  halfway.
  """
  scratch = out.with_name(f".{out.name}.writing")
  with writing(out):
    shutil.rmtree(scratch, ignore_errors=True)  # left by an export that was killed
    scratch.mkdir(parents=True)
  try:
    yield scratch
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _write(path: pathlib.Path, text: str):
  with writing(path):
    path.write_text(text, encoding="utf-8")
