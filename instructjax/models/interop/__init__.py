"""Reads and writes weights of other programs: Hugging Face folders and GGUF files.

Called by train/weights.py, serve/packaging.py, serve/card.py and the benchmarks. To read: `open_weights` gives a
`Source`, `describe` says which network it holds, and `load_params` brings its tensors onto a mesh. To write:
`write_folder` and `write_file` take parameters, or a `Stored`, which brings one tensor at a time.
"""

import pathlib

from absl import logging

from instructjax.core.errors import UserError, reason
from instructjax.core.foreign import Keys, named
from instructjax.models.interop.gguf_export import GgufType, write_file
from instructjax.models.interop.gguf_file import open_file
from instructjax.models.interop.hf_config import SCORE_BIAS, Description, model_config
from instructjax.models.interop.huggingface import (
  Dtype,
  download,
  found_instead,
  open_folder,
  write_folder,
)
from instructjax.models.interop.peft_folder import (
  base_of,
  is_adapter,
  misfit,
  open_adapter,
  read_adapter,
  write_adapter,
)
from instructjax.models.interop.source import Source
from instructjax.models.interop.stored import Stored, with_adapter
from instructjax.models.interop.tensor_table import SCORE_BIAS_PATH, Tensor
from instructjax.models.interop.transfer import load_params, require_fit, stored_in

__all__ = [
  "GgufType",
  "SCORE_BIAS",
  "base_of",
  "is_adapter",
  "misfit",
  "read_adapter",
  "write_adapter",
  "Description",
  "Source",
  "Stored",
  "stored_in",
  "with_adapter",
  "SCORE_BIAS_PATH",
  "Tensor",
  "Dtype",
  "describe",
  "download",
  "found_instead",
  "load_params",
  "open_weights",
  "pad_id",
  "write_file",
  "write_folder",
]


def open_weights(path: str | pathlib.Path, base: str | pathlib.Path | None = None) -> Source:
  """Opens a Hugging Face folder, a GGUF file, or an adapter folder of peft with its base; only headers are read.

  Args:
    path: the folder or file.
    base: of an adapter, the folder or file of its base; None for the one that it names itself.
  Raises:
    UserError: the path is none of these, or it is damaged or of an unsupported kind.
  """
  path = pathlib.Path(path)
  try:
    path.stat()
  except (OSError, ValueError) as error:  # ValueError: a name with a NUL
    what = "is not there"
    if not isinstance(error, FileNotFoundError):
      what = f"cannot be read: {reason(error)}"
    raise UserError(
      f"{named(str(path), 200)} must be a Hugging Face folder or a .gguf file, and it {what}"
    ) from None
  if is_adapter(path):
    return open_adapter(path, _open_base(path, pathlib.Path(base or base_of(path))))
  if base is not None:
    raise UserError(f"{path} is no adapter, and needs no base; leave out {base}")
  if path.is_dir():
    return open_folder(path)
  if path.suffix == ".gguf":
    return open_file(path)
  hint = "; give the folder that it is in" if path.suffix == ".safetensors" else ""
  raise UserError(f"{path} must be a Hugging Face folder or a .gguf file, and it is neither{hint}")


def _open_base(path: pathlib.Path, base: pathlib.Path) -> Source:
  """Opens the base of an adapter, which must not be an adapter itself."""
  if is_adapter(base):
    raise UserError(
      f"{path} is an adapter of {base}, which is an adapter too; merge that one first"
    )
  return open_weights(base)


def pad_id(source: Source) -> int | None:
  """The id of the pad token, at which transformers' classifiers read no score; None if the config names none.

  Raises:
    UserError: the value is no id.
  """
  keys = Keys(source.config, str(source.path))
  value = keys.value("pad_token_id", None)
  if value is None:
    return None
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise keys.wrong("pad_token_id", "must be the id of a token")
  return value


def describe(source: Source) -> Description:
  """The network whose weights were opened. For fields that no file has, see `model_config`.

  Raises:
    UserError: the architecture is not known, or it has a switch that NetworkConfig lacks; or the tensors are not those
      of this network.
  """
  where = source.path / "config.json" if source.path.is_dir() else source.path
  for note in source.notes:
    logging.warning("%s: %s", source.path, note)
  found = model_config(source.config, str(where))
  require_fit(source, found)
  return found
