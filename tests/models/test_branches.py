"""The masks of trees, by hand; whole passes are compared in evaluation/test_scoring.py for every family."""

import dataclasses

import numpy as np

from instructjax.models import branches
from tests import tiny


def test_a_column_is_seen_from_what_is_below_it():
  """Two trees in a row: 0-1-2 with a second branch 0-3, then 4-5, and a pad."""
  position_BL = np.array([[0, 1, 2, 1, 0, 1, 0]], np.int32)
  last_BL = np.array([[3, 2, 2, 3, 5, 5, -1]], np.int32)
  cfg = dataclasses.replace(tiny.LLAMA, attention_window=2, layer_pattern="L")
  dense, banded = branches._masks(position_BL, last_BL, 0, 0, cfg)
  seen = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 3], 4: [4], 5: [4, 5], 6: []}
  assert {t: np.flatnonzero(row).tolist() for t, row in enumerate(np.asarray(dense[0]))} == seen
  # In a window of two positions the third token of the first branch no longer sees the first.
  assert np.flatnonzero(banded[0, 2]).tolist() == [1, 2]
  assert np.flatnonzero(banded[0, 3]).tolist() == [0, 3]


def test_the_past_is_seen_from_everywhere_but_for_its_padding():
  last_BL = np.array([[1, 1]], np.int32)
  position_BL = np.array([[3, 4]], np.int32)
  cfg = dataclasses.replace(tiny.LLAMA, attention_window=3, layer_pattern="L")
  dense, banded = branches._masks(position_BL, last_BL, 4, 3, cfg)
  assert np.asarray(dense[0], int).tolist() == [[1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1]]
  assert np.asarray(banded[0], int).tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 1, 1]]
