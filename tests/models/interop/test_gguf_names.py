"""GGUF's names and orders of rows, by hand. That tables and networks agree is in test_tensor_table.py."""

import numpy as np
import pytest

from instructjax.core.config import RopeScalingConfig
from instructjax.models.interop import gguf_names


@pytest.mark.parametrize("shape", [(16,), (16, 3)], ids=["bias", "rows"])
def test_the_halves_of_each_head_are_interleaved_and_split_again(shape):
  """Two heads of eight: 0 to 3 are one head's first half, 4 to 7 its second."""
  rows = np.broadcast_to(np.arange(16).reshape(16, *[1] * (len(shape) - 1)), shape)
  order = np.array([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15])
  there = gguf_names.interleave_halves(rows, head_dim=8)
  np.testing.assert_array_equal(there, rows[order])
  np.testing.assert_array_equal(gguf_names.split_halves(there, 8, rank=len(shape)), rows)


def test_which_parts_are_stored_otherwise():
  llama, gpt2 = gguf_names.ARCHITECTURES["llama"], gguf_names.ARCHITECTURES["gpt2"]
  assert gguf_names.part_of("blk.7.attn_q.weight") == "attn_q"
  assert llama.is_permuted("blk.7.attn_q.bias") and not llama.is_permuted("blk.7.attn_v.weight")
  assert gpt2.is_transposed("blk.0.ffn_up.weight") and not gpt2.is_transposed("token_embd.weight")


def test_llama3_divisors_by_hand():
  """Head of 4, base 100: wavelengths of 6.28 and 62.8 tokens, of which 20 hold 3.18 and .318.

  Below 1 turn the whole factor of 8, above 3 none; between 2 and 4, 3.18 is .59 of the way.
  """
  divisors = lambda low, high: gguf_names.llama3_factors(
    RopeScalingConfig(
      kind="llama3",
      factor=8.0,
      low_freq_factor=low,
      high_freq_factor=high,
      original_length=20,
      attention_factor=0.0,
    ),
    100.0,
    4,
  )
  np.testing.assert_allclose(divisors(1.0, 3.0), [1, 8])
  np.testing.assert_allclose(divisors(2.0, 4.0), [1 / (0.408 / 8 + 0.592), 8], rtol=2e-3)


@pytest.mark.parametrize("shape", [(12,), (12, 2)], ids=["bias", "rows"])
def test_queries_keys_and_values_are_parted_and_put_together_again(shape):
  """Two heads of two: query 0 1, key 2 3, value 4 5 of the first, then those of the second."""
  rows = np.broadcast_to(np.arange(12).reshape(12, *[1] * (len(shape) - 1)), shape)
  order = np.array([0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11])
  apart = gguf_names.fuse(rows, num_heads=2)
  np.testing.assert_array_equal(apart, rows[order])
  np.testing.assert_array_equal(gguf_names.split_fused(apart, 2), rows)
