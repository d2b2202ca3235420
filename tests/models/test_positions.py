"""Rotary frequencies, and kinds of layers, against numbers worked out by hand and Llama 3.1's own branches."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from instructjax.core.config import RopeScalingConfig
from instructjax.models import layers, positions


def frequencies(cfg, *scaling, **changes):
  cfg = dataclasses.replace(cfg, rope_scaling=RopeScalingConfig(*scaling), **changes)
  return np.asarray(positions.rotary_frequencies(cfg))


def test_rotary_frequencies_by_hand(llama):
  # head_dim 8, base 10000: 10000 ** (-i / 4).
  sizes = dict(head_dim=8, rope_base=1e4)
  plain = frequencies(llama, "none", 8.0, 1.0, 4.0, 8192, 0.0, **sizes)
  np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)
  linear = frequencies(llama, "linear", 4.0, 1.0, 4.0, 8192, 0.0, **sizes)
  np.testing.assert_allclose(linear, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
  # 16 tokens are 16 / (2 pi) = 2.546 turns of the first pair, .255 of the second: with bounds 1 and
  # 4 it keeps (2.546 - 1) / 3 = .5155 of its speed and an eighth of the rest: .5155 + .4845 / 8.
  llama3 = frequencies(llama, "llama3", 8.0, 1.0, 4.0, 16, 0.0, **sizes)
  np.testing.assert_allclose(llama3, [0.57606, 0.0125, 0.00125, 0.000125], rtol=1e-4)


def test_rotary_frequencies_of_llama_3_1(llama):
  """As meta-llama/llama-models (models/llama3/model.py, apply_scaling) branches on wavelengths."""
  found = frequencies(llama, "llama3", 8.0, 1.0, 4.0, 8192, 0.0, head_dim=128, rope_base=5e5)
  regimes = set()
  for i, value in enumerate(found):
    frequency = 5e5 ** (-i / 64)
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
      regimes.add("kept")
    elif wavelength > 8192 / 1:
      regimes.add("slowed")
      frequency /= 8
    else:
      regimes.add("between")
      smooth = (8192 / wavelength - 1) / (4 - 1)
      frequency = (1 - smooth) * frequency / 8 + smooth * frequency
    np.testing.assert_allclose(value, frequency, rtol=2e-6)
  assert regimes == {"kept", "slowed", "between"}


def test_yarn_by_hand(llama):
  """The same three regimes, but a straight line over the pairs' numbers in between."""
  # Head of 16, base 1e4: pair i turns by 10 ** (-i / 2) a token. Within 2 pi * 1000 tokens, pair 2 makes 100 turns and
  # pair 6 makes one. A little under that, the bounds are pairs 1.99997 and 5.99997, and are rounded outward to 1 and 6.
  length = 6283
  sizes = dict(head_dim=16, rope_base=1e4)
  found = frequencies(llama, "yarn", 4.0, 1.0, 100.0, length, 0.0, **sizes)
  kept = np.array([1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0])
  np.testing.assert_allclose(
    found, 10.0 ** (-np.arange(8) / 2) * (kept + (1 - kept) / 4), rtol=1e-5
  )
  scaling = RopeScalingConfig("yarn", 4.0, 1.0, 100.0, length, 0.0)
  cfg = dataclasses.replace(llama, rope_scaling=scaling, **sizes)
  position_BT = np.array([[0, 3]])
  factor = 0.1 * math.log(4) + 1
  for given, expected in ((0.0, factor), (1.5, 1.5)):
    own = dataclasses.replace(scaling, attention_factor=given)
    (cos, sin), *_ = positions.rotary_angles(
      position_BT, dataclasses.replace(cfg, rope_scaling=own)
    ).values()
    np.testing.assert_allclose(cos[0], np.cos(np.outer([0, 3], found)) * expected, rtol=1e-5)
    np.testing.assert_allclose(sin[0], np.sin(np.outer([0, 3], found)) * expected, rtol=1e-5)
  local = dataclasses.replace(cfg, rope_local_base=16.0)
  assert positions.attention_factor(local, True) == 1 != positions.attention_factor(local)


def test_rotary_frequencies_of_local_layers_and_of_a_part_of_a_head(llama):
  # 4 of 8 dimensions turn, base 100: 100 ** (-i / 2). The local base 16 is not scaled: 16 ** (-i / 2).
  sizes = dict(head_dim=8, rope_base=100.0, rotary_dim=4, rope_local_base=16.0)
  scaling = RopeScalingConfig("linear", 4.0, 1.0, 4.0, 8192, 0.0)
  cfg = dataclasses.replace(llama, rope_scaling=scaling, **sizes)
  np.testing.assert_allclose(positions.rotary_frequencies(cfg), [0.25, 0.025], rtol=1e-6)
  np.testing.assert_allclose(positions.rotary_frequencies(cfg, True), [1, 0.25], rtol=1e-6)
  x_BTGQK = np.arange(8, dtype=np.float32).reshape(1, 1, 1, 1, 8)
  angle_BTK = np.array([[[np.pi / 2, np.pi]]], np.float32)
  turned = positions.rotate(x_BTGQK, (np.cos(angle_BTK), np.sin(angle_BTK)))
  # Dimension 0 turns with 2 by a quarter, 1 with 3 by a half; 4 to 7 stay.
  np.testing.assert_allclose(turned.ravel(), [-2, -1, 0, -3, 4, 5, 6, 7], atol=1e-6)


@pytest.mark.parametrize(
  "pattern, num_layers, changes, kinds",
  [
    ("GL", 4, {}, "G"),  # without a window all are alike
    ("GL", 4, dict(attention_window=2), "GL"),
    ("GL", 1, dict(attention_window=2), "G"),
    ("LLLLLG", 26, dict(attention_window=2), "LLLLLG"),
    ("LLLLLG", 5, dict(attention_window=2), "L"),
    ("LG", 4, dict(rope_local_base=9.0), "LG"),  # no window, but other positions
    ("GGGN", 36, {}, "GGGN"),
    ("GNGN", 6, {}, "GN"),
  ],
)
def test_kinds_of_layers(pattern, num_layers, changes, kinds, llama):
  cfg = dataclasses.replace(llama, layer_pattern=pattern, num_layers=num_layers, **changes)
  assert positions.layer_kinds(cfg) == kinds
  # The banded layers' mask is made where there are such layers: one layer of "GL" is none.
  has_band = bool(cfg.attention_window) and "L" in kinds
  assert (
    layers.band(np.ones((1, 1, 1), bool), *np.zeros((2, 1, 1), int), cfg) is not None
  ) == has_band


def test_positions_ignore_padding():
  is_token_BL = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0]], bool)
  position_BL = positions.from_mask(is_token_BL)
  assert position_BL.dtype == jnp.int32
  np.testing.assert_array_equal(position_BL, [[0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 3, 4]])


def test_positions_begin_anew_in_each_segment():
  segment_BL = jnp.array([[0, 1, 1, 2, 2, 2, 0], [1, 0, 1, 1, 3, 3, 3]], jnp.int32)
  position_BL = positions.from_segments(segment_BL)
  counted = segment_BL > 0
  expected = [[0, 0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1, 2]]
  np.testing.assert_array_equal(position_BL[counted], np.array(expected)[counted])
