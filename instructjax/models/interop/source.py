"""What an opened weights folder or file is to the rest: names, shapes, a config, a way to read.

Made by the readers (huggingface.py, gguf_file.py), used by hf_config.py and transfer.py, which see
every file through Hugging Face's names and layout. Imports nothing of the project.
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
  """An opened weights folder or file; nothing is read yet but headers."""

  path: pathlib.Path  # named in every error
  config: Mapping[str, Any]  # in the form of Hugging Face's config.json
  shapes: Mapping[str, tuple[int, ...]]  # by Hugging Face's tensor names
  read: Callable[[str], np.ndarray]  # name -> float32 in Hugging Face's layout; a fresh array
  fingerprint: str  # from `fingerprint`


def fingerprint(files: Iterable[pathlib.Path]) -> str:
  """A cheap identity of weights files: their names, sizes, and first and last MiB.

  Headers and config files lie within those; a gigabyte in between need not be read to tell two
  models, or two trainings of one model, apart.
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
