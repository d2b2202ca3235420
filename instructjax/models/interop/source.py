"""The common form of opened weights: tensor names, shapes, a config, and a function that reads a tensor.

Made by the readers (huggingface.py, gguf_file.py). hf_config.py and transfer.py use it, so they know Hugging Face's
names and layout only. Imports nothing of the project.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

_EDGE = 1 << 20  # bytes hashed at either end of a file


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened folder or file of weights, of which only headers have been read."""

  path: pathlib.Path  # named in every error
  config: Mapping[str, Any]  # in the form of Hugging Face's config.json
  shapes: Mapping[str, tuple[int, ...]]  # by Hugging Face's tensor names
  read: Callable[[str], np.ndarray]  # name -> float32 in Hugging Face's layout; a fresh array
  fingerprint: str  # from `fingerprint`
  notes: tuple[
    str, ...
  ]  # what the user should know of the files, a line each; `describe` logs them


def fingerprint(files: Iterable[pathlib.Path]) -> str:
  """A cheap identity of weights files: a hash of their names, sizes, and first and last MiB.

  Headers and config files lie within those parts, and so do some of the weights. That tells two models apart, or two
  trainings of one model, without reading gigabytes.
  """
  digest = hashlib.sha256()
  for path in files:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}\n".encode())
    with path.open("rb") as file:
      digest.update(file.read(_EDGE))
      file.seek(max(_EDGE, size - _EDGE))  # never the same bytes twice
      digest.update(file.read())
  return digest.hexdigest()
