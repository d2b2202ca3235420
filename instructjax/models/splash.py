"""Attention by JAX's splash kernel, which keeps no scores in memory. Called by transformer.py only.

What `layers.attend` computes under `layers.attention_masks`, for a TPU: the chip reads queries, keys
and values a block at a time, and does not run blocks that the mask leaves nothing of. On any other
device the kernel is interpreted, many times slower than plain attention: that is for tests.

Letters as in layers.py; H is the query heads of one device, key/value head by key/value head.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as PS

from instructjax.models.layers import SAVED
from instructjax.parallel.sharding import ROWS

LANES = 128  # what a block's length is a multiple of
MAX_BLOCK = 512  # scores of a block are 1 MiB of float32, of which a kernel holds a few at a time


def attend(segment_BT, q_BTGRK, k_BGTK, v_BGTK, *, window: int):
  """Softmax attention, causal by column and inside one segment; zero at pads (segment 0).

  The band is one of columns. It is the band of positions wherever positions count a segment's columns
  one by one, as packed rows and rows padded on either side do: no pads between tokens of a segment.

  Args:
    segment_BT: int32 ids of the columns, which ask and are attended to.
    q_BTGRK, k_BGTK, v_BGTK: as `layers.attend` takes them.
    window: the newest columns that a column looks at, its own included; 0 is all of them.
  Returns:
    x_BTGRK
  """
  mesh = jax.sharding.get_abstract_mesh()
  platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
  run = functools.partial(_attend_rows, window=window, interpret=platform != "tpu")
  if not mesh.empty and mesh.size > 1:
    # The compiler cannot split a kernel by itself. Rows that do not divide are on every device.
    divides = q_BTGRK.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS) == 0
    rows = ROWS if divides else None
    queries, keys = PS(rows, None, "tensor"), PS(rows, "tensor")
    specs = dict(in_specs=(PS(rows), queries, keys, keys), out_specs=queries)
    run = jax.shard_map(run, **specs, check_vma=False)
  return run(segment_BT, q_BTGRK, k_BGTK, v_BGTK)


def _attend_rows(segment_BT, q_BTGRK, k_BGTK, v_BGTK, *, window: int, interpret: bool):
  """Of one device's rows and heads; `window` 0 is no band."""
  batch, length, groups, queries, head_dim = q_BTGRK.shape
  scaled_BTGRK = q_BTGRK.astype(jnp.float32) * head_dim**-0.5
  q_BHTK = scaled_BTGRK.astype(q_BTGRK.dtype).transpose(0, 2, 3, 1, 4)
  q_BHTK = q_BHTK.reshape(batch, groups * queries, length, head_dim)
  short = -length % LANES
  lengthen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0)))
  q_BHSK, k_BGSK, v_BGSK = map(lengthen, (q_BHTK, k_BGTK, v_BGTK))
  # Pads look at pads, so that no row looks at nothing, and what they see is dropped.
  segment_BS = jnp.pad(segment_BT, ((0, 0), (0, short)))
  kernel = _make_kernel(groups * queries, length + short, window, interpret)
  with jax.named_scope(f"attention_band_{window}" if window else "attention_causal"):
    x_BHSK = jax.vmap(kernel)(q_BHSK, k_BGSK, v_BGSK, segment_BS)
    x_BHTK = x_BHSK[:, :, :length]
  x_BTGRK = x_BHTK.reshape(batch, groups, queries, length, head_dim).transpose(0, 3, 1, 2, 4)
  return jnp.where((segment_BT > 0)[:, :, None, None, None], x_BTGRK, 0.0)


def _make_kernel(num_heads: int, length: int, window: int, interpret: bool):
  """(q_HTK, k_GTK, v_GTK, segment_T) -> x_HTK of one row."""
  # Here, not above: Pallas takes most of a second to import, which only this needs.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  square = (length, length)
  mask = masks.LocalMask(square, (window - 1, 0), 0) if window else masks.CausalMask(square)
  size = block_length(length, window)
  # Any: its type allows for residuals, which come out where they are asked for only.
  run: Any = kernels.make_splash_mha_single_device(
    masks.MultiHeadMask([mask] * num_heads),
    block_sizes=kernels.BlockSizes(
      block_q=size,
      block_kv=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_q_dq=size,
      block_kv_dq=size,
    ),
    residual_checkpoint_name=SAVED,  # else remat='products' would run the kernel once more
    interpret=interpret,
  )
  return lambda q_HTK, k_GTK, v_GTK, segment_T: run(
    q_HTK, k_GTK, v_GTK, kernels.SegmentIds(segment_T, segment_T)
  )


def block_length(length: int, window: int) -> int:
  """Columns of a block: as many as fit and divide the length, but no more than a band is wide.

  A block with anything in it is computed whole: beside a narrow band that is mostly for nothing.
  """
  most = min(MAX_BLOCK, window + -window % LANES) if window else MAX_BLOCK
  return next(size for size in range(most, 0, -LANES) if length % size == 0)
