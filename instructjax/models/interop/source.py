"""The common form of opened weights: tensor names, shapes, a config, and a function that reads rows of a tensor.

Made by the readers (huggingface.py, gguf_file.py). hf_config.py and transfer.py use it, so they know Hugging Face's
names and layout only. Imports nothing of the project.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened folder or file of weights, of which only headers have been read."""

  path: pathlib.Path  # named in every error
  config: Mapping[str, Any]  # in the form of Hugging Face's config.json
  shapes: Mapping[str, tuple[int, ...]]  # by Hugging Face's tensor names
  # (name, first row, row after the last) -> float32 in Hugging Face's layout, a fresh array. Rows are the first
  # dimension, whatever it means. Of files that store rows one after the other, no others are read.
  read_rows: Callable[[str, int, int], np.ndarray]
  files: tuple[pathlib.Path, ...]  # all that were opened; who compares weights hashes them
  # What the user should know of the files, a line each; `describe` logs them.
  notes: tuple[str, ...]

  def read(self, name: str) -> np.ndarray:
    """A whole tensor, as `read_rows`."""
    return self.read_rows(name, 0, self.shapes[name][0])
