"""Attention for TPUs by JAX's splash kernel, which keeps no scores in memory. Called by transformer.py only.

It computes what `layers.attend` computes under `layers.attention_masks`. The kernel reads queries, keys and values a
block at a time and skips the blocks that are masked entirely. On any other device it is interpreted, many times slower
than plain attention, which is of use to tests only.

The dimension letters are those of layers.py. H counts the query heads of one device, ordered by key/value head.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as PS

from instructjax.models.layers import SAVED
from instructjax.parallel.sharding import ROWS, platform_of

LANES = 128  # a block's length must be a multiple of the TPU's 128 lanes
# The scores of a block of this length are 1 MiB of float32, and a kernel holds a few such arrays at a time.
MAX_BLOCK = 512


def attend(segment_BT, q_BTGRK, k_BGTK, v_BGTK, *, window: int):
  """Softmax attention, causal by column and inside one segment; zero at pads (segment 0).

  `window` counts columns, while `layers.band` counts positions. The two agree if no pads lie between the tokens of a
  segment, which holds for packed rows and for rows padded on either side.

  Args:
    segment_BT: int32 segment of each column, for queries and keys alike.
    q_BTGRK, k_BGTK, v_BGTK: as for `layers.attend`.
    window: number of newest columns that a column attends to, its own included; 0 for all.
  Returns:
    x_BTGRK
  """
  mesh = jax.sharding.get_abstract_mesh()
  run = functools.partial(_attend_rows, window=window, interpret=platform_of(mesh) != "tpu")
  if not mesh.empty and mesh.size > 1:
    # The compiler cannot split a Pallas kernel, so shard_map does: attention of a row and a head needs no other row or
    # head. Rows that do not divide over the mesh are computed by every device.
    divides = q_BTGRK.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS) == 0
    rows = ROWS if divides else None
    queries, keys = PS(rows, None, "tensor"), PS(rows, "tensor")
    specs = dict(in_specs=(PS(rows), queries, keys, keys), out_specs=queries)
    run = jax.shard_map(run, **specs, check_vma=False)
  return run(segment_BT, q_BTGRK, k_BGTK, v_BGTK)


def _attend_rows(segment_BT, q_BTGRK, k_BGTK, v_BGTK, *, window: int, interpret: bool):
  """`attend` for the rows and heads of one device."""
  batch, length, groups, queries, head_dim = q_BTGRK.shape
  # The kernel does not scale scores by 1 / sqrt(K), so the queries are scaled, in float32.
  scaled_BTGRK = q_BTGRK.astype(jnp.float32) * head_dim**-0.5
  q_BHTK = scaled_BTGRK.astype(q_BTGRK.dtype).transpose(0, 2, 3, 1, 4)
  q_BHTK = q_BHTK.reshape(batch, groups * queries, length, head_dim)
  short = -length % LANES
  lengthen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0)))
  q_BHSK, k_BGSK, v_BGSK = map(lengthen, (q_BHTK, k_BGTK, v_BGTK))
  # Added columns get segment 0, as pads have. Pads attend to pads, so that no softmax is over an empty set, and their
  # outputs are dropped below.
  segment_BS = jnp.pad(segment_BT, ((0, 0), (0, short)))
  kernel = _make_kernel(groups * queries, length + short, window, interpret)
  with jax.named_scope(f"attention_band_{window}" if window else "attention_causal"):
    x_BHSK = jax.vmap(kernel)(q_BHSK, k_BGSK, v_BGSK, segment_BS)
    x_BHTK = x_BHSK[:, :, :length]
  x_BTGRK = x_BHTK.reshape(batch, groups, queries, length, head_dim).transpose(0, 3, 1, 2, 4)
  return jnp.where((segment_BT > 0)[:, :, None, None, None], x_BTGRK, 0.0)


def _make_kernel(num_heads: int, length: int, window: int, interpret: bool):
  """Makes the kernel for one row: (q_HTK, k_GTK, v_GTK, segment_T) -> x_HTK."""
  # Imported here because Pallas takes most of a second to import, and only TPUs need it.
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
    residual_checkpoint_name=SAVED,  # else remat='products' would run the kernel again in the backward pass
    interpret=interpret,
  )
  return lambda q_HTK, k_GTK, v_GTK, segment_T: run(
    q_HTK, k_GTK, v_GTK, kernels.SegmentIds(segment_T, segment_T)
  )


def block_length(length: int, window: int) -> int:
  """Columns of a block: the largest multiple of LANES that divides the length, at most MAX_BLOCK.

  With a band, a block is no wider than the band (rounded up to LANES). The kernel computes a block whole if any of it
  is unmasked, so wide blocks along a narrow band would be mostly wasted.

  Args:
    length: columns of a row, a multiple of LANES.
    window: as for `attend`.
  """
  most = min(MAX_BLOCK, window + -window % LANES) if window else MAX_BLOCK
  return next(size for size in range(most, 0, -LANES) if length % size == 0)
