"""Attention for NVIDIA GPUs by cuDNN's fused kernel, which keeps no scores in memory. Called by transformer.py only.

It computes what `layers.attend` computes for whole sequences, by `jax.nn.dot_product_attention`. Which networks and
devices it takes is checked by execution.py, before a Model is made.

The dimension letters are those of layers.py. H counts query heads, ordered by key/value head.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from instructjax.models.layers import SAVED

MAX_HEAD_DIM = 256  # 128 before Hopper
HEAD_DIM_STEP = 8


def attend(q_BTGRK, k_BGTK, v_BGTK, mask_BTT, implementation: Literal["cudnn", "xla"] = "cudnn"):
  """Softmax attention under a causal mask; zero for a query whose columns are all masked.

  Args:
    q_BTGRK, k_BGTK, v_BGTK: as for `layers.attend`; in bfloat16 for cuDNN.
    mask_BTT: from `layers.attention_masks` or, of trees, `layers.tree_mask`. cuDNN adds it to the scores, as one
      bfloat16 array for all heads.
    implementation: "xla" is the same call on any device, for tests.
  Returns:
    x_BTGRK
  """
  batch, length, groups, queries, head_dim = q_BTGRK.shape
  q_BTHK = q_BTGRK.reshape(batch, length, groups * queries, head_dim)
  k_BTGK, v_BTGK = k_BGTK.transpose(0, 2, 1, 3), v_BGTK.transpose(0, 2, 1, 3)
  # The mask is causal already. `is_causal` lets cuDNN leave out the blocks above the diagonal.
  x_BTHK = jax.nn.dot_product_attention(
    q_BTHK, k_BTGK, v_BTGK, mask=mask_BTT[:, None], is_causal=True, implementation=implementation
  )
  x_BTGRK = checkpoint_name(x_BTHK.reshape(q_BTGRK.shape), SAVED)
  # A softmax over masked columns only is a mean over some of them.
  return jnp.where(mask_BTT.any(axis=-1)[:, :, None, None, None], x_BTGRK, 0.0)
